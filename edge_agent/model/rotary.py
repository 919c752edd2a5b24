"""Rotary positions: putting the phase on keys and taking it off (methods.md 5).

The half-split form that Hugging Face models use: dimension d pairs with d + head_dim/2. Angles are float32 products,
as the exported graphs compute them, so that taking off what a graph put on leaves rounding only.
"""

from __future__ import annotations

import numpy as np

from edge_agent.kv.cache import Float32, Int32


def angles(positions: Int32, frequencies: Float32) -> tuple[Float32, Float32]:
    """Cosines and sines, float32 (entries, head_dim/2), of positions (entries,) at frequencies (head_dim/2,)."""
    radians = (positions.astype(np.float32)[:, None] * frequencies[None, :]).astype(np.float64)
    return np.cos(radians).astype(np.float32), np.sin(radians).astype(np.float32)


def rotate(keys: Float32, positions: Int32, frequencies: Float32) -> Float32:
    """Keys rotated forward by their positions.

    keys: float32 (kv_heads, entries, head_dim); positions: int32 (entries,), negative ones rotate backward;
    frequencies: float32 (head_dim/2,), radians per position. A new array.
    """
    cosine, sine = angles(positions, frequencies)
    half = keys.shape[-1] // 2
    first, second = keys[..., :half], keys[..., half:]
    out = np.empty(keys.shape, dtype=np.float32)
    np.multiply(first, cosine, out=out[..., :half])
    out[..., :half] -= second * sine
    np.multiply(second, cosine, out=out[..., half:])
    out[..., half:] += first * sine
    return out


def unrotate(keys: Float32, positions: Int32, frequencies: Float32) -> Float32:
    """The inverse of rotate at the same positions, exact up to float32 rounding."""
    return rotate(keys, -positions, frequencies)
