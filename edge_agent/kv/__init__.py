"""The KV cache as data and its way to bytes."""
