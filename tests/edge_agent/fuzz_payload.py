"""Payloads from a fuzzer that sees which branches it reaches: any bytes are a valid cache or refused by name.

`python -m tests.edge_agent.fuzz_payload CORPUS [libFuzzer's options]`; the corpus directory gets valid payloads first.
The first byte of an input says how it is taken: 0 as a whole payload; 255 as a header, others as the body of the one
slice of a payload with that codec, digests made right, so that what is behind them is reached.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edge_agent.kv"]):
    from edge_agent.kv.cache import Cache
    from edge_agent.kv.header import MAGIC, Header
    from edge_agent.kv.payload import encode
    from edge_agent.kv.reader import PayloadReader
    from edge_agent.kv.recipe import recipe

from edge_agent.errors import PayloadRejected
from tests.edge_agent.caches import attended, evicted_for, expectation_for, header_for, made_up, transform_for

CACHE = attended(made_up(layers=2, heads=2, entries=6, dim=4))
TRANSFORM = transform_for(CACHE)
RUNGS = ("fp16", "q3", "q8", "fp16-h50", "klt3-e30", *(f"klt{level}" for level in range(0, 16, 3)))
WHOLE, HEADER = 0, 255
EXPECTED = expectation_for(CACHE, limit_bytes=1 << 20)


def sent(rung: str) -> tuple[Header, Cache]:
    """Header and entries of a payload at a rung."""
    made = recipe(rung)
    return evicted_for(CACHE, made) if made.eviction else (header_for(CACHE, made), CACHE)


def as_slice(rung: str, body: bytes) -> bytes:
    """A payload up to its only slice, which has this body behind its place."""
    made, cache = sent(rung)
    first = next(iter(encode(made, cache, TRANSFORM)))
    whole = struct.pack("<II", 0, made.entries) + body
    record = b"S" + struct.pack("<I", len(whole)) + whole
    return first + record + hashlib.blake2b(whole, digest_size=16).digest()


def as_header(packed: bytes) -> bytes:
    """A payload up to its header."""
    return MAGIC + struct.pack("<I", len(packed)) + packed + hashlib.blake2b(packed, digest_size=16).digest()


def taken(how: int, data: bytes) -> bytes:
    if how == WHOLE:
        return data
    return as_header(data) if how == HEADER else as_slice(RUNGS[how % len(RUNGS)], data)


def test_one_input(data: bytes) -> None:
    """Feed it; whatever is not refused must be a cache whose numbers are finite."""
    if not data:
        return
    reader = PayloadReader(EXPECTED)
    try:
        reader.feed(taken(data[0], data[1:]))
        if data[0] == WHOLE:
            reader.finish()
    except PayloadRejected:
        pass
    for cache in reader.slices.values():
        cache.check()


def write_seeds(corpus: Path) -> None:
    """Valid payloads, whole and as slices."""
    for index, rung in enumerate(RUNGS):
        made, cache = sent(rung)
        pieces = list(encode(made, cache, TRANSFORM))
        (corpus / f"whole-{rung}").write_bytes(b"\0" + b"".join(pieces))
        first = index or len(RUNGS)
        (corpus / f"slice-{rung}").write_bytes(bytes([first]) + pieces[1][13:-16])
        (corpus / f"header-{rung}").write_bytes(bytes([HEADER]) + pieces[0][8:-16])


if __name__ == "__main__":
    write_seeds(Path(sys.argv[1]))
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
