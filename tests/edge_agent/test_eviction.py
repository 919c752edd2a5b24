"""Evicted entries are those with least attention, sinks apart; backfill is the paper's formula in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import CacheInvalid, RecipeInvalid
from edge_agent.kv.backfill import RANKS, backfilled
from edge_agent.kv.cache import Cache, Layer
from edge_agent.kv.evicted import Eviction, evicted
from edge_agent.kv.eviction import By, kept_entries, taken
from edge_agent.kv.selection import SINK_TOKENS

BOTH = pytest.mark.parametrize("by", ["layer", "head"])


def layer_of(heads: int = 2, entries: int = 30, dim: int = 8, *, seed: int = 0, first: int = 0) -> Layer:
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, heads, entries, dim)).astype(np.float32)
    mass = rng.dirichlet(np.full(entries, 0.3), heads).astype(np.float32)
    return Layer(keys, values, np.arange(first, first + entries, dtype=np.int32), mass)


layers = st.builds(
    layer_of, st.integers(1, 3), st.integers(1, 40), st.sampled_from([2, 6, 16]),
    seed=st.integers(0, 999), first=st.sampled_from([0, 2, 50]),
)  # fmt: skip


def rows(layer: Layer, by: By) -> list[np.ndarray]:
    assert layer.mass is not None
    return [layer.mass.sum(axis=0)] if by == "layer" else list(layer.mass)


@given(layers, st.floats(0, 1), st.sampled_from(["layer", "head"]))
def test_sinks_and_the_most_attended_stay_in_order(layer: Layer, share: float, by: By) -> None:
    kept = np.atleast_2d(kept_entries(layer, share, by))
    sinks = np.flatnonzero(layer.positions < SINK_TOKENS)
    others = layer.entries - len(sinks)
    for places, mass in zip(kept, rows(layer, by), strict=True):
        assert len(places) == len(sinks) + min(others, max(1, round(share * others)))
        assert (np.diff(places) > 0).all()
        assert set(sinks) <= set(places)
        left = np.setdiff1d(np.arange(layer.entries), places)
        chosen = np.setdiff1d(places, sinks)
        if len(left) and len(chosen):
            assert mass[left].max() <= mass[chosen].min()


@BOTH
def test_all_or_nearly_nothing(by: By) -> None:
    layer = layer_of(entries=12)
    assert np.atleast_2d(kept_entries(layer, 1.0, by)).shape[1] == 12
    assert np.atleast_2d(kept_entries(layer, 0.0, by)).shape[1] == SINK_TOKENS + 1


def test_heads_keep_what_they_attend_to() -> None:
    layer = layer_of(heads=3)
    places = kept_entries(layer, 0.3, "head")
    assert places.shape[0] == 3
    assert len({tuple(row) for row in places}) > 1
    for head in range(3):
        assert np.array_equal(taken(layer.values, places)[head], layer.values[head, places[head]])
        assert np.array_equal(taken(layer.mass, places)[head], layer.mass[head, places[head]])  # type: ignore[arg-type, index]


def test_what_makes_no_sense_is_refused() -> None:
    layer = layer_of()
    bare = replace(layer, mass=None)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(RecipeInvalid, match="must be 0 to 1"):
            kept_entries(layer, share, "layer")
    with pytest.raises(CacheInvalid, match="attention mass"):
        kept_entries(bare, 0.5, "head")
    with pytest.raises(CacheInvalid, match="attention mass"):
        backfilled(bare, np.arange(3), 2)
    with pytest.raises(RecipeInvalid, match="rank 0"):
        backfilled(layer, np.arange(3), 0)


def by_formula(layer: Layer, kept: np.ndarray, rank: int) -> np.ndarray:
    """methods.md 3 written out, in float64, by least squares and a whole decomposition."""
    assert layer.mass is not None
    found = []
    for head, places in enumerate(np.broadcast_to(kept, (layer.keys.shape[0], kept.shape[-1]))):
        gone = np.setdiff1d(np.arange(layer.entries), places)
        x, y = layer.values[head, places].astype(float), layer.values[head, gone].astype(float)
        r = y - (np.linalg.lstsq(x.T, y.T, rcond=None)[0].T @ x)
        w = layer.mass[head, gone].astype(float)
        c = np.linalg.svd(r)[2][:rank]
        mean = (w / w.sum()) @ r
        delta = (mean @ c.T) @ c * (w.sum() / layer.mass[head, places].astype(float).sum())
        found.append(x + np.where(layer.positions[places] >= SINK_TOKENS, 1.0, 0.0)[:, None] * delta)
    return np.stack(found)


@BOTH
@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_backfill_is_the_formula(by: By, dim: int, share: float) -> None:
    layer = layer_of(entries=100, dim=dim, seed=dim)
    kept = kept_entries(layer, share, by)
    expected = by_formula(layer, kept, RANKS[by])
    exact = backfilled(layer, kept, RANKS[by], exact=True)
    np.testing.assert_allclose(exact, expected, atol=2e-6)
    before = taken(layer.values, kept)
    added, wanted = backfilled(layer, kept, RANKS[by]) - before, expected - before
    # directions of nearly equal strength may turn into each other; what matters is what is added
    assert np.linalg.norm(added - wanted) <= 0.25 * np.linalg.norm(wanted) + 1e-6


@BOTH
def test_a_clear_direction_is_found_by_the_fast_path_too(by: By) -> None:
    layer = layer_of(entries=120, dim=32, seed=4)
    strong = np.random.default_rng(9).standard_normal((3, 32))
    pulls = np.random.default_rng(8).standard_normal((2, 120, 3)) * [9.0, 6.0, 4.0]
    layer = replace(layer, values=(0.1 * layer.values + pulls @ strong).astype(np.float32))
    kept = kept_entries(layer, 0.0, by)[..., :2]  # too few to span the three
    exact, fast = (backfilled(layer, kept, 2, exact=exact) for exact in (True, False))
    np.testing.assert_allclose(fast, exact, rtol=1e-3, atol=1e-4)


@BOTH
def test_values_that_span_the_head_are_left_as_they_are(by: By) -> None:
    layer = layer_of(entries=60, dim=8)
    kept = kept_entries(layer, 0.5, by)
    np.testing.assert_allclose(backfilled(layer, kept, 4), taken(layer.values, kept), atol=1e-6)


@given(layers, st.floats(0, 1), st.sampled_from(["layer", "head"]), st.integers(1, 5), st.booleans())
def test_keys_sinks_and_the_layer_itself_never_change(
    layer: Layer, share: float, by: By, rank: int, exact: bool
) -> None:
    before = layer.values.copy()
    kept = kept_entries(layer, share, by)
    filled = backfilled(layer, kept, rank, exact=exact)
    assert np.isfinite(filled).all()
    assert np.array_equal(layer.values, before)
    plain = taken(layer.values, kept)
    for head, places in enumerate(np.broadcast_to(kept, (layer.keys.shape[0], kept.shape[-1]))):
        sinks = layer.positions[places] < SINK_TOKENS
        assert np.array_equal(filled[head, sinks], plain[head, sinks])


@pytest.mark.parametrize("rank", [0, 2])
@BOTH
def test_a_cache_is_evicted_layer_by_layer(by: By, rank: int) -> None:
    cache = Cache((layer_of(), layer_of(seed=1), layer_of(entries=0)))
    less = evicted(cache, Eviction(0.5, by, rank))
    for old, new in zip(cache.layers[:2], less.layers[:2], strict=True):
        kept = kept_entries(old, 0.5, by)
        assert np.array_equal(new.positions, old.positions[kept])
        assert np.array_equal(new.keys, taken(old.keys, kept))
        assert np.array_equal(new.values, backfilled(old, kept, rank) if rank else taken(old.values, kept))
        assert new.mass is None
    assert less.layers[2].entries == 0
    less.check()


@pytest.mark.parametrize(("share", "rank"), [(0.0, 0), (1.0, 0), (0.5, -1)])
def test_an_eviction_that_makes_no_sense_is_refused(share: float, rank: int) -> None:
    with pytest.raises(RecipeInvalid):
        Eviction(share, "layer", rank)
