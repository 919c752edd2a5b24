"""A calibrated cache has the receiver's statistics, by the paper's formulas computed in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_agent.errors import CacheInvalid, CalibrationInvalid
from edge_agent.kv.cache import Cache, Layer
from edge_agent.kv.calibration import (
    Calibration,
    Float64,
    Kind,
    Moments,
    apply,
    kind_for,
    layers_by_depth,
    moments,
    pair,
)
from tests.edge_agent.caches import FINGERPRINT, equal, made_up, shapes, without

OTHER = "e" * 32
EPS = float(np.finfo(np.float32).eps)

sizes = st.integers(1, 12)
scales = st.sampled_from([1e-3, 1.0, 1e3])


def calibration(sender: Moments, receiver: Moments, kind: Kind | None = None) -> Calibration:
    return pair(sender, receiver, sender_fingerprint=OTHER, receiver_fingerprint=FINGERPRINT, kind=kind)


def moved(cache: Cache, by: float) -> Cache:
    """A cache whose keys and values lie about `by` and `-by`."""
    return Cache(tuple(Layer(x.keys + np.float32(by), x.values - np.float32(by), x.positions) for x in cache.layers))


def texts(*, count: int = 3, by: float = 2.0, **shape: Any) -> list[Cache]:
    """The caches of some texts, of different lengths."""
    seed = shape.pop("seed", 0)
    return [moved(made_up(entries=4 + index, seed=seed + index, **shape), by) for index in range(count)]


def vectors(caches: Sequence[Cache], layer: int) -> list[Float64]:
    """Keys and values of a layer over all caches, float64 (entries, kv_heads * head_dim) each, head after head."""
    found = []
    for kind in ("keys", "values"):
        parts = [getattr(cache.layers[layer], kind).astype(np.float64) for cache in caches]
        heads = np.concatenate(parts, axis=1)
        found.append(np.concatenate(list(heads), axis=-1))
    return found


def uneven(shape: dict[str, int]) -> Cache:
    """The cache of a strategy's shape, with means and deviations that differ between dimensions."""
    cache, rng = made_up(**shape), np.random.default_rng(shape["seed"])
    layers = []
    for layer in cache.layers:
        heads, _, dim = layer.keys.shape
        spread, offset = (rng.uniform(0.5, 5, (heads, 1, dim)).astype(np.float32) for _ in range(2))
        layers.append(Layer(layer.keys * spread + offset, layer.values * offset - spread, layer.positions))
    return Cache(tuple(layers))


@given(shapes, st.integers(1, 4), scales, st.sampled_from([0.0, 1.0, 1e4]))
@example({"layers": 1, "heads": 1, "entries": 20, "dim": 2, "seed": 0}, 4, 1.0, 1e5)  # E[x²] - μ² is lost in float32
def test_moments_are_those_of_all_entries_in_float64(
    shape: dict[str, int], count: int, scale: float, offset: float
) -> None:
    caches = [
        moved(made_up(**(shape | {"entries": shape["entries"] + index, "seed": index}), scale=scale), offset)
        for index in range(count)
    ]
    found = moments(iter(caches))
    for index in range(shape["layers"]):
        for kind, wide in enumerate(vectors(caches, index)):
            assert found.entries[index] == len(wide)
            np.testing.assert_allclose(found.mean[index, kind], wide.mean(axis=0), rtol=2 * EPS, atol=1e-6 * scale)
            np.testing.assert_allclose(
                found.deviation[index, kind], wide.std(axis=0), rtol=2 * EPS, atol=1e-12 * (scale + offset)
            )
    assert found.mean.dtype == found.deviation.dtype == np.float32


@given(shapes, st.integers(0, 20))
def test_moments_do_not_depend_on_how_a_text_is_cut(shape: dict[str, int], at: int) -> None:
    cache = uneven(shape)
    whole, parts = moments([cache]), moments([cache.between(0, at), cache.between(at, 20)])
    assert whole.entries == parts.entries
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(parts.deviation, whole.deviation, rtol=1e-6, atol=1e-6)


def test_a_constant_dimension_has_no_deviation_at_all() -> None:
    constant = np.full((1, 7, 2), 0.1, dtype=np.float32)
    cache = Cache((Layer(constant, -constant, np.arange(7, dtype=np.int32)),))
    found = moments([cache, cache.between(0, 3), cache])
    assert not found.deviation.any()
    assert np.array_equal(found.mean[0], np.array([[0.1, 0.1], [-0.1, -0.1]], dtype=np.float32))


def test_layers_without_entries_count_for_nothing() -> None:
    full = made_up(layers=3, entries=5)
    first, second = without(full, [range(5), range(5), ()]), without(full, [range(5), (1, 2), ()])
    found = moments([first, second])
    assert found.entries == (0, 3, 10)
    assert not found.mean[0].any()
    assert np.array_equal(found.mean[1], moments([second]).mean[1])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (made_up(layers=3), "a cache of 3 layers among caches of 2"),
        (made_up(heads=1), "layer 0 has 1 KV heads of 4 among caches with 2 of 4"),
        (made_up(dim=8), "layer 0 has 2 KV heads of 8"),
        (Cache(()), "a cache of 0 layers"),
        (moved(made_up(), np.nan), "layer 0: keys hold a NaN"),
    ],
)
def test_caches_that_disagree_are_refused(other: Cache, said: str) -> None:
    with pytest.raises(CacheInvalid, match=said):
        moments([made_up(), other])


