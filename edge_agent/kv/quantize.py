"""Asymmetric uniform quantization of a whole tensor (Q-KVComm, eqs. 5-8; methods.md 1.3).

The paper's zero point, -min/scale, cancels badly in float32 when the offset is large against the range. Carrying the
minimum and the maximum themselves, as float32, is exact, costs the same eight bytes, and leaves nothing to underflow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_agent.errors import CacheInvalid
from edge_agent.kv.bitpack import check_bits
from edge_agent.kv.cache import Float32

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Quantized:
    """codes: uint8, the tensor's shape; the tensor is minimum + codes * (maximum - minimum) / (2**bits - 1)."""

    codes: npt.NDArray[np.uint8]
    bits: int
    minimum: float
    maximum: float


def quantize(x: Float32, bits: int) -> Quantized:
    """Quantize a whole tensor with one range.

    x: float32, any shape. bits: 1-8. Every element comes back within half a step (and float32 rounding); a constant
    tensor comes back exactly. Raises CacheInvalid if x holds a NaN or an infinity, RecipeInvalid for other bits.
    """
    levels = (1 << check_bits(bits)) - 1
    if x.size == 0:
        return Quantized(np.zeros(x.shape, dtype=np.uint8), bits, 0.0, 0.0)
    minimum, maximum = float(x.min()), float(x.max())
    spread = maximum - minimum
    if not np.isfinite(spread):
        raise CacheInvalid("a tensor to quantize holds a NaN or an infinity")
    if spread == 0.0:
        return Quantized(np.zeros(x.shape, dtype=np.uint8), bits, minimum, maximum)
    work = x if _float32_suffices(spread, levels) else x.astype(np.float64)
    scaled = np.subtract(work, work.dtype.type(minimum))
    scaled *= work.dtype.type(levels / spread)
    np.rint(scaled, out=scaled)
    np.clip(scaled, 0, levels, out=scaled)
    return Quantized(scaled.astype(np.uint8), bits, minimum, maximum)


def dequantize(q: Quantized) -> Float32:
    """The tensor back, float32, the shape of the codes. A constant tensor is exact."""
    levels = (1 << q.bits) - 1
    spread = q.maximum - q.minimum
    if _float32_suffices(spread, levels) or spread == 0.0:
        out = q.codes.astype(np.float32)
        out *= np.float32(spread / levels)
        out += np.float32(q.minimum)
        return out
    exact = q.codes.astype(np.float64) * (spread / levels) + q.minimum
    return exact.astype(np.float32)


def _float32_suffices(spread: float, levels: int) -> bool:
    """Whether the step, its inverse and the range (rounded up, too) are normal float32 numbers."""
    return spread / levels >= SMALLEST_NORMAL and spread <= LARGEST / 2 and levels / spread <= LARGEST
