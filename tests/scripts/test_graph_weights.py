"""Weights in fewer bits: what is packed, what onnxruntime makes of it, and which form a product takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scripts.prepare_model.graph import weights as quantized
from scripts.prepare_model.graph.editing import Graph
from scripts.prepare_model.graph.weights import (
    BLOCK,
    ROWS_LIMIT,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
)
from tests.scripts.graphs import Array, graph_of, kinds, node, normal, run

Float32 = NDArray[np.float32]
FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64

QUICK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
SHAPES = st.tuples(st.sampled_from([1, 16, 31, 32, 33, 72, 96, 130, 160]), st.sampled_from([1, 2, 5, 16, 48]))
SIZES = st.sampled_from([1e-6, 1e-2, 1.0, 1e3])


def dequantize(values: Array, scales: Float32, zeros: Array | None, inputs: int) -> Float32:
    """What a packing says, in numpy: float32 (inputs, outputs)."""
    outputs, blocks = scales.shape
    if zeros is None:
        whole = values.astype(np.float32) - 128
    else:
        whole = np.stack([values & 15, values >> 4], axis=-1).reshape(outputs, blocks, BLOCK).astype(np.float32)
        each = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(outputs, -1)[:, :blocks]
        whole -= each[..., None]
    return (whole * scales[..., None]).reshape(outputs, -1)[:, :inputs].T.astype(np.float32)


@given(shape=SHAPES, bits=st.sampled_from([4, 8]), size=SIZES, seed=st.integers(0, 99))
def test_blocks_are_as_near_as_rounding_between_their_ends_allows(
    shape: tuple[int, int], bits: int, size: float, seed: int
) -> None:
    weights = (normal(*shape, seed=seed) * np.float32(size)).astype(np.float32)
    values, scales, zeros = quantize_blocks(weights, bits)
    blocks = -(-shape[0] // BLOCK)
    assert values.shape == (shape[1], blocks, BLOCK * bits // 8)
    assert values.dtype == np.uint8
    assert scales.shape == (shape[1], blocks)
    assert (zeros is None) == (bits == 8)
    if zeros is not None:
        assert zeros.shape == (shape[1], (blocks + 1) // 2)
        assert zeros.dtype == np.uint8
    error = np.square(dequantize(values, scales, zeros, shape[0]) - weights)
    if bits == 8:
        step = scales.repeat(BLOCK, axis=1)[:, : shape[0]].T
        assert (error <= np.square(step * 0.501)).all()
    else:  # no block is farther off than with a span from its least to its largest
        for start in range(0, shape[0], BLOCK):
            plain = np.square(_plain_four_bits(weights[start : start + BLOCK]) - weights[start : start + BLOCK])
            assert (error[start : start + BLOCK].sum(0) <= plain.sum(0) * 1.001 + 1e-16).all()


def _plain_four_bits(block: Float32) -> Float32:
    """Sixteen values at equal distances from the least (or zero) to the largest (or zero) of each output."""
    low, high = np.minimum(block.min(0), 0), np.maximum(block.max(0), 0)
    scale = np.maximum((high - low) / 15, np.float32(1e-8))
    zero = np.rint(-low / scale)
    rounded: Float32 = (np.clip(np.rint(block / scale) + zero, 0, 15) - zero) * scale
    return rounded


@given(shape=SHAPES, value=st.sampled_from([0.0, 1.0, -3.5, 1e-12, 1e15]), bits=st.sampled_from([4, 8]))
def test_constant_and_zero_weights_come_back_and_nothing_is_nan(
    shape: tuple[int, int], value: float, bits: int
) -> None:
    weights = np.full(shape, value, dtype=np.float32)
    with np.errstate(all="raise", under="ignore"):
        values, scales, zeros = quantize_blocks(weights, bits)
    found = dequantize(values, scales, zeros, shape[0])
    np.testing.assert_allclose(found, weights, rtol=1e-2, atol=1e-8)
    assert np.isfinite(found).all()


@given(shape=SHAPES, bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
@QUICK
def test_onnxruntime_multiplies_with_what_the_packing_says(
    shape: tuple[int, int], bits: int, seed: int, tmp_path: Path
) -> None:
    """Its own rounding of activations, to 8 bits in blocks, is taken out by activations that 8 bits hold."""
    inputs, outputs = shape
    graph = graph_of([], {}, ["y"], inputs={"x": (FLOAT, ["t", inputs])})
    weights = normal(inputs, outputs, seed=seed)
    graph.nodes = [quantized._blocks(graph, "x", weights, "y", bits)]
    graph.reindex()
    x = np.random.default_rng(seed).integers(-127, 128, size=(3, inputs)).astype(np.float32)
    x[:, ::BLOCK] = 127
    exact = x.astype(np.float64) @ dequantize(*quantize_blocks(weights, bits), inputs)
    found = run(graph, tmp_path, {"x": x})[0]
    np.testing.assert_allclose(found, exact, atol=1e-4 * np.abs(x @ np.abs(weights)).max() + 1e-3)


@given(shape=SHAPES, size=SIZES, seed=st.integers(0, 99))
def test_columns_and_rows_are_off_by_half_a_step_at_most(shape: tuple[int, int], size: float, seed: int) -> None:
    weights = normal(*shape, seed=seed) * np.float32(size)
    values, scales = quantize_columns(weights)
    assert values.dtype == np.int8
    assert scales.shape == (shape[1],)
    assert (np.abs(values * scales - weights) <= scales * 0.501).all()
    rows = quantize_rows(weights)
    assert (np.abs(rows - weights) <= np.maximum(np.abs(weights).max(-1, keepdims=True) / 127, 1e-8) * 0.501).all()


@pytest.mark.parametrize("value", [0.0, 1e-30, 5.0])
def test_columns_and_rows_of_equal_values_are_finite(value: float) -> None:
    same = np.full((5, 7), value, dtype=np.float32)
    with np.errstate(all="raise", under="ignore"):
        values, scales = quantize_columns(same)
        rows = quantize_rows(same)
    np.testing.assert_allclose(values * scales, same, atol=1e-8, rtol=1e-6)
    np.testing.assert_allclose(rows, same, atol=1e-8, rtol=1e-6)


CHANNELS = 64


def _layer(*, foldable: bool = True) -> Graph:
    """Embedding, norm, two products of one activation, a third of what they give, and the head."""
    nodes = [
        node("Gather", ["table", "input_ids"], "embedded"),
        node("SimplifiedLayerNormalization", ["embedded", "gain"], "normed", axis=-1, epsilon=1e-6),
        node("MatMul", ["normed", "w1"], "a"),
        node("MatMul", ["normed", "w2"], "b"),
        node("Mul", ["a", "b"], "ab"),
        node("MatMul", ["ab", "w3"], "c"),
        node("MatMul", ["c", "head"], "logits"),
    ]
    if not foldable:
        nodes.insert(6, node("Add", ["normed", "c"], "again"))
        nodes[-1].input[0] = "again"
    weights: dict[str, Array] = {
        "table": normal(50, CHANNELS),
        "gain": 1 + normal(CHANNELS, seed=1) / 4,
        "w1": normal(CHANNELS, 48, seed=2),
        "w2": normal(CHANNELS, 48, seed=3),
        "w3": normal(48, CHANNELS, seed=4),
        "head": normal(CHANNELS, 50, seed=5),
    }
    graph = graph_of(nodes, weights, ["logits"], inputs={"input_ids": (INT64, [1, "t"])})
    graph.inputs["logit_rows"] = onnx.helper.make_tensor_value_info("logit_rows", INT64, ["rows"])
    return graph


IDS = np.arange(50, dtype=np.int64)[None]
FEEDS = {"input_ids": IDS, "logit_rows": np.zeros(1, dtype=np.int64)}


def _samples(graph: Graph, directory: Path) -> dict[str, Float32]:
    names = [site.activation for site in quantized.sites(graph)]
    with graph.kept():
        graph.outputs |= {name: onnx.helper.make_tensor_value_info(name, FLOAT, None) for name in names}
        found = run(graph, directory, FEEDS)
    return {name: value[0] for name, value in zip(names, found[1:], strict=True)}


@contextmanager
def _only(form: str) -> Iterator[None]:
    """Products take this form of int8, as far as they can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "ROWS_LIMIT", {"rows": 1.0, "blocks": -1.0}[form])
        yield


