"""Slices, joins and moves of caches are exact."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import CacheInvalid
from edge_agent.kv.cache import Cache, Layer, concatenate
from edge_agent.model.rotary import rotate, unrotate
from tests.edge_agent.caches import equal, made_up, shapes

FREQUENCIES = (1.0 / 10_000 ** (np.arange(0, 64, 2, dtype=np.float32) / 64)).astype(np.float32)


@given(shapes, st.data())
def test_split_and_joined_is_the_whole(shape: dict[str, int], data: st.DataObject) -> None:
    cache = made_up(**shape)
    entries = shape["entries"]
    cuts = sorted(data.draw(st.lists(st.integers(0, entries), max_size=4)))
    edges = [0, *cuts, entries]
    parts = [cache.between(a, b) for a, b in itertools.pairwise(edges)]
    assert equal(concatenate(parts), cache)


def test_parts_out_of_order_are_refused() -> None:
    cache = made_up(entries=4)
    with pytest.raises(CacheInvalid, match="out of order"):
        concatenate([cache.between(2, 4), cache.between(0, 2)])


def by_head(entries: int = 3, first: int = 0) -> Layer:
    keys = np.zeros((2, entries, 4), dtype=np.float32)
    positions = np.arange(first, first + 2 * entries, dtype=np.int32).reshape(entries, 2).T
    return Layer(keys, keys, np.ascontiguousarray(positions))


def test_heads_may_hold_entries_of_different_tokens() -> None:
    cache = Cache((by_head(),))
    cache.check()
    assert (cache.entries, cache.part(1, 3).layers[0].positions.tolist()) == (3, [[2, 4], [3, 5]])
    with pytest.raises(CacheInvalid, match="can't be parted by position"):
        cache.between(0, 2)
    own = made_up(layers=1, entries=2)
    joined = concatenate([own, Cache((by_head(first=2),))])
    assert joined.layers[0].positions.tolist() == [[0, 1, 2, 4, 6], [0, 1, 3, 5, 7]]
    with pytest.raises(CacheInvalid, match="overlap"):
        concatenate([own, Cache((by_head(first=1),))])
    with pytest.raises(CacheInvalid, match=r"positions \(3, 3\) of keys"):
        Cache((Layer(by_head().keys, by_head().values, np.zeros((3, 3), dtype=np.int32)),)).check()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_check_names_the_layer_that_holds_a_nan(poison: float) -> None:
    cache = made_up()
    cache.layers[1].keys[0, 0, 0] = poison
    with pytest.raises(CacheInvalid, match="layer 1: keys"):
        cache.check()


def test_check_refuses_positions_that_do_not_rise() -> None:
    layer = made_up(layers=1).layers[0]
    with pytest.raises(CacheInvalid, match="do not rise"):
        Cache((Layer(layer.keys, layer.values, layer.positions[::-1]),)).check()


@given(st.integers(0, 8_000), st.integers(0, 2**16))
def test_phase_taken_off_and_put_back_leaves_rounding_only(start: int, seed: int) -> None:
    keys = np.random.default_rng(seed).standard_normal((2, 5, 64)).astype(np.float32)
    positions = np.arange(start, start + 5, dtype=np.int32)
    assert np.abs(rotate(unrotate(keys, positions, FREQUENCIES), positions, FREQUENCIES) - keys).max() < 1e-5


@given(st.integers(0, 4_000), st.integers(0, 4_000), st.integers(0, 2**16))
def test_a_move_is_the_rotation_by_the_difference(start: int, landing: int, seed: int) -> None:
    keys = np.random.default_rng(seed).standard_normal((1, 3, 64)).astype(np.float32)
    here = np.arange(start, start + 3, dtype=np.int32)
    there = np.arange(landing, landing + 3, dtype=np.int32)
    moved = rotate(unrotate(rotate(keys, here, FREQUENCIES), here, FREQUENCIES), there, FREQUENCIES)
    angles = there[:, None].astype(np.float64) * FREQUENCIES.astype(np.float64)
    a, b = keys[..., :32].astype(np.float64), keys[..., 32:].astype(np.float64)
    exact = np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1)
    assert np.abs(moved - exact).max() < 2e-3  # float32 angles, as the exported graphs have them
