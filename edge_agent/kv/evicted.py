"""A cache with fewer entries: the most attended are kept, and their values filled with what the others held."""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.errors import RecipeInvalid
from edge_agent.kv.backfill import backfilled
from edge_agent.kv.cache import Cache, Layer
from edge_agent.kv.eviction import By, kept_entries, taken


@dataclass(frozen=True)
class Eviction:
    """share of the entries is kept (0-1), chosen for a layer or for each of its heads; rank: of the backfill, 0: none.

    Raises RecipeInvalid for a share or a rank that makes no sense.
    """

    share: float
    by: By
    rank: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise RecipeInvalid(f"{self.share:g} of the entries: must be above 0 and below 1")
        if self.rank < 0:
            raise RecipeInvalid(f"backfill of rank {self.rank}: must be 0 or more")


def evicted(cache: Cache, eviction: Eviction) -> Cache:
    """The cache with the entries that are kept, without attention mass; as many in every layer and head.

    Raises CacheInvalid for a layer without attention mass.
    """
    return Cache(tuple(_evicted(layer, eviction) for layer in cache.layers))


def _evicted(layer: Layer, eviction: Eviction) -> Layer:
    if not layer.entries:
        return layer
    places = kept_entries(layer, eviction.share, eviction.by)
    values = backfilled(layer, places, eviction.rank) if eviction.rank else taken(layer.values, places)
    return Layer(taken(layer.keys, places), values, layer.positions[places])
