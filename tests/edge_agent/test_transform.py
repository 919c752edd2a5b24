"""The transform: embedded quantization, its inverse, and what a damaged file of it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import BundleInvalid, CacheInvalid
from edge_agent.kv.cache import Layer
from edge_agent.kv.transform import DROPPED, LEVELS, Transform, coarser, quantize, step_of
from tests.edge_agent.caches import made_up, shapes, transform_for

levels = st.integers(0, LEVELS - 1)
components = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50)


def symbols(values: list[float], level: int) -> np.ndarray:
    return quantize(np.array(values, dtype=np.float32), level)


@given(components, levels, levels)
def test_tightening_gives_the_very_symbols_of_coding_at_that_level(values: list[float], level: int, more: int) -> None:
    to = level + 2 * more
    assert np.array_equal(coarser(symbols(values, level), 2 * more), symbols(values, to))


@given(components, levels)
def test_symbols_are_the_formulas(values: list[float], level: int) -> None:
    scaled = np.abs(np.array(values, dtype=np.float64))
    if level % 2:
        scaled = (np.array(values, dtype=np.float32) * np.float32(2**-0.5)).astype(np.float64)
    magnitude = np.floor((np.abs(scaled) + 0.5) / 2 ** (level // 2))
    found = symbols(values, level)
    # float32 rounds what lies within its last digit of an edge to either side
    assert (np.abs(np.abs(found) - magnitude) <= (np.abs(scaled) > 2**20) + 0).all() or np.allclose(
        np.abs(found), magnitude, rtol=1e-6, atol=1
    )
    assert (found * np.sign(values) >= 0).all()


@pytest.mark.parametrize("levels_more", [1, 3, -2])
def test_only_levels_of_one_parity_follow_from_each_other(levels_more: int) -> None:
    with pytest.raises(ValueError, match="even number"):
        coarser(np.zeros(3, dtype=np.int32), levels_more)


@given(shapes, levels)
def test_entries_come_back_within_their_intervals(shape: dict[str, int], level: int) -> None:
    cache = made_up(**shape)
    transform = transform_for(cache)
    for index, layer in enumerate(cache.layers):
        found = transform.symbols(index, layer, level)
        assert found.shape == (transform.coded(index, level), layer.entries)
        keys, values = transform.entries(index, found, level, layer.keys.shape[0])
        assert keys.shape == values.shape == layer.keys.shape
        again = transform.symbols(index, Layer(keys, values, layer.positions), level)
        assert (np.abs(again - found) <= 1).all()


def test_the_finest_level_is_near_and_each_coarser_one_further() -> None:
    cache = made_up(layers=1, entries=40, dim=6)
    transform, layer = transform_for(cache, finest=2e-4), cache.layers[0]
    errors = []
    for level in range(0, LEVELS, 2):
        keys, values = transform.entries(0, transform.symbols(0, layer, level), level, 2)
        errors.append(float(np.square(keys - layer.keys).mean() + np.square(values - layer.values).mean()))
    assert errors == sorted(errors)
    assert errors[0] < 1e-3


def test_components_of_little_deviation_are_not_coded() -> None:
    transform = transform_for(made_up())
    for level in range(LEVELS):
        count = transform.coded(0, level)
        steps = transform.deviation[0].astype(np.float64) / step_of(level)
        assert (steps[:count] >= DROPPED * (1 - 1e-12)).all()
        assert (steps[count:] < DROPPED * (1 + 1e-12)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    cache = made_up()
    transform, layer = transform_for(cache), cache.layers[0]
    layer.values[0, 0, 0] = bad
    with pytest.raises(CacheInvalid, match="NaN or an infinity"):
        transform.symbols(0, layer, 4)


def test_a_huge_entry_is_cut_and_stays_finite() -> None:
    cache = made_up()
    transform, layer = transform_for(cache), cache.layers[0]
    layer.values[0, 0, 0] = 1e30
    found = transform.symbols(0, layer, 0)
    assert np.abs(found).max() <= 2**30
    assert all(np.isfinite(array).all() for array in transform.entries(0, found, 0, 2))


def test_another_shape_is_refused() -> None:
    with pytest.raises(CacheInvalid, match="the transform is for 16"):
        transform_for(made_up(dim=4)).symbols(0, made_up(dim=6).layers[0], 2)


def test_it_comes_back_from_its_file_with_its_id(tmp_path: Path) -> None:
    transform = transform_for(made_up())
    transform.save(tmp_path / "t.npz")
    assert Transform.load(tmp_path / "t.npz").id == transform.id
    assert transform_for(made_up(), seed=1).id != transform.id


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mean": np.zeros((2, 15), np.float32)}, "scale is float32"),
        ({"scale": np.full((2, 16), np.nan, np.float32)}, "scale holds a NaN"),
        ({"deviation": np.zeros((2, 16), np.float32)}, "do not fall"),
        ({"deviation": np.tile(np.arange(1, 17), (2, 1)).astype(np.float32)}, "do not fall"),
    ],
)
def test_a_file_that_is_no_transform_is_refused(tmp_path: Path, change: dict[str, np.ndarray], says: str) -> None:
    replace(transform_for(made_up()), **change).save(tmp_path / "t.npz")
    with pytest.raises(BundleInvalid, match=says):
        Transform.load(tmp_path / "t.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"no zip at all"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.npz").write_bytes(content)
    with pytest.raises(BundleInvalid, match="is no transform"):
        Transform.load(tmp_path / "t.npz")
    with pytest.raises(BundleInvalid, match="is no transform"):
        Transform.load(tmp_path / "nowhere.npz")
