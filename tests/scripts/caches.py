"""Caches of random numbers, for what codes them without a model."""

from __future__ import annotations

import numpy as np

from edge_agent.kv.cache import Cache, Float32
from scripts.peers.method import assembled


def random_tensor(seed: int, heads: int = 2, tokens: int = 64, channels: int = 32) -> Float32:
    """Normal numbers around `seed`, float32 (heads, tokens, channels)."""
    made = np.random.default_rng(seed).normal(scale=3, size=(heads, tokens, channels)) + seed
    return made.astype(np.float32)


def random_cache(seed: int = 0, layers: int = 2, **shape: int) -> Cache:
    """Such tensors as the keys and values of a cache, of tokens at positions from 0 on."""
    return assembled([random_tensor(seed + at, **shape) for at in range(2 * layers)])