FORMS = ["rows", "blocks"]


def _relative(found: Array, wanted: Array) -> float:
    return float(np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean()))


def test_sites_are_products_of_one_activation_without_the_head() -> None:
    found = quantized.sites(_layer())
    assert [(site.activation, len(site.nodes)) for site in found] == [("normed", 2), ("ab", 1)]


@pytest.mark.parametrize("kind", ["Mul", "Div", "Tanh"])
def test_a_head_that_is_scaled_or_capped_afterwards_is_still_the_head(kind: str, tmp_path: Path) -> None:
    graph = _layer()
    graph.weights["two"] = np.array(2, dtype=np.float32)
    graph.nodes[-1].output[0] = graph.nodes[-1].name = "before"
    graph.nodes.append(node(kind, ["before"] if kind == "Tanh" else ["before", "two"], "logits"))
    graph.reindex()
    assert [site.activation for site in quantized.sites(graph)] == ["normed", "ab"]
    wanted = run(graph, tmp_path / "a", FEEDS)[0]
    quantized.to_int4(graph)
    assert kinds(graph).count("MatMulNBits") == 3
    assert run(graph, tmp_path / "b", FEEDS)[0].shape == wanted.shape


@pytest.mark.parametrize("strength", quantized.SMOOTHING)
def test_smoothing_leaves_the_float_function_as_it_was(strength: float, tmp_path: Path) -> None:
    graph = _layer()
    samples = _samples(graph, tmp_path)
    wanted = run(graph, tmp_path, FEEDS)[0]
    site = quantized.sites(graph)[0]
    before = graph.weights[site.nodes[0].input[1]]
    quantized._smooth(graph, site, samples["normed"], strength)
    assert not np.allclose(graph.weights[site.nodes[0].input[1]], before)
    assert _relative(run(graph, tmp_path, FEEDS)[0], wanted) < 1e-6