@pytest.mark.parametrize("caches", [[], [Cache(())], [made_up(entries=0)]])
def test_no_entries_have_no_moments(caches: list[Cache]) -> None:
    with pytest.raises(CacheInvalid, match="no entries"):
        moments(caches)


@given(shapes, shapes, scales)
def test_per_dimension_the_calibrated_data_have_the_receivers_moments(
    sender: dict[str, int], receiver: dict[str, int], scale: float
) -> None:
    theirs = uneven(sender | {"entries": sender["entries"] + 1})
    ours = uneven(receiver | {"heads": sender["heads"], "dim": sender["dim"]})
    ours = Cache(tuple(Layer(x.keys * np.float32(scale), x.values, x.positions) for x in ours.layers))
    of_theirs, of_ours = moments([theirs]), moments([ours])
    found = calibration(of_theirs, of_ours)
    assert found.kind == "dimension"
    after = moments([apply(theirs, found)])
    source = list(found.layers)
    # rounding of x, scale and shift, in the receiver's units
    loss = 16 * EPS * (np.abs(of_theirs.mean[source]) + 5 * of_theirs.deviation[source]) * found.scale
    loss += 16 * EPS * (np.abs(of_ours.mean) + np.abs(found.shift))
    assert np.all(np.abs(after.mean - of_ours.mean) <= loss)
    assert np.all(np.abs(after.deviation - of_ours.deviation) <= loss + 16 * EPS * of_ours.deviation)


