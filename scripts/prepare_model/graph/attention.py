"""Attention as it is exported, some hundred nodes a layer, as one GroupQueryAttention over a buffer that it shares.

The operator (onnxruntime, com.microsoft) appends keys and values to buffers of fixed size whose filled lengths come as
inputs, so nothing is copied from step to step. Its rotary embedding and window count entries; here positions are
explicit, because a cache may have fewer entries than positions: rotation is a node of its own with cosines and sines as
inputs, and layers with a sliding window take a bias.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from msgspec import Struct
from numpy.typing import NDArray

from edge_agent.model.manifest import LayerSpec
from edge_agent.model.signature import (
    FILLED,
    INPUT_IDS,
    LAST_QUERIES,
    LOGITS,
    QUERY_ROWS,
    TOTAL,
    cosine_name,
    keys_name,
    past_name,
    present_name,
    queries_name,
    sine_name,
    window_bias_name,
)
from scripts.prepare_model.architecture import Architecture
from scripts.prepare_model.graph.editing import CONTRIB, FLOAT, Array, Graph, Node, attribute
from scripts.prepare_model.graph.errors import GraphNotUnderstood
from scripts.prepare_model.graph.norms import NORM

INT32 = onnx.TensorProto.INT32
_SPREAD = frozenset({"Unsqueeze", "Expand", "Reshape", "Transpose", "Cast", "Identity"})
_TOLERANCE = 1e-6


class Attention(Struct, frozen=True, kw_only=True):
    """What was found of one layer. query, key, value: projections, (1, tokens, heads · head_dim), before any norm.

    query_norm, key_norm: weight and epsilon of a norm over each head, if there is one.
    attended: the value (1, tokens, query_heads · head_dim) that the rest of the layer goes on from.
    """

    query: str
    key: str
    value: str
    query_norm: tuple[str, float] | None
    key_norm: tuple[str, float] | None
    frequencies: NDArray[np.float32]
    scale: float
    last: Node
    attended: str


def replace_attention(graph: Graph, architecture: Architecture) -> None:
    """Rewrite the attention of all layers. Raises GraphNotUnderstood, naming the layer."""
    found = [_find(graph, layer) for layer in range(len(architecture.layers))]
    presents = {name for name in graph.outputs if name != LOGITS}
    plain: dict[str, str] = {}
    for layer, (attention, spec) in enumerate(zip(found, architecture.layers, strict=True)):
        _compare(layer, attention, spec, np.array(architecture.rotary[spec.rotary], dtype=np.float32))
        nodes, keys = _nodes(graph, layer, attention, spec, architecture)
        graph.replace(attention.last, nodes)
        plain[keys] = keys_name(layer)
    graph.nodes = [node for node in graph.nodes if node.op_type != "Concat" or node.output[0] not in presents]
    for name in presents:
        del graph.outputs[name]
    for name in [name for name in graph.inputs if name != INPUT_IDS]:
        del graph.inputs[name]
    graph.nodes.insert(
        0, graph.node("Split", [FILLED], [_filled(n) for n in range(len(found))], num_outputs=len(found))
    )
    for old, new in plain.items():
        graph.rename(old, new)
    _declare(graph, architecture)
    graph.prune()
    graph.sort()


def _find(graph: Graph, layer: int) -> Attention:
    where = f"layer {layer}"
    new_key, new_value = (_appended(graph, layer, kind) for kind in ("key", "value"))
    key, *angles = _unrotated(graph, new_key, f"{where}, keys")
    key, key_norm = _projection(graph, key, f"{where}, keys")
    value, value_norm = _projection(graph, new_value, f"{where}, values")
    scores, key_scale = _spread(graph, present_name(layer, "key"), f"{where}, keys")
    mixed, value_scale = _spread(graph, present_name(layer, "value"), f"{where}, values")
    rotated, query_scale = _scaled(graph, scores.input[0])
    query, *query_angles = _unrotated(graph, rotated, f"{where}, queries")
    query, query_norm = _projection(graph, query, f"{where}, queries")
    score_scale = _weights_to_mixed(graph, scores, mixed, where)
    if query_angles != angles:
        raise GraphNotUnderstood(where, "queries and keys are rotated differently")
    if value_norm is not None:
        raise GraphNotUnderstood(where, "values are normed")
    if value_scale != 1:
        raise GraphNotUnderstood(where, "values are scaled")
    last = _heads_together(graph, mixed, where)
    return Attention(
        query=query,
        key=key,
        value=value,
        query_norm=query_norm,
        key_norm=key_norm,
        frequencies=_frequencies(graph, angles[0], where),
        scale=key_scale * query_scale * score_scale,
        last=last,
        attended=last.output[0],
    )


def _appended(graph: Graph, layer: int, kind: str) -> str:
    """What is appended to the past of a layer: keys or values, (1, kv_heads, tokens, head_dim)."""
    join = graph.maker(present_name(layer, kind))
    if join is None or join.op_type != "Concat" or list(join.input)[:1] != [past_name(layer, kind)]:
        raise GraphNotUnderstood(
            f"layer {layer}", f"{present_name(layer, kind)} is not the past with something appended"
        )
    return str(join.input[1])


def _unrotated(graph: Graph, name: str, where: str) -> tuple[str, str, str]:
    """The value before `x · cos + rotate_half(x) · sin`, and the names of cos and sin."""
    add = graph.maker(graph.same(name))
    if add is None or add.op_type != "Add":
        raise GraphNotUnderstood(where, "no rotary embedding stands before the cache")
    for plain, turned in (add.input, reversed(add.input)):
        one, other = graph.maker(plain), graph.maker(turned)
        if one is None or other is None or {one.op_type, other.op_type} != {"Mul"}:
            continue
        half = graph.maker(other.input[0])
        if half is not None and half.op_type == "Concat" and _is_half_turn(graph, half, one.input[0]):
            return str(one.input[0]), str(one.input[1]), str(other.input[1])
    raise GraphNotUnderstood(where, "the rotary embedding is not of the half-split form")


def _is_half_turn(graph: Graph, half: Node, source: str) -> bool:
    """Whether a Concat is (-second half, first half) of source."""
    if len(half.input) != 2:
        return False
    negated, first = graph.maker(half.input[0]), graph.maker(half.input[1])
    if negated is None or negated.op_type != "Neg" or first is None or first.op_type != "Slice":
        return False
    second = graph.maker(negated.input[0])
    if second is None or second.op_type != "Slice" or not first.input[0] == second.input[0] == source:
        return False
    (start, stop), (after, end) = _bounds(graph, first), _bounds(graph, second)
    return start == 0 and stop == after is not None and isinstance(end, float) and end >= np.iinfo(np.int32).max


def _bounds(graph: Graph, cut: Node) -> tuple[float | str | None, float | str | None]:
    """Where a Slice begins and ends: numbers, or names of what they are computed from; None if it leaves some out."""
    if len(cut.input) > 4 and graph.scalar(cut.input[4]) != 1:
        return None, None
    found: list[float | str] = []
    for name in cut.input[1:3]:
        number = graph.scalar(name)
        while number is None and (node := graph.maker(name)) is not None and node.op_type in {"Unsqueeze", "Cast"}:
            name = node.input[0]  # noqa: PLW2901
        found.append(str(name) if number is None else number)
    return found[0], found[1]


def _projection(graph: Graph, name: str, where: str) -> tuple[str, tuple[str, float] | None]:
    """The projection (1, tokens, heads · head_dim) behind the parting into heads, and the norm over each head."""
    norm = None
    for _ in range(4):
        node = graph.maker(graph.same(name))
        if node is None:
            break
        if node.op_type == NORM and norm is None:
            norm = (str(node.input[1]), float(attribute(node, "epsilon", 1e-5)))
        elif node.op_type == "Reshape":
            return graph.same(node.input[0]), norm
        elif node.op_type != "Transpose" or list(attribute(node, "perm", [])) != [0, 2, 1, 3]:
            break
        name = node.input[0]
    raise GraphNotUnderstood(where, "no projection that is parted into heads")


def _spread(graph: Graph, name: str, where: str) -> tuple[Node, float]:
    """The MatMul that uses a present, through the repetition for its query heads, and what it was multiplied with."""
    scale = 1.0
    for _ in range(12):
        users = [node for node in graph.users(name) if node.op_type != "Shape"]
        if len(users) != 1:
            break
        node = users[0]
        if node.op_type == "MatMul":
            return node, scale
        if (factor := _factor(graph, node)) is not None:
            scale *= factor
        elif node.op_type not in _SPREAD:
            break
        name = node.output[0]
    raise GraphNotUnderstood(where, "no product with queries or weights found")


def _scaled(graph: Graph, name: str) -> tuple[str, float]:
    """The value before multiplications by constants, and their product."""
    scale = 1.0
    while (node := graph.maker(graph.same(name))) is not None and (factor := _factor(graph, node)) is not None:
        scale *= factor
        name = node.input[0]
    return name, scale


def _factor(graph: Graph, node: Node) -> float | None:
    """The constant that a node multiplies its first input with; None if it does something else."""
    value = graph.scalar(node.input[1]) if node.op_type in {"Mul", "Div"} else None
    return 1 / value if value is not None and node.op_type == "Div" else value


def _weights_to_mixed(graph: Graph, scores: Node, mixed: Node, where: str) -> float:
    """Walk from scores to their product with the values: scale, mask, softmax, nothing else. Returns the scale."""
    scale, seen_softmax, node = 1.0, False, scores
    for _ in range(8):
        users = [user for user in graph.users(node.output[0]) if user.op_type != "IsNaN"]
        if len(users) != 1:
            break
        node = users[0]
        if node is mixed:
            if not seen_softmax:
                break
            return scale
        if node.op_type == "Softmax":
            seen_softmax = True
        elif not seen_softmax and (factor := _factor(graph, node)) is not None:
            scale *= factor
        elif node.op_type not in {"Cast", "Identity", "Where"} and (node.op_type != "Add" or seen_softmax):
            raise GraphNotUnderstood(where, f"{node.op_type} among the attention scores")
    raise GraphNotUnderstood(where, "the way from attention scores to the values")


def _heads_together(graph: Graph, mixed: Node, where: str) -> Node:
    """The Reshape after which the heads stand beside one another again."""
    swap = graph.only_user(mixed.output[0])
    last = None if swap is None else graph.only_user(swap.output[0])
    if swap is None or last is None or swap.op_type != "Transpose" or last.op_type != "Reshape":
        raise GraphNotUnderstood(where, "heads are not put together again after attention")
    return last


def _frequencies(graph: Graph, cosine: str, where: str) -> NDArray[np.float32]:
    """Inverse frequencies (head_dim/2,) behind a cosine."""
    names, seen = [cosine], 0
    while names and seen < 32:
        seen += 1
        node = graph.maker(names.pop())
        if node is None:
            continue
        if node.op_type == "MatMul":
            for name in node.input:
                value = _before_spreading(graph, name)
                if value is not None:
                    return np.asarray(value, dtype=np.float32).reshape(-1)
        if node.op_type in {"Unsqueeze", "Cast", "Cos", "Concat", "Transpose", "Identity"}:
            names.append(node.input[0])
        elif node.op_type == "Mul":
            factor = graph.scalar(node.input[1])
            if factor is None or not math.isclose(factor, 1.0):
                by = "something that is not constant" if factor is None else f"{factor:g}"
                raise GraphNotUnderstood(where, f"rotary cosines are scaled by {by}")
            names.append(node.input[0])
    raise GraphNotUnderstood(where, "rotary frequencies are not constant")


def _before_spreading(graph: Graph, name: str) -> Array | None:
    """A constant, before it is repeated for each row of a batch."""
    while (value := graph.constant(name)) is None:
        node = graph.maker(name)
        if node is None or node.op_type not in {"Expand", "Cast", "Unsqueeze"}:
            break
        name = node.input[0]
    return value


def _compare(layer: int, found: Attention, spec: LayerSpec, described: NDArray[np.float32]) -> None:
    if not math.isclose(found.scale, spec.scale, rel_tol=_TOLERANCE):
        raise GraphNotUnderstood(
            f"layer {layer}", f"scores are scaled by {found.scale:g} in the graph, by {spec.scale:g} in the model"
        )
    if found.frequencies.shape != described.shape or not np.allclose(
        found.frequencies, described, rtol=_TOLERANCE, atol=0
    ):
        raise GraphNotUnderstood(f"layer {layer}", "the rotary frequencies of the graph are not those of the model")


def _filled(layer: int) -> str:
    return f"{FILLED}.{layer}"


def _nodes(
    graph: Graph, layer: int, found: Attention, spec: LayerSpec, architecture: Architecture
) -> tuple[list[Node], str]:
    """The new nodes of one layer, the last of which makes what the old ones made, and the name of its plain keys."""
    stem = f"layer.{layer}"
    nodes: list[Node] = []
    rotated, plain = [], []
    for kind, source, norm, heads in (
        ("query", found.query, found.query_norm, architecture.query_heads),
        ("key", found.key, found.key_norm, architecture.kv_heads),
    ):
        if norm is not None:
            normed = _normed(graph, f"{stem}.{kind}", source, norm=norm, heads=heads, head_dim=architecture.head_dim)
            nodes += normed
            source = normed[-1].output[0]  # noqa: PLW2901
        plain.append(source)
        rotated.append(f"{stem}.{kind}.rotated")
        caches = [cosine_name(spec.rotary), sine_name(spec.rotary)]
        first_row = graph.shared("first_row", np.zeros(1, dtype=np.int64))
        nodes.append(graph.node("RotaryEmbedding", [source, first_row, *caches], rotated[-1], domain=CONTRIB))
    nodes.append(_last_rows(graph, rotated[0], queries_name(layer)))
    bias = ["", "", "", window_bias_name(layer)] if spec.sliding_window else []
    past = [past_name(layer, kind) for kind in ("key", "value")]
    nodes.append(
        graph.node(
            "GroupQueryAttention",
            [*rotated, found.value, *past, _filled(layer), TOTAL, *bias],
            [found.attended, *(present_name(layer, kind) for kind in ("key", "value"))],
            domain=CONTRIB,
            num_heads=architecture.query_heads,
            kv_num_heads=architecture.kv_heads,
            scale=found.scale,
            do_rotary=0,
            local_window_size=spec.sliding_window or -1,
        )
    )
    return nodes, plain[1]


def _normed(graph: Graph, stem: str, source: str, *, norm: tuple[str, float], heads: int, head_dim: int) -> list[Node]:
    """Nodes of a norm over each head of (1, tokens, heads · head_dim)."""
    apart, normed, together = f"{stem}.heads", f"{stem}.heads.normed", f"{stem}.normed"
    shapes = [
        graph.shared(f"{name}.{heads}", np.array(shape, dtype=np.int64))
        for name, shape in (("apart", [0, 0, heads, head_dim]), ("together", [0, 0, heads * head_dim]))
    ]
    weight, epsilon = norm
    return [
        graph.node("Reshape", [source, shapes[0]], apart),
        graph.node(NORM, [apart, weight], normed, axis=-1, epsilon=epsilon, stash_type=1),
        graph.node("Reshape", [normed, shapes[1]], together),
    ]


def _last_rows(graph: Graph, source: str, made: str) -> Node:
    """The last rows of (1, tokens, width): as many as attention mass is asked for."""
    bounds = [
        graph.shared(f"last_rows.{name}", np.array([value], dtype=np.int64))
        for name, value in (("start", -LAST_QUERIES), ("stop", np.iinfo(np.int64).max), ("axis", 1))
    ]
    return graph.node("Slice", [source, *bounds], made)


def _declare(graph: Graph, architecture: Architecture) -> None:
    """Inputs and outputs, as edge_agent.model.signature says."""

    def value(name: str, kind: int, shape: list[str | int]) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    half, width = architecture.head_dim // 2, architecture.query_heads * architecture.head_dim
    buffer: list[str | int] = [1, architecture.kv_heads, "capacity", architecture.head_dim]
    inputs = [value(FILLED, INT32, [len(architecture.layers)]), value(TOTAL, INT32, [])]
    for index in range(len(architecture.rotary)):
        inputs += [value(name, FLOAT, ["tokens", half]) for name in (cosine_name(index), sine_name(index))]
    outputs = []
    for layer, spec in enumerate(architecture.layers):
        inputs += [value(past_name(layer, kind), FLOAT, buffer) for kind in ("key", "value")]
        outputs += [value(present_name(layer, kind), FLOAT, buffer) for kind in ("key", "value")]
        outputs.append(value(keys_name(layer), FLOAT, [1, "tokens", architecture.kv_heads * architecture.head_dim]))
        outputs.append(value(queries_name(layer), FLOAT, [1, QUERY_ROWS, width]))
        if spec.sliding_window:
            inputs.append(value(window_bias_name(layer), FLOAT, [1, "bias_heads", "tokens", "total"]))
    graph.inputs[INPUT_IDS] = value(INPUT_IDS, onnx.TensorProto.INT64, [1, "tokens"])
    graph.inputs |= {each.name: each for each in inputs}
    graph.outputs |= {each.name: each for each in outputs}
