"""Payloads from a fuzzer that sees which branches it reaches: any bytes are a valid cache or refused by name.

`python -m tests.edge_agent.fuzz_payload CORPUS [libFuzzer's options]`; the corpus directory gets valid payloads first.
The first byte of an input says how it is taken: 0 as a whole payload; others as the body of the one slice of a payload
with that codec, its digest made right, so that what is behind the digests is reached.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edge_agent.kv"]):
    from edge_agent.kv.payload import Header, encode
    from edge_agent.kv.reader import PayloadReader
    from edge_agent.kv.recipe import recipe

from edge_agent.errors import PayloadRejected
from tests.edge_agent.caches import expectation_for, header_for, made_up, transform_for

CACHE = made_up(layers=2, heads=2, entries=6, dim=4)
TRANSFORM = transform_for(CACHE)
RUNGS = ("fp16", "q3", "q8", *(f"klt{level}" for level in range(0, 16, 3)))
EXPECTED = expectation_for(CACHE, limit_bytes=1 << 20)


def header(rung: str) -> Header:
    return header_for(CACHE, recipe(rung))


def as_slice(rung: str, body: bytes) -> bytes:
    """A payload up to its only slice, which has this body behind its place."""
    first = next(iter(encode(header(rung), CACHE, TRANSFORM)))
    whole = struct.pack("<II", 0, CACHE.entries) + body
    record = b"S" + struct.pack("<I", len(whole)) + whole
    return first + record + hashlib.blake2b(whole, digest_size=16).digest()


def test_one_input(data: bytes) -> None:
    """Feed it; whatever is not refused must be a cache whose numbers are finite."""
    if not data:
        return
    reader = PayloadReader(EXPECTED)
    try:
        reader.feed(data[1:] if data[0] == 0 else as_slice(RUNGS[data[0] % len(RUNGS)], data[1:]))
        if data[0] == 0:
            reader.finish()
    except PayloadRejected:
        pass
    for cache in reader.caches:
        cache.check()


def write_seeds(corpus: Path) -> None:
    """Valid payloads, whole and as slices."""
    for index, rung in enumerate(RUNGS):
        pieces = list(encode(header(rung), CACHE, TRANSFORM))
        (corpus / f"whole-{rung}").write_bytes(b"\0" + b"".join(pieces))
        first = index or len(RUNGS)
        (corpus / f"slice-{rung}").write_bytes(bytes([first]) + pieces[1][13:-16])


if __name__ == "__main__":
    write_seeds(Path(sys.argv[1]))
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
