"""Per-group asymmetric quantization, as llama.cpp (Q4_1) and KIVI (arXiv 2402.02750) have it: GROUP neighbours share a
scale and a minimum in fp16.

KIVI groups keys along the tokens of a channel, and values along the channels of a token; llama.cpp both along channels.
Bits and losses are theirs, seconds numpy's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edge_agent.errors import CacheInvalid
from edge_agent.kv.bitpack import pack, unpack
from edge_agent.kv.cache import Cache, Float32
from scripts.peers.method import Method, assembled, tensors

GROUP = 32
Along = Literal["tokens", "channels"]
_AXES: dict[Along, int] = {"tokens": 1, "channels": 2}


@dataclass(frozen=True, eq=False)
class Grouped:
    """One tensor, (kv_heads, tokens, head_dim), of which each group of GROUP along one axis is minimum + scale * code.

    codes: bit-packed. scales, minima: float16 (groups,). The last group of an axis that is no multiple of GROUP is
    filled with its last element, and stored whole.
    """

    codes: bytes
    scales: npt.NDArray[np.float16]
    minima: npt.NDArray[np.float16]
    bits: int
    along: Along
    shape: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        return len(self.codes) + self.scales.nbytes + self.minima.nbytes


def quantize(x: Float32, bits: int, along: Along) -> Grouped:
    """Quantize a tensor, float32 (kv_heads, tokens, head_dim), at 1-8 bits.

    Codes are of the scale and minimum as stored. Raises CacheInvalid for a NaN, an infinity or what fp16 can't hold,
    RecipeInvalid for other bits.
    """
    lines = np.moveaxis(x, _AXES[along], -1)
    lines = np.pad(lines, ((0, 0), (0, 0), (0, -lines.shape[-1] % GROUP)), mode="edge")
    groups = lines.reshape(-1, GROUP)
    levels = (1 << bits) - 1
    with np.errstate(over="ignore", invalid="ignore"):  # it is refused below
        minima = groups.min(-1).astype(np.float16)
        scales = ((groups.max(-1) - groups.min(-1)) / np.float32(levels)).astype(np.float16)
    if not np.isfinite(minima).all() or not np.isfinite(scales).all():
        raise CacheInvalid("a tensor to quantize by groups holds a NaN, an infinity, or what fp16 can't")
    steps = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)
    codes = np.rint((groups - minima.astype(np.float32)[:, None]) / steps[:, None])
    np.clip(codes, 0, levels, out=codes)
    heads, tokens, channels = x.shape
    return Grouped(pack(codes.astype(np.uint8), bits), scales, minima, bits, along, (heads, tokens, channels))


def dequantize(q: Grouped) -> Float32:
    """The tensor back, float32 (kv_heads, tokens, head_dim)."""
    axis = _AXES[q.along]
    others = tuple(size for at, size in enumerate(q.shape) if at != axis)
    groups = unpack(q.codes, q.bits, len(q.scales) * GROUP).reshape(-1, GROUP).astype(np.float32)
    groups *= q.scales.astype(np.float32)[:, None]
    groups += q.minima.astype(np.float32)[:, None]
    lines = groups.reshape(*others, -1)[..., : q.shape[axis]]
    return np.ascontiguousarray(np.moveaxis(lines, -1, axis))


def grouped(name: str, *, bits: int, keys: Along = "channels") -> Method[list[Grouped]]:
    """All tensors of a cache so; values are always grouped along channels."""

    def encode(cache: Cache) -> list[Grouped]:
        return [quantize(x, bits, "channels" if at % 2 else keys) for at, x in enumerate(tensors(cache))]

    def decode(sent: list[Grouped]) -> Cache:
        return assembled([dequantize(each) for each in sent])

    def nbytes(sent: list[Grouped]) -> int:
        return sum(each.nbytes for each in sent)

    return Method(name, encode, decode, nbytes)
