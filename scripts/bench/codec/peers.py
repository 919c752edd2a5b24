"""What others do to a cache, as far as it is installed; keys are given without rotary phase, as kvbus sends them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from edge_agent.kv.cache import Cache
from scripts.bench.codec.quantized import quantized_cache
from scripts.bench.runtime.measured import Absent
from scripts.peers.groups import GROUP, grouped
from scripts.peers.method import Method, assembled, tensors

ZSTD_LEVEL = 3

CACHEGEN = Absent(
    name="CacheGen's serializer (arXiv 2310.07240)",
    reason="it comes with lmcache, which requires CUDA's packages and transformers 5.4, where the export needs 4.57",
)


@dataclass(frozen=True)
class Peers:
    """Methods that work here, and what does not."""

    methods: tuple[Method[Any], ...]
    absent: tuple[Absent, ...]


def zstd(name: str) -> Method[bytes]:
    """Half precision, compressed by zstandard. Raises ImportError without it."""
    try:
        import zstandard  # noqa: PLC0415  may be missing
    except ImportError:
        raise ImportError("zstandard is not installed") from None

    def encode(cache: Cache) -> bytes:
        halves = np.stack(tensors(cache)).astype("<f2")
        shape = np.array(halves.shape, dtype="<u4").tobytes()
        return shape + zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(halves.tobytes())

    def decode(sent: bytes) -> Cache:
        raw = zstandard.ZstdDecompressor().decompress(sent[16:])
        halves = np.frombuffer(raw, dtype="<f2").reshape(np.frombuffer(sent[:16], dtype="<u4"))
        return assembled(list(halves.astype(np.float32)))

    return Method(name, encode, decode, len, packages=("zstandard",))


def makers(threads: int) -> dict[str, Callable[[str], Method[Any]]]:
    """By name, what makes each. Libraries that have threads get so many.

    KIVI also keeps the last tokens in full precision, which is left out here.
    """
    quantized = partial(quantized_cache, threads=threads)
    return {
        f"fp16 + zstd {ZSTD_LEVEL}": zstd,
        f"groups of {GROUP}, 4 bits": partial(grouped, bits=4),
        f"groups of {GROUP}, 2 bits": partial(grouped, bits=2),
        "KIVI's groups, 2 bits": partial(grouped, bits=2, keys="tokens"),
        "QuantizedCache, quanto, 4 bits": partial(quantized, backend="quanto", bits=4),
        "QuantizedCache, quanto, 2 bits": partial(quantized, backend="quanto", bits=2),
        "QuantizedCache, hqq, 4 bits": partial(quantized, backend="hqq", bits=4),
        "QuantizedCache, hqq, 2 bits": partial(quantized, backend="hqq", bits=2),
    }


def peers(cache: Cache, made: Mapping[str, Callable[[str], Method[Any]]]) -> Peers:
    """Each peer that this interpreter has, tried on `cache` once, and why the others are not there."""
    methods, absent = [], []
    for name, make in made.items():
        try:
            method = make(name)
            method.decode(method.encode(cache))
        except (ImportError, OSError, RuntimeError, ValueError) as error:  # they compile kernels when first used
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            absent.append(Absent(name=name, reason=reason))
        else:
            methods.append(method)
    return Peers(tuple(methods), (*absent, CACHEGEN))