def test_what_others_use_too_is_not_smoothed(tmp_path: Path) -> None:
    graph = _layer(foldable=False)
    graph.weights["gain"] = graph.weights["gain"] * np.where(np.arange(CHANNELS) < 2, 6, 1).astype(np.float32)
    chosen = quantized.to_int8(graph, _samples(graph, tmp_path))
    assert chosen[0].smoothing is None


def test_a_tame_activation_takes_rows_and_one_with_outliers_blocks(tmp_path: Path) -> None:
    tame, wild = _layer(foldable=False), _layer(foldable=False)
    wild.weights["gain"] = wild.weights["gain"] * np.where(np.arange(CHANNELS) == 7, 300, 1).astype(np.float32)
    for weights in ("w1", "w2"):  # what the large channel gives is small, so that the others' rounding is what counts
        wild.weights[weights] = wild.weights[weights] * np.where(np.arange(CHANNELS) == 7, 1e-4, 1)[:, None].astype(
            "f4"
        )
    for graph, form in ((tame, "rows"), (wild, "blocks")):
        chosen = quantized.to_int8(graph, _samples(graph, tmp_path))
        assert chosen[0].form == form
        assert (chosen[0].error <= ROWS_LIMIT) == (form == "rows")


def test_tokens_of_very_different_size_take_rows_still(tmp_path: Path) -> None:
    graph = _layer(foldable=False)
    samples = _samples(graph, tmp_path)
    sizes = np.where(np.arange(len(samples["normed"])) % 5 == 0, 1e3, 1)[:, None].astype(np.float32)
    assert quantized.to_int8(graph, samples | {"normed": samples["normed"] * sizes})[0].form == "rows"


def test_a_few_huge_rows_do_not_hide_what_the_others_lose(tmp_path: Path) -> None:
    """As attention sinks would, if powers were added up: the wild activation above, with one row for all the power."""
    graph = _layer(foldable=False)
    rows = _samples(graph, tmp_path)["normed"]
    rows[:, 7] *= 300
    sink = np.zeros_like(rows[:1])
    sink[0, 1] = 1e6
    for weights in ("w1", "w2"):
        graph.weights[weights] = graph.weights[weights] * np.where(np.arange(CHANNELS) == 7, 1e-4, 1)[:, None].astype(
            "f4"
        )
    chosen = quantized.to_int8(graph, {**_samples(graph, tmp_path), "normed": np.concatenate([sink, rows])})
    assert chosen[0].form == "blocks"


