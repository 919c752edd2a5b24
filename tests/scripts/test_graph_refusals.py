"""Exports of a form that the rewrite does not know are refused by name, in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from edge_agent.model.signature import present_name
from scripts.prepare_model.architecture import Architecture
from scripts.prepare_model.graph import GraphNotUnderstood, rewrite
from scripts.prepare_model.graph.activations import fuse_activations
from scripts.prepare_model.graph.attention import replace_attention
from scripts.prepare_model.graph.editing import Graph, Node
from scripts.prepare_model.graph.norms import fuse_norms
from scripts.prepare_model.graph.tail import choose_rows
from tests.scripts.families import REFUSED, family

pytestmark = pytest.mark.timeout(400)  # the first test may have to make all families

Edit = Callable[[Graph], object]


def _behind(graph: Graph, name: str, kind: str) -> Node:
    """The first node of a kind on the way that keys or values take to their product."""
    while True:
        node = next(user for user in graph.users(name) if user.op_type != "Shape")
        if node.op_type == kind:
            return node
        name = node.output[0]


def _scores(graph: Graph, layer: int) -> Node:
    return _behind(graph, present_name(layer, "key"), "MatMul")


def _after(graph: Graph, node: Node, *kinds: str) -> None:
    """Put nodes of one input behind a node."""
    name = node.output[0]
    users = graph.users(name)
    new, last = [], name
    for kind in kinds:
        new.append(graph.node(kind, [last], graph.fresh(kind)))
        last = new[-1].output[0]
    graph.redirect(name, last, users)
    graph.insert_before(users[0], new)


def _times(graph: Graph, name: str, factor: float, users: list[Node]) -> None:
    scaled = graph.node("Mul", [name, graph.weight("factor", np.array(factor, dtype=np.float32))], graph.fresh("x"))
    graph.redirect(name, scaled.output[0], users)
    graph.insert_before(users[0], [scaled])


def _capped(graph: Graph) -> None:
    _after(graph, _scores(graph, 1), "Tanh")


def _without_softmax(graph: Graph) -> None:
    softmax = next(node for node in graph.nodes if node.op_type == "Softmax")
    graph.redirect(softmax.output[0], softmax.input[0])
    graph.prune()


def _two_softmaxes_less_one_weight(graph: Graph) -> None:
    softmax = next(node for node in graph.nodes if node.op_type == "Softmax")
    _after(graph, softmax, "Sqrt")


def _values_scaled(graph: Graph) -> None:
    _times(graph, present_name(2, "value"), 2.0, [_behind(graph, present_name(2, "value"), "Unsqueeze")])


def _keys_scaled(graph: Graph) -> None:
    _times(graph, present_name(2, "key"), 2.0, [_behind(graph, present_name(2, "key"), "Unsqueeze")])


def _interleaved(graph: Graph) -> None:
    """x[..., 1::2] and x[..., 0::2] in the places of the halves."""
    for node in graph.nodes:
        if node.op_type == "Slice" and "layers.0" in node.name and "self_attn" in node.name and len(node.input) > 4:
            node.input[4] = graph.shared("two", np.array([2], dtype=np.int64))
    graph.reindex()


def _halves_swapped(graph: Graph) -> None:
    for turn in (node for node in graph.nodes if node.op_type == "Concat"):
        negated = graph.maker(turn.input[0])
        if negated is not None and negated.op_type == "Neg":
            turn.input[1], negated.input[0] = negated.input[0], turn.input[1]
    graph.reindex()


def _without_present(graph: Graph) -> None:
    del graph.outputs[present_name(1, "key")]
    graph.prune()
    join = graph.maker(present_name(1, "key"))
    if join is not None:
        graph.redirect(present_name(1, "key"), join.input[1])
        graph.prune()


def _keys_not_rotated(graph: Graph) -> None:
    join = graph.maker(present_name(0, "key"))
    assert join is not None
    add = graph.maker(join.input[1])
    assert add is not None
    product = graph.maker(add.input[0])
    assert product is not None
    join.input[1] = product.input[0]
    graph.reindex()


def _value_normed(graph: Graph) -> None:
    join = graph.maker(present_name(0, "value"))
    assert join is not None
    weight = graph.weight("norm", np.ones(16, dtype=np.float32))
    norm = graph.node("SimplifiedLayerNormalization", [join.input[1], weight], graph.fresh("normed"), axis=-1)
    graph.insert_before(join, [norm])
    join.input[1] = norm.output[0]
    graph.reindex()


def _cosines_scaled(graph: Graph) -> None:
    cosine = next(node for node in graph.nodes if node.op_type == "Cos")
    _times(graph, cosine.output[0], 1.2, graph.users(cosine.output[0]))


def _sines_of_queries_differ(graph: Graph) -> None:
    sine = next(node for node in graph.nodes if node.op_type == "Sin")
    name = sine.output[0]
    adds = [node for node in graph.nodes if node.op_type == "Concat" and "self_attn" in node.name]
    assert name
    assert adds
    turned = next(  # the product of the turned half of queries with sines
        node
        for node in graph.nodes
        if node.op_type == "Mul" and graph.maker(node.input[0]) in adds and "layers.0" in node.name
    )
    made = graph.maker(turned.input[1])
    assert made is not None
    copy = graph.node("Unsqueeze", list(made.input), graph.fresh("sine"))
    graph.insert_before(turned, [copy])
    turned.input[1] = copy.output[0]
    graph.reindex()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_capped, "layer 1: Tanh among the attention scores"),
        (_without_softmax, "layer 0: the way from attention scores to the values"),
        (_two_softmaxes_less_one_weight, "layer 0: Sqrt among the attention scores"),
        (_values_scaled, "layer 2: values are scaled"),
        (_keys_scaled, "layer 2: scores are scaled by 0.5 in the graph, by 0.25 in the model"),
        (_interleaved, "layer 0, keys: the rotary embedding is not of the half-split form"),
        (_halves_swapped, "layer 0, keys: the rotary embedding is not of the half-split form"),
        (_without_present, "layer 1: present.1.key is not the past with something appended"),
        (_keys_not_rotated, "layer 0, keys: no rotary embedding stands before the cache"),
        (_value_normed, "layer 0: values are normed"),
        (_cosines_scaled, "layer 0: rotary cosines are scaled by 1.2"),
        (_sines_of_queries_differ, "layer 0: queries and keys are rotated differently"),
    ],
)
def test_a_graph_of_another_form_is_refused_by_place_and_reason(edit: Edit, words: str) -> None:
    found = family("llama")
    graph = rewrite.read_export(found.graph)
    edit(graph)
    with pytest.raises(GraphNotUnderstood) as caught:
        rewrite.rewrite(graph, found.architecture)
    assert str(caught.value) == f"the exported graph is not understood at {words}"


def _other_frequencies(shape: Architecture) -> Architecture:
    return msgspec.structs.replace(shape, rotary=(tuple(1.001 * value for value in shape.rotary[0]),))


def _other_scale(shape: Architecture) -> Architecture:
    layers = (*shape.layers[:2], msgspec.structs.replace(shape.layers[2], scale=0.3))
    return msgspec.structs.replace(shape, layers=layers)


def _more_layers(shape: Architecture) -> Architecture:
    return msgspec.structs.replace(shape, layers=(*shape.layers, shape.layers[0]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_frequencies, "layer 0: the rotary frequencies of the graph are not those of the model"),
        (_other_scale, "layer 2: scores are scaled by 0.25 in the graph, by 0.3 in the model"),
        (_more_layers, "layer 3: present.3.key is not the past with something appended"),
    ],
)
def test_a_graph_that_is_not_the_described_models_is_refused(
    change: Callable[[Architecture], Architecture], words: str
) -> None:
    found = family("llama")
    with pytest.raises(GraphNotUnderstood) as caught:
        rewrite.rewrite(rewrite.read_export(found.graph), change(found.architecture))
    assert str(caught.value) == f"the exported graph is not understood at {words}"


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_not_understood_is_refused_by_name(name: str) -> None:
    found = family(name)
    with pytest.raises(GraphNotUnderstood) as caught:
        rewrite.rewrite(rewrite.read_export(found.graph), found.architecture)
    assert str(caught.value) == f"the exported graph is not understood at {REFUSED[name]}"


def test_logits_that_do_not_depend_on_the_last_layer_are_refused() -> None:
    found = family("llama")
    graph = rewrite.read_export(found.graph)
    fuse_norms(graph)
    fuse_activations(graph)
    replace_attention(graph, found.architecture)
    last = [node for node in graph.nodes if node.op_type == "GroupQueryAttention"][-1]
    projection = graph.users(last.output[0])[0]
    summed = graph.users(projection.output[0])[0]
    assert summed.op_type == "Add"
    other = next(name for name in summed.input if name != projection.output[0])
    graph.redirect(summed.output[0], other)
    with pytest.raises(GraphNotUnderstood, match="at logits: they do not depend on the last layer's attention"):
        choose_rows(graph)


def test_logits_that_depend_on_an_input_or_on_a_shape_are_refused() -> None:
    value = onnx.helper.make_tensor_value_info
    attention = onnx.helper.make_node(
        "GroupQueryAttention", ["x"], ["mixed"], domain="com.microsoft", num_heads=1, kv_num_heads=1
    )
    shape = [
        onnx.helper.make_node("Neg", ["x"], ["other"]),
        onnx.helper.make_node("Shape", ["other"], ["shape"]),
        onnx.helper.make_node("Reshape", ["mixed", "shape"], ["logits"]),
    ]
    for tail, words in (
        ([onnx.helper.make_node("Add", ["mixed", "x"], ["logits"])], "they depend on x directly"),
        (shape, "they depend on shape, which is no activation"),
    ):
        nodes = [attention, *tail]
        graph = Graph(
            onnx.helper.make_model(
                onnx.helper.make_graph(nodes, "g", [value("x", 1, [1, "t", 4])], [value("logits", 1, [1, "t", 4])])
            )
        )
        with pytest.raises(GraphNotUnderstood, match=words):
            choose_rows(graph)


@pytest.mark.parametrize("left", [0, 1, 1000, 0.5, 0.999])
def test_a_truncated_file_is_refused_in_one_line(left: float, tmp_path: Path) -> None:
    found = family("llama")
    shutil.copytree(found.directory, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left if left >= 1 else left * len(whole))])
    with pytest.raises(GraphNotUnderstood, match=r"not understood at model\.onnx") as caught:
        rewrite.rewrite(rewrite.read_export(path), found.architecture)
    assert "\n" not in str(caught.value)
