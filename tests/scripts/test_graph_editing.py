"""Editing a graph: constants, makers, users; and writing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from scripts.prepare_model.graph import GraphNotUnderstood
from scripts.prepare_model.graph.editing import Graph
from scripts.prepare_model.graph.storing import save
from tests.scripts.graphs import Array, graph_of, kinds, node, normal, run

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
X = {"x": (FLOAT, [1, "t", 4])}


def _chain() -> Graph:
    """x → a → b → y, and a dead end."""
    nodes = [node("Neg", ["x"], "a"), node("Abs", ["a"], "b"), node("Mul", ["b", "w"], "y"), node("Exp", ["a"], "dead")]
    return graph_of(nodes, {"w": normal(4), "unused": normal(4)}, ["y"], inputs=X)


@given(
    steps=st.lists(
        st.one_of(
            st.permutations([0, 1, 2]).map(lambda perm: ("Transpose", perm)),
            st.sampled_from([0, 1, 2, 3, -1, -2]).map(lambda axis: ("Unsqueeze", [axis])),
            st.sampled_from([onnx.TensorProto.DOUBLE, FLOAT]).map(lambda kind: ("Cast", [kind])),
            st.just(("Identity", [0])),
        ),
        max_size=4,
    )
)
def test_a_constant_is_seen_through_what_the_reference_makes_of_it(steps: list[tuple[str, list[int]]]) -> None:
    nodes, name, rank = [], "w", 3
    weights = {"w": normal(2, 3, 5)}
    for index, (kind, how) in enumerate(steps):
        made = f"v{index}"
        if kind == "Transpose":
            if rank != 3:
                continue
            nodes.append(node(kind, [name], made, perm=how))
        elif kind == "Unsqueeze":
            weights[f"axes{index}"] = np.array(how, dtype=np.int64)
            nodes.append(node(kind, [name, f"axes{index}"], made))
            rank += 1
        else:
            how_cast: dict[str, Any] = {"to": how[0]} if kind == "Cast" else {}
            nodes.append(node(kind, [name], made, **how_cast))
        name = made
    nodes.append(node("Cast", [name], "y", to=FLOAT))
    graph = graph_of(nodes, weights, ["y"], inputs={})
    found = graph.constant("y")
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "g",
            [],
            [onnx.helper.make_tensor_value_info("y", FLOAT, None)],
            initializer=[onnx.numpy_helper.from_array(value, key) for key, value in weights.items()],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
    )
    wanted = ReferenceEvaluator(model).run(None, {})[0]
    assert found is not None
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)


def test_what_depends_on_an_input_is_no_constant() -> None:
    nodes = [node("Shape", ["x"], "shape"), node("Expand", ["w", "shape"], "y")]
    graph = graph_of(nodes, {"w": normal(1)}, ["y"], inputs=X)
    assert graph.constant("y") is None
    assert graph.constant("x") is None
    assert graph.constant("nothing") is None


def test_only_one_element_is_a_scalar() -> None:
    graph = graph_of([node("Unsqueeze", ["two", "axis"], "y")], {
        "two": np.array(2, dtype=np.float32), "axis": np.array([0]), "many": normal(2), "none": normal(0),
    }, ["y"], inputs={})  # fmt: skip
    assert (graph.scalar("two"), graph.scalar("y")) == (2, 2)
    assert graph.scalar("many") is graph.scalar("none") is graph.scalar("missing") is None


def test_a_cast_changes_nothing_only_between_floats() -> None:
    nodes = [
        node("Cast", ["x"], "same", to=FLOAT),
        node("Identity", ["same"], "still"),
        node("Cast", ["n"], "other", to=FLOAT),
        node("Shape", ["x"], "shape"),
        node("Cast", ["shape"], "counted", to=FLOAT),
        node("Equal", ["x", "x"], "equal"),
        node("Unsqueeze", ["equal", "axis"], "apart"),
        node("Cast", ["apart"], "truth", to=FLOAT),
        node("Where", ["equal", "still", "x"], "chosen"),
        node("Cast", ["chosen"], "y", to=FLOAT),
    ]
    graph = graph_of(nodes, {"axis": np.array([0])}, ["y"], inputs={**X, "n": (INT64, [1])})
    assert (graph.same("still"), graph.same("y")) == ("x", "chosen")
    for name in ("other", "counted", "truth"):
        assert graph.same(name) == name


def test_replacing_puts_new_nodes_where_the_old_one_stood() -> None:
    graph = _chain()
    old = graph.maker("b")
    assert old is not None
    graph.replace(old, [graph.node("Exp", ["a"], "c"), graph.node("Neg", ["c"], "b")])
    assert kinds(graph) == ["Neg", "Exp", "Neg", "Mul", "Exp"]
    maker = graph.maker("b")
    assert maker is not None
    assert maker.op_type == "Neg"
    assert [user.output[0] for user in graph.users("a")] == ["c", "dead"]
    with pytest.raises(StopIteration):
        graph.replace(old, [])


def test_pruning_drops_what_no_output_needs() -> None:
    graph = _chain()
    graph.prune()
    assert kinds(graph) == ["Neg", "Abs", "Mul"]
    assert list(graph.weights) == ["w"]
    assert graph.only_user("a") is graph.maker("b")


def test_an_output_has_no_only_user() -> None:
    graph = graph_of([node("Neg", ["x"], "a"), node("Abs", ["a"], "y")], {}, ["y", "a"], inputs=X)
    assert len(graph.users("a")) == 1
    assert graph.only_user("a") is None


@given(order=st.permutations(range(6)))
def test_sorting_puts_every_maker_before_its_users(order: list[int]) -> None:
    graph = graph_of([node("Neg", ["x" if i == 0 else f"v{i - 1}"], f"v{i}") for i in range(6)], {}, ["v5"], inputs=X)
    graph.nodes = [graph.nodes[index] for index in order]
    graph.sort()
    assert [each.output[0] for each in graph.nodes] == [f"v{i}" for i in range(6)]


def test_sorting_names_a_value_that_nobody_makes() -> None:
    graph = _chain()
    graph.nodes = graph.nodes[1:]
    with pytest.raises(GraphNotUnderstood, match="at b: nothing makes a"):
        graph.sort()


def test_after_a_kept_block_the_graph_is_what_it_was_even_if_it_raised(tmp_path: Path) -> None:
    graph = _chain()
    feeds = {"x": normal(1, 3, 4)}
    before = run(graph, tmp_path, feeds)

    def spoil() -> None:
        with graph.kept():
            graph.nodes[0].op_type = "Exp"
            graph.weights["w"] = normal(4, seed=9)
            graph.outputs["a"] = onnx.helper.make_tensor_value_info("a", FLOAT, None)
            graph.redirect("a", "x")
            graph.prune()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        spoil()
    after = run(graph, tmp_path, feeds)
    assert len(before) == len(after) == 1
    np.testing.assert_array_equal(before[0], after[0])


def test_redirecting_some_users_leaves_the_others() -> None:
    graph = _chain()
    first, second = graph.users("a")
    graph.redirect("a", "x", [second])
    assert (graph.users("a"), list(second.input)) == ([first], ["x"])
    graph.redirect("a", "x")
    assert graph.users("a") == []


def test_fresh_names_and_weights_are_never_taken_twice() -> None:
    graph = _chain()
    names = [graph.fresh("a"), graph.fresh("a"), graph.weight("a", normal(2)), graph.weight("a", normal(2))]
    assert len(set(names)) == 4
    assert graph.shared("s", normal(2)) == graph.shared("s", normal(2, seed=1))
    np.testing.assert_array_equal(graph.weights["kvbus.s"], normal(2))


def test_new_nodes_stand_before_the_one_named() -> None:
    graph = _chain()
    graph.insert_before(graph.nodes[2], [graph.node("Exp", ["b"], "c")])
    assert kinds(graph) == ["Neg", "Abs", "Exp", "Mul", "Exp"]


def test_weights_begin_on_pages_in_a_file_of_their_own_and_small_ones_stay_inside(tmp_path: Path) -> None:
    weights: dict[str, Array] = {
        "big": normal(1000), "bigger": normal(40, 50), "view": normal(30, 50).T, "eight": np.zeros(300, dtype=np.uint8),
        "small": normal(4), "nothing": normal(0, 4),
    }  # fmt: skip
    nodes = [node("Identity", [name], f"out.{name}") for name in weights]
    graph = graph_of(nodes, weights, [], inputs={})
    graph.outputs |= {
        f"out.{name}": onnx.helper.make_tensor_value_info(
            f"out.{name}", onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in weights.items()
    }
    save(graph, tmp_path / "deep" / "model.onnx")
    model = onnx.load(tmp_path / "deep" / "model.onnx", load_external_data=False)
    inside, spans = set(), []
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            inside.add(tensor.name)
            continue
        said = {entry.key: entry.value for entry in tensor.external_data}
        assert said["location"] == "model.onnx.weights"
        assert int(said["offset"]) % 4096 == 0
        assert int(said["length"]) == weights[tensor.name].nbytes
        spans.append((int(said["offset"]), int(said["offset"]) + int(said["length"])))
    assert inside == {"small", "nothing"}
    assert all(end <= start for (_, end), (start, _) in zip(sorted(spans), sorted(spans)[1:], strict=False))
    assert (tmp_path / "deep" / "model.onnx.weights").stat().st_size == max(end for _, end in spans)
    session = ort.InferenceSession(tmp_path / "deep" / "model.onnx", providers=["CPUExecutionProvider"])
    for name, value in zip(weights, session.run([f"out.{name}" for name in weights], {}), strict=True):
        np.testing.assert_array_equal(value, weights[name])


def test_saving_the_same_graph_again_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(_chain(), tmp_path / name / "model.onnx")
    for file in ("model.onnx", "model.onnx.weights"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
