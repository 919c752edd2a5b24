"""Slices as symbols and bytes: exact both ways, tightened and refined without the original."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import PayloadRejected
from edge_agent.kv import coded
from edge_agent.kv.transform import LEVELS
from tests.edge_agent.caches import made_up, shapes, transform_for

levels = st.integers(0, LEVELS - 1)


def same(one: coded.Symbols, other: coded.Symbols) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[layer], other[layer]) for layer in one)


@given(shapes, levels, st.data())
def test_symbols_come_back_from_bytes(shape: dict[str, int], level: int, data: st.DataObject) -> None:
    cache = made_up(**shape, scale=3.0)
    transform = transform_for(cache)
    layers = data.draw(st.lists(st.integers(0, shape["layers"] - 1), unique=True).map(sorted))
    symbols = coded.symbols_of(transform, level, cache, layers)
    packed = coded.pack(transform, level, symbols)
    assert same(coded.unpack(transform, level, packed, dict.fromkeys(layers, shape["entries"])), symbols)


def test_layers_may_have_different_numbers_of_entries() -> None:
    cache = made_up(layers=3, entries=9)
    transform = transform_for(cache)
    symbols = coded.symbols_of(transform, 3, cache, range(3))
    symbols = {0: symbols[0][:, :4], 2: symbols[2]}
    assert same(coded.unpack(transform, 3, coded.pack(transform, 3, symbols), {0: 4, 2: 9}), symbols)


@given(shapes, st.integers(0, LEVELS - 3), st.integers(1, 7))
def test_a_coarser_level_follows_from_a_finer_one_and_a_refinement_leads_back(
    shape: dict[str, int], level: int, doublings: int
) -> None:
    coarse = min(level + 2 * doublings, LEVELS - 2 + level % 2)
    cache = made_up(**shape, scale=2.0)
    transform = transform_for(cache)
    layers = range(shape["layers"])
    fine = coded.symbols_of(transform, level, cache, layers)
    held = coded.tightened(transform, fine, level, coarse)
    assert same(held, coded.symbols_of(transform, coarse, cache, layers))
    part = coded.pack_refinement(transform, fine, level, coarse)
    assert same(coded.refined(transform, held, coarse, part, level), fine)


def test_base_and_refinement_together_take_little_more_than_the_fine_level_alone() -> None:
    cache = made_up(layers=3, heads=3, entries=200, dim=6)
    transform = transform_for(cache)
    fine = coded.symbols_of(transform, 4, cache, range(3))
    base = coded.pack(transform, 8, coded.tightened(transform, fine, 4, 8))
    more = coded.pack_refinement(transform, fine, 4, 8)
    assert len(base) + len(more) < 1.08 * len(coded.pack(transform, 4, fine)) + 600


@pytest.mark.parametrize("to", [3, 5, 2])
def test_levels_that_do_not_follow_are_refused(to: int) -> None:
    cache = made_up()
    transform = transform_for(cache)
    with pytest.raises(ValueError, match="even number"):
        coded.tightened(transform, coded.symbols_of(transform, 4, cache, [0]), 4, to)


@given(st.binary(max_size=80))
def test_bytes_that_are_no_refinement_are_refused_or_symbols(data: bytes) -> None:
    cache = made_up()
    transform = transform_for(cache)
    held = coded.symbols_of(transform, 8, cache, range(2))
    try:
        found = coded.refined(transform, held, 8, data, 4)
    except PayloadRejected:
        return
    assert same(coded.tightened(transform, found, 4, 8), held)


def test_runs_are_bounded_by_exact_powers_of_two_of_the_variance() -> None:
    transform = transform_for(made_up(layers=1, heads=1, dim=4))
    edges = np.array([[8.0, np.nextafter(np.float32(8), np.float32(0)), 4.0, 2.0, 1.5, 1.4, 1.0, 0.9]], np.float32)
    runs = coded.runs(dataclasses.replace(transform, deviation=edges), 2)  # the step is 2
    # variances in squared steps: 16, just below it, 4, 1, 0.5625, 0.49, 0.25, 0.2025
    assert [run.parts for run in runs] == [
        ((0, 7, 8),), ((0, 5, 7),), ((0, 4, 5),), ((0, 3, 4),), ((0, 2, 3),), ((0, 1, 2),), ((0, 0, 1),)
    ]  # fmt: skip


def test_the_runs_of_a_level_hold_every_coded_component_once() -> None:
    transform = transform_for(made_up(layers=3))
    for level in range(LEVELS):
        seen = [(layer, at) for run in coded.runs(transform, level) for layer, a, b in run.parts for at in range(a, b)]
        wanted = [(layer, at) for layer in range(3) for at in range(transform.coded(layer, level))]
        assert sorted(seen) == wanted
