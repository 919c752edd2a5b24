"""The codec beside its peers on a real cache: bits, loss, and seconds against the prefill that a cache saves."""
