"""Norms, activations and rows of the tail: one node for many, with the same values; other forms are left alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.prepare_model.graph.activations import fuse_activations
from scripts.prepare_model.graph.editing import Graph, Node
from scripts.prepare_model.graph.norms import NORM, SKIP_NORM, fuse_norms, join_sums
from scripts.prepare_model.graph.tail import choose_rows
from tests.scripts.graphs import Array, graph_of, kinds, node, normal, run

FLOAT = onnx.TensorProto.FLOAT
EPSILON = 1e-3
X = {"x": (FLOAT, [1, "t", 8])}


def _scalar(value: float) -> Array:
    return np.array(value, dtype=np.float32)


def _norm(
    *, source: str = "x", output: str = "y", power: float = 2, **changed: Any
) -> tuple[list[Node], dict[str, Array]]:
    """A norm as it is exported. changed: axes, keepdims, weight, one."""
    nodes = [
        node("Pow", [source, "power"], "square"),
        node("ReduceMean", ["square", "axes"], "mean", keepdims=changed.get("keepdims", 1)),
        node("Add", ["mean", "epsilon"], "shifted"),
        node("Sqrt", ["shifted"], "root"),
        node("Div", ["one", "root"], "inverse"),
        node("Mul", [source, "inverse"], "scaled"),
        node("Mul", ["weight", "scaled"], output),
    ]
    weights = {
        "power": _scalar(power),
        "axes": np.array(changed.get("axes", [-1]), dtype=np.int64),
        "epsilon": _scalar(EPSILON),
        "one": _scalar(changed.get("one", 1)),
        "weight": changed.get("weight", normal(8, seed=3)),
    }
    return nodes, weights


def _normed(x: Array, weight: Array) -> Array:
    exact = x.astype(np.float64)
    return np.asarray(exact / np.sqrt(np.square(exact).mean(-1, keepdims=True) + EPSILON) * weight)


@given(size=st.sampled_from([1e-3, 1, 1e4]), seed=st.integers(0, 99))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
def test_a_norm_is_one_node_with_the_same_values(size: float, seed: int, tmp_path: Path) -> None:
    nodes, weights = _norm()
    graph = graph_of(nodes, weights, ["y"], inputs=X)
    assert fuse_norms(graph) == 1
    assert kinds(graph) == [NORM]
    x = normal(1, 5, 8, seed=seed) * np.float32(size)
    np.testing.assert_allclose(run(graph, tmp_path, {"x": x})[0], _normed(x, weights["weight"]), rtol=2e-6, atol=1e-7)


def test_a_norm_through_casts_and_with_a_weight_behind_a_cast_is_one_node(tmp_path: Path) -> None:
    nodes, weights = _norm(source="cast", output="normed")
    nodes = [node("Cast", ["x"], "cast", to=FLOAT), *nodes[:-1], node("Cast", ["scaled"], "recast", to=FLOAT)]
    nodes.append(node("Mul", ["plain", "recast"], "y"))
    nodes.insert(0, node("Cast", ["weight"], "plain", to=FLOAT))
    graph = graph_of(nodes, weights, ["y"], inputs=X)
    assert fuse_norms(graph) == 1
    assert kinds(graph) == [NORM]
    x = normal(1, 5, 8)
    np.testing.assert_allclose(run(graph, tmp_path, {"x": x})[0], _normed(x, weights["weight"]), rtol=2e-6)


@pytest.mark.parametrize(
    "changed",
    [
        {"axes": [1]},
        {"axes": [-2, -1]},
        {"axes": []},
        {"power": 3},
        {"one": 2},
        {"weight": normal(1, 8)},
        {"weight": _scalar(2)},
        {"keepdims": 0, "axes": [-1]},
    ],
)
def test_what_is_no_such_norm_is_left_as_it_is(changed: dict[str, Any]) -> None:
    nodes, weights = _norm(**changed)
    graph = graph_of(nodes, weights, ["y"], inputs=X)
    assert fuse_norms(graph) == 0
    assert kinds(graph) == [each.op_type for each in nodes]


def test_a_norm_whose_inside_somebody_else_uses_is_left_as_it_is() -> None:
    nodes, weights = _norm()
    graph = graph_of([*nodes, node("Neg", ["mean"], "z")], weights, ["y", "z"], inputs=X)
    assert fuse_norms(graph) == 0


def test_a_norm_of_a_sum_computes_the_sum_too(tmp_path: Path) -> None:
    nodes, weights = _norm(source="sum")
    graph = graph_of(
        [node("Add", ["x", "u"], "sum"), *nodes, node("Neg", ["sum"], "z")], weights, ["y", "z"],
        inputs={**X, "u": (FLOAT, [1, "t", 8])},
    )  # fmt: skip
    x, other = normal(1, 5, 8), normal(1, 5, 8, seed=1)
    assert fuse_norms(graph) == join_sums(graph) == 1
    assert kinds(graph) == [SKIP_NORM, "Neg"]
    y, z = run(graph, tmp_path, {"x": x, "u": other})
    np.testing.assert_allclose(y, _normed(x + other, weights["weight"]), rtol=2e-6)
    np.testing.assert_array_equal(z, -(x + other))


def test_a_norm_of_a_sum_with_a_constant_is_not_joined() -> None:
    nodes, weights = _norm(source="sum")
    graph = graph_of([node("Add", ["x", "bias"], "sum"), *nodes], {**weights, "bias": normal(8)}, ["y"], inputs=X)
    assert (fuse_norms(graph), join_sums(graph)) == (1, 0)


def _silu(product: tuple[str, str] = ("x", "gate")) -> list[Node]:
    return [node("Sigmoid", ["x"], "gate"), node("Mul", product, "y")]


def _tanh_gelu(*, cubed: str = "pow", half: float = 0.5, inner: float = math.sqrt(2 / math.pi)) -> Graph:
    cube = [node("Pow", ["x", "three"], "cube")]
    if cubed == "mul":
        cube = [node("Mul", ["x", "x"], "square"), node("Mul", ["square", "x"], "cube")]
    nodes = [
        *cube,
        node("Mul", ["cube", "small"], "part"),
        node("Add", ["x", "part"], "sum"),
        node("Mul", ["sum", "inner"], "scaled"),
        node("Tanh", ["scaled"], "tanh"),
        node("Add", ["tanh", "one"], "plus"),
        node("Mul", ["x", "plus"], "product"),
        node("Mul", ["product", "half"], "y"),
    ]
    constants = {"three": 3, "small": 0.044715, "inner": inner, "one": 1, "half": half}
    return graph_of(nodes, {name: _scalar(value) for name, value in constants.items()}, ["y"], inputs=X)


@pytest.mark.parametrize("product", [("x", "gate"), ("gate", "x")])
def test_silu_is_one_node_with_the_same_values(product: tuple[str, str], tmp_path: Path) -> None:
    graph = graph_of(_silu(product), {}, ["y"], inputs=X)
    assert fuse_activations(graph) == 1
    assert kinds(graph) == ["QuickGelu"]
    x = 4 * normal(1, 50, 8)
    wanted = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(run(graph, tmp_path, {"x": x})[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("product", [("gate", "gate"), ("gate", "u")])
def test_a_sigmoid_that_gates_something_else_is_left_as_it_is(product: tuple[str, str]) -> None:
    graph = graph_of(_silu(product), {}, ["y"], inputs={**X, "u": (FLOAT, [1, "t", 8])})
    assert fuse_activations(graph) == 0
    assert kinds(graph) == ["Sigmoid", "Mul"]


@pytest.mark.parametrize("cubed", ["pow", "mul"])
def test_gelu_by_tanh_is_one_node_with_the_same_values(cubed: str, tmp_path: Path) -> None:
    graph = _tanh_gelu(cubed=cubed)
    assert fuse_activations(graph) == 1
    assert kinds(graph) == ["FastGelu"]
    x = 3 * normal(1, 50, 8)
    exact = x.astype(np.float64)
    wanted = 0.5 * exact * (1 + np.tanh(math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)))
    np.testing.assert_allclose(run(graph, tmp_path, {"x": x})[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("graph", [_tanh_gelu(half=0.6), _tanh_gelu(inner=0.8)], ids=["half", "inner"])
def test_a_tanh_of_another_form_is_left_as_it_is(graph: Graph) -> None:
    before = kinds(graph)
    assert fuse_activations(graph) == 0
    assert kinds(graph) == before


def test_gelu_by_erf_is_left_as_it_is() -> None:
    nodes = [
        node("Div", ["x", "root"], "scaled"),
        node("Erf", ["scaled"], "erf"),
        node("Add", ["erf", "one"], "plus"),
        node("Mul", ["x", "plus"], "product"),
        node("Mul", ["product", "half"], "y"),
    ]
    constants = {"root": math.sqrt(2), "one": 1.0, "half": 0.5}
    graph = graph_of(nodes, {name: _scalar(value) for name, value in constants.items()}, ["y"], inputs=X)
    assert fuse_activations(graph) == 0
    assert kinds(graph) == ["Div", "Erf", "Add", "Mul", "Mul"]


def _tail() -> Graph:
    """One attention, and behind it what follows a last layer: a projection, a residual sum, a product, the head."""
    nodes = [
        onnx.helper.make_node(
            "GroupQueryAttention",
            ["x", "k", "v", "past_k", "past_v", "filled", "total"],
            ["mixed", "present_k", "present_v"],
            domain="com.microsoft",
            num_heads=1,
            kv_num_heads=1,
        ),
        node("Neg", ["x"], "residual"),
        node("MatMul", ["mixed", "w"], "projected"),
        node("Add", ["residual", "projected"], "sum"),
        node("Mul", ["sum", "factor"], "scaled"),
        node("MatMul", ["scaled", "head"], "logits"),
    ]
    inputs = {name: (FLOAT, [1, "t", 8]) for name in ("x", "k", "v")}
    inputs |= {name: (FLOAT, [1, 1, "capacity", 8]) for name in ("past_k", "past_v")}
    inputs |= {"filled": (onnx.TensorProto.INT32, [1]), "total": (onnx.TensorProto.INT32, [])}
    weights = {"w": normal(8, 8), "factor": normal(8, seed=1), "head": normal(8, 11, seed=2)}
    graph = graph_of(nodes, weights, [], inputs=inputs)
    shapes: dict[str, list[Any]] = {"logits": [1, "t", 11], "present_k": [1, 1, "capacity", 8]}
    shapes["present_v"] = shapes["present_k"]
    graph.outputs = {name: onnx.helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in shapes.items()}
    return graph


@given(tokens=st.integers(1, 9), data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
def test_any_chosen_rows_are_those_rows_of_all(tokens: int, data: st.DataObject, tmp_path: Path) -> None:
    rows = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=tokens, unique=True))
    feeds: dict[str, Array] = {name: normal(1, tokens, 8, seed=i) for i, name in enumerate(("x", "k", "v"))}
    feeds |= {name: np.zeros((1, 1, tokens, 8), dtype=np.float32) for name in ("past_k", "past_v")}
    feeds |= {"filled": np.array([tokens - 1], dtype=np.int32), "total": np.array(tokens, dtype=np.int32)}
    wanted = run(_tail(), tmp_path / "all", feeds)[0]
    graph = _tail()
    choose_rows(graph)
    assert kinds(graph).count("Gather") == 2
    found = run(graph, tmp_path / "some", {**feeds, "logit_rows": np.array(rows, dtype=np.int64)})
    np.testing.assert_allclose(found[0], wanted[:, rows], rtol=1e-5, atol=1e-5)
    assert found[0].shape == (1, len(rows), 11)