@given(shapes, shapes)
def test_by_scalars_the_averages_over_dimensions_are_the_receivers(
    sender: dict[str, int], receiver: dict[str, int]
) -> None:
    theirs = uneven(sender | {"entries": sender["entries"] + 1})
    ours = uneven(receiver | {"heads": sender["heads"], "dim": sender["dim"]})
    of_ours = moments([ours])
    found = calibration(moments([theirs]), of_ours, "scalar")
    assert found.scale.shape == (receiver["layers"], 2, 1)
    after = moments([apply(theirs, found)])
    np.testing.assert_allclose(after.mean.mean(-1), of_ours.mean.mean(-1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after.deviation.mean(-1), of_ours.deviation.mean(-1), rtol=1e-4, atol=1e-4)


@given(shapes)
def test_a_model_calibrated_with_itself_changes_nothing(shape: dict[str, int]) -> None:
    cache = uneven(shape | {"entries": shape["entries"] + 1})
    counted = moments([cache])
    for kind in ("dimension", "scalar"):
        back = apply(cache, calibration(counted, counted, kind))
        for one, other in zip(back.layers, cache.layers, strict=True):
            np.testing.assert_allclose(one.keys, other.keys, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(one.values, other.values, rtol=1e-5, atol=1e-5)


@given(shapes, shapes, st.sampled_from(["dimension", "scalar", None]))
@example({"layers": 3, "heads": 3, "entries": 4, "dim": 2, "seed": 0},
         {"layers": 2, "heads": 1, "entries": 4, "dim": 4, "seed": 1}, None)  # fmt: skip
@example({"layers": 1, "heads": 1, "entries": 4, "dim": 2, "seed": 0},
         {"layers": 3, "heads": 2, "entries": 4, "dim": 6, "seed": 1}, None)  # fmt: skip
@example({"layers": 2, "heads": 3, "entries": 1, "dim": 4, "seed": 114},
         {"layers": 2, "heads": 1, "entries": 2, "dim": 2, "seed": 0}, "dimension")  # fmt: skip
def test_apply_is_equation_11_in_float64_cut_or_filled_up_to_the_receivers_shape(
    sender: dict[str, int], receiver: dict[str, int], kind: Kind | None
) -> None:
    if kind == "dimension":
        receiver = receiver | {"heads": sender["heads"], "dim": sender["dim"]}
    theirs, ours = uneven(sender | {"entries": sender["entries"] + 1}), uneven(receiver)
    of_theirs, of_ours = moments([theirs]), moments([ours])
    found = calibration(of_theirs, of_ours, kind)
    after = apply(theirs, found)
    assert len(after.layers) == receiver["layers"]
    for index, source in enumerate(found.layers):
        assert after.layers[index].keys.shape == (receiver["heads"], sender["entries"] + 1, receiver["dim"])
        assert after.layers[index].keys.flags.c_contiguous
        assert after.layers[index].keys.dtype == after.layers[index].values.dtype == np.float32
        assert np.array_equal(after.layers[index].positions, theirs.layers[source].positions)
        xs, ys = vectors([theirs], source), vectors([ours], index)
        for got, x, y in zip(vectors([after], index), xs, ys, strict=True):
            # rounding of x and of the shift, in the receiver's units: much where the sender's hardly deviate
            loss = 16 * EPS * float(np.abs(x).max() * found.scale[index].max() + np.abs(found.shift[index]).max())
            np.testing.assert_allclose(got, by_the_paper(x, y, found.kind), rtol=1e-4, atol=1e-4 + loss)


def by_the_paper(x: Float64, y: Float64, kind: Kind) -> Float64:
    """Eqs. 9-11 as printed, then fitted. x: (entries, the sender's width), y: (entries, the receiver's width)."""
    (mean_s, deviation_s), (mean_r, deviation_r) = ((each.mean(axis=0), each.std(axis=0)) for each in (x, y))
    filled = np.tile(mean_r, (len(x), 1))
    if kind == "scalar":
        mean_s, deviation_s, mean_r, deviation_r = (each.mean() for each in (mean_s, deviation_s, mean_r, deviation_r))
    aligned = (x - mean_s) / deviation_s * deviation_r + mean_r
    filled[:, : x.shape[1]] = aligned[:, : y.shape[1]]
    return filled


def test_what_is_constant_at_the_sender_becomes_the_receivers_mean() -> None:
    theirs, ours = made_up(dim=2, heads=1), moments(texts(dim=2, heads=1))
    for layer in theirs.layers:
        layer.keys[..., 0] = 3.0
        layer.values[..., 1] = np.array([0, 0, 0, 0, 1e-45], dtype=np.float32)  # σ underflows, its scale would overflow
    found = calibration(moments([theirs]), ours)
    after = apply(theirs, found)
    for index, layer in enumerate(after.layers):
        assert np.all(layer.keys[0, :, 0] == ours.mean[index, 0, 0])
        assert np.all(layer.values[0, :, 1] == ours.mean[index, 1, 1])
        assert layer.keys[0, :, 1].std() > 0


def test_layers_without_entries_give_layers_without_entries() -> None:
    theirs, ours = moments(texts(layers=3)), moments(texts(layers=6, heads=1))
    sent = without(made_up(layers=3, entries=5), [(), range(5), (0, 2)])
    after = apply(sent, calibration(theirs, ours))
    assert [layer.entries for layer in after.layers] == [5, 5, 0, 0, 3, 3]
    assert after.layers[5].positions.tolist() == [1, 3, 4]
    assert after.layers[2].keys.shape == (1, 0, 4)


@given(sizes, sizes)
def test_layers_go_by_depth_from_first_to_first_to_last_to_last(sender: int, receiver: int) -> None:
    found = layers_by_depth(sender, receiver)
    assert len(found) == receiver
    assert found[0] == 0
    assert receiver == 1 or found[-1] == sender - 1
    assert list(found) == sorted(found)
    for index, layer in enumerate(found):
        assert receiver == 1 or abs(layer - index * (sender - 1) / (receiver - 1)) <= 0.5
    if sender == receiver:
        assert found == tuple(range(sender))


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        (made_up(layers=3), "a cache of 3 layers, calibrated is a sender of 2"),
        (made_up(heads=4), "layer 0 has 4 KV heads of 4, calibrated is a sender with 2 of 4"),
        (made_up(dim=2), "layer 0 has 2 KV heads of 2"),
        (moved(made_up(), np.inf), "layer 0: keys hold a NaN or an infinity"),
        (moved(made_up(), 3e38), "layer 0: keys hold a NaN or an infinity"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_by_name(cache: Cache, said: str) -> None:
    found = calibration(moments(texts()), moments(texts(seed=9)))
    with pytest.raises(CacheInvalid, match=said):
        apply(cache, replace(found, scale=found.scale + np.float32(5)))


def test_kinds_follow_the_shapes_unless_one_is_asked_for() -> None:
    one, same = moments(texts()).side(OTHER), moments(texts(layers=5)).side(FINGERPRINT)
    split = moments(texts(heads=4, dim=2)).side(FINGERPRINT)
    assert kind_for(one, same) == kind_for(one, same, "dimension") == "dimension"
    assert kind_for(one, same, "scalar") == kind_for(one, split) == kind_for(one, split, "scalar") == "scalar"
    assert one.width == split.width
    with pytest.raises(CalibrationInvalid, match="the sender has 2 KV heads of 4, the receiver 4 of 2"):
        kind_for(one, split, "dimension")


def test_a_layer_of_which_nothing_is_known_is_refused() -> None:
    known, partly = moments(texts()), moments([without(made_up(), [(), range(5)])])
    for sides, said in (((partly, known), "sender's layer 1"), ((known, partly), "receiver's layer 1")):
        with pytest.raises(CalibrationInvalid, match=f"no entries of the {said}"):
            calibration(*sides)


def test_a_senders_layer_that_feeds_none_need_not_be_known() -> None:
    partly = moments([without(made_up(layers=3), [(), range(5), ()])])
    assert calibration(partly, moments(texts())).layers == (0, 2)


def test_calibration_leaves_the_senders_cache_as_it_was() -> None:
    cache = made_up()
    apply(cache, calibration(moments(texts()), moments(texts(seed=5))))
    assert equal(cache, made_up())
