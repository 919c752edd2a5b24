"""Which entries of a layer are kept when a cache is to be smaller: those that got most attention (methods.md 3).

L keeps one set of tokens a layer, by the attention of all its heads together; H keeps a set for each KV head. The first
tokens of a context, on which attention rests whatever they say, are always kept. Order is kept.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from edge_agent.errors import CacheInvalid, RecipeInvalid
from edge_agent.kv.cache import Float32, Layer
from edge_agent.kv.selection import SINK_TOKENS

Places = npt.NDArray[np.intp]
By = Literal["layer", "head"]


def kept_entries(layer: Layer, share: float, by: By) -> Places:
    """Places of the entries that are kept, rising: intp (kept,) by layer, (kv_heads, kept) by head.

    share: of the entries that are no sinks, 0-1; round(share · them), but at least one where there are any. Ties: the
    earlier. Raises RecipeInvalid for another share, CacheInvalid for a layer without attention mass.
    """
    if not 0 <= share <= 1:
        raise RecipeInvalid(f"{share:g} of the entries: must be 0 to 1")
    if layer.mass is None:
        raise CacheInvalid("a layer's attention mass was not kept, entries can't be chosen by it")
    mass = layer.mass.sum(axis=0, keepdims=True) if by == "layer" else layer.mass
    sinks = layer.positions < SINK_TOKENS
    others = int(np.count_nonzero(~sinks))
    count = len(sinks) - others + min(others, max(1, round(share * others)))
    ranked = np.where(sinks, np.float32(np.inf), mass)
    best = np.argsort(-ranked, axis=1, kind="stable")[:, :count]
    places: Places = np.sort(best, axis=1)
    return places[0] if by == "layer" else places


def taken(array: Float32, places: Places) -> Float32:
    """What an array (kv_heads, entries, …) has at places (kept,), or (kv_heads, kept) that differ by head."""
    if places.ndim == 1:
        return array[:, places]
    return np.take_along_axis(array, places.reshape(*places.shape, *[1] * (array.ndim - 2)), axis=1)
