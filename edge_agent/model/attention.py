"""How much attention the last tokens pay to each entry of a cache (methods.md 1 and 3: scores of tokens and layers)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_agent.kv.cache import Float32, Int32
from edge_agent.model.signature import LAST_QUERIES


def among_the_last(tokens_to_come: int) -> bool:
    """Whether queries of a run are still kept once so many tokens more are read."""
    return tokens_to_come < LAST_QUERIES


@dataclass(frozen=True, eq=False)
class Queries:
    """Rotated queries of the last tokens read: for each layer float32 (queries, query_heads · head_dim)."""

    positions: Int32
    layers: tuple[Float32, ...]

    @classmethod
    def after(cls, before: Queries | None, positions: Int32, layers: Sequence[Float32]) -> Queries:
        """The last LAST_QUERIES of those kept so far and those of a run over tokens at `positions`."""
        fresh = positions[-layers[0].shape[0] :]
        if before is None or len(fresh) >= LAST_QUERIES or before.positions[-1] + 1 != fresh[0]:
            return cls(fresh, tuple(layers))
        both = zip(before.layers, layers, strict=True)
        return cls(
            np.concatenate([before.positions, fresh])[-LAST_QUERIES:],
            tuple(np.concatenate([old, new])[-LAST_QUERIES:] for old, new in both),
        )

    def before(self, position: int) -> Queries | None:
        """Those of tokens before a position; None if there are none."""
        kept = int(np.searchsorted(self.positions, position))
        return Queries(self.positions[:kept], tuple(rows[:kept] for rows in self.layers)) if kept else None


def attention_mass(
    queries: Float32, at: Int32, keys: Float32, positions: Int32, *, scale: float, window: int | None
) -> Float32:
    """Share of attention on each entry: float32 (kv_heads, entries), each row summing to one.

    queries: rotated, float32 (queries, query_heads · head_dim), of tokens at positions `at`; keys: rotated, float32
    (kv_heads, entries, head_dim), at `positions`, (entries,) or (kv_heads, entries). A token sees entries up to its own
    position, and of a layer with a sliding window those less than `window` positions back. The mean over queries and
    the query heads of a KV head.
    """
    kv_heads, entries, head_dim = keys.shape
    count = len(at)
    group = queries.shape[1] // (kv_heads * head_dim)
    stacked = queries.reshape(count, kv_heads, group, head_dim).transpose(1, 2, 0, 3) * np.float32(scale)
    scores = (stacked.reshape(kv_heads, group * count, head_dim) @ keys.transpose(0, 2, 1)).reshape(
        kv_heads, group, count, entries
    )
    back = at[:, None] - np.atleast_2d(positions)[:, None]
    hidden = back < 0 if window is None else (back < 0) | (back >= window)
    scores += np.where(hidden, np.float32(-np.inf), np.float32(0))[:, None]
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    mass: Float32 = scores.mean(axis=(1, 2))
    return mass