def test_smoothing_lets_a_foldable_activation_with_outliers_take_rows(tmp_path: Path) -> None:
    graph = _layer()
    large = np.where(np.arange(CHANNELS) == 7, 300, 1).astype(np.float32)
    graph.weights["gain"] = graph.weights["gain"] * large
    for weights in ("w1", "w2"):
        graph.weights[weights] = graph.weights[weights] / large[:, None]
    chosen = quantized.to_int8(graph, _samples(graph, tmp_path))
    assert (chosen[0].form, chosen[0].smoothing is not None) == ("rows", True)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_computes_what_the_float_graph_does_within_its_error(form: str, tmp_path: Path) -> None:
    graph = _layer()
    wanted = run(graph, tmp_path, FEEDS)[0]
    samples = _samples(graph, tmp_path)
    with _only(form):
        chosen = quantized.to_int8(graph, samples)
    assert {each.form for each in chosen} == {form}
    assert _relative(run(graph, tmp_path, FEEDS)[0], wanted) < 0.05


@pytest.mark.parametrize("form", [*FORMS, "int4"])
def test_small_products_of_one_activation_are_computed_as_one(form: str, tmp_path: Path) -> None:
    graph = _layer()
    wanted, samples = run(graph, tmp_path, FEEDS)[0], _samples(graph, tmp_path)
    if form == "int4":
        quantized.to_int4(graph)
    else:
        with _only(form):
            quantized.to_int8(graph, samples)
    assert kinds(graph).count("Split") == 1
    in_blocks = form in {"blocks", "int4"}  # of which the head is always one
    assert kinds(graph).count("MatMulNBits" if in_blocks else "MatMulIntegerToFloat") == (3 if in_blocks else 2)
    assert _relative(run(graph, tmp_path, FEEDS)[0], wanted) < (0.3 if form == "int4" else 0.05)


def test_wide_products_stay_apart(tmp_path: Path) -> None:
    graph = _layer()
    samples = _samples(graph, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "SMALL_OUTPUTS", 48)
        quantized.to_int8(graph, samples)
    assert "Split" not in kinds(graph)


def test_a_token_in_the_rows_form_does_not_depend_on_what_else_is_read(tmp_path: Path) -> None:
    graph = _layer()
    samples = _samples(graph, tmp_path)
    with _only("rows"):
        quantized.to_int8(graph, samples)
    every = run(graph, tmp_path, FEEDS)[0]
    one = run(graph, tmp_path, {**FEEDS, "input_ids": IDS[:, 7:8]})[0]
    np.testing.assert_array_equal(one[0, 0], every[0, 7])


@pytest.mark.parametrize("form", [*FORMS, "int4"])
def test_zero_activations_and_zero_weights_give_zeros(form: str, tmp_path: Path) -> None:
    graph = _layer()
    graph.weights["table"] = graph.weights["table"] * (np.arange(50) > 3)[:, None].astype(np.float32)
    graph.weights["w1"] = np.zeros_like(graph.weights["w1"])
    graph.weights["w2"] = np.full_like(graph.weights["w2"], 0.25)
    samples = _samples(graph, tmp_path)
    if form == "int4":
        quantized.to_int4(graph)
    else:
        with _only(form):
            quantized.to_int8(graph, samples)
    found = run(graph, tmp_path, FEEDS)[0]
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 1e-6


@given(width=st.sampled_from([16, 32, 33, 48, 80, 96]), rows=st.integers(1, 40))
@QUICK
def test_embeddings_come_back_as_their_blocks_say(width: int, rows: int, tmp_path: Path) -> None:
    table = normal(40, width)
    graph = graph_of([node("Gather", ["table", "input_ids"], "y")], {"table": table}, ["y"],
                     inputs={"input_ids": (INT64, [1, "t"])})  # fmt: skip
    quantized._embedding_and_head(graph)
    assert kinds(graph) == ["GatherBlockQuantized"]
    ids = np.random.default_rng(rows).integers(0, 40, size=(1, rows))
    found = run(graph, tmp_path, {"input_ids": ids})[0]
    wanted = dequantize(*quantize_blocks(table.T, 8), width).T[ids]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_shares_the_embedding_in_float32(tied: bool, tmp_path: Path) -> None:
    graph = _layer()
    if tied:
        graph.weights["head"] = np.ascontiguousarray(graph.weights["table"].T)
    wanted = run(graph, tmp_path, FEEDS)[0]
    quantized.to_fp32(graph)
    np.testing.assert_allclose(run(graph, tmp_path, FEEDS)[0], wanted, rtol=1e-5, atol=1e-4)
    assert ("head" in graph.weights) == (not tied)
