"""Activations, up to nine nodes each in an export, as one node."""

from __future__ import annotations

import math

from scripts.prepare_model.graph.editing import CONTRIB, Graph, Node


def fuse_activations(graph: Graph) -> int:
    """SiLU (x · sigmoid(x)) and the tanh form of GELU. Returns how many; others are left as they are."""
    found = sum(_silu(graph, node) for node in list(graph.nodes) if node.op_type == "Sigmoid")
    found += sum(_tanh_gelu(graph, node) for node in list(graph.nodes) if node.op_type == "Tanh")
    graph.prune()
    return found


def _silu(graph: Graph, sigmoid: Node) -> bool:
    product = graph.only_user(sigmoid.output[0])
    if product is None or product.op_type != "Mul" or sigmoid.input[0] not in product.input:
        return False
    graph.replace(product, [graph.node("QuickGelu", [sigmoid.input[0]], product.output[0], domain=CONTRIB, alpha=1.0)])
    return True


def _tanh_gelu(graph: Graph, tanh: Node) -> bool:
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    inner, factor = _times(graph, graph.maker(tanh.input[0]))
    summed = graph.maker(inner) if inner else None
    if summed is None or summed.op_type != "Add" or not math.isclose(factor, math.sqrt(2 / math.pi), rel_tol=1e-5):
        return False
    source = next(
        (name for name, other in (summed.input, reversed(summed.input)) if _cubed(graph, graph.maker(other), name)),
        None,
    )
    plus = graph.only_user(tanh.output[0])
    if source is None or plus is None or plus.op_type != "Add" or 1.0 not in map(graph.scalar, plus.input):
        return False
    last = _half_of_product(graph, plus, source)
    if last is None:
        return False
    graph.replace(last, [graph.node("FastGelu", [source], last.output[0], domain=CONTRIB)])
    return True


def _half_of_product(graph: Graph, plus: Node, source: str) -> Node | None:
    """The last of two multiplications, by x and by a half, in either order."""
    factors: list[object] = []
    node: Node | None = plus
    for _ in range(2):
        before = node.output[0] if node is not None else ""
        node = graph.only_user(before)
        if node is None or node.op_type != "Mul":
            return None
        other = next((name for name in node.input if name != before), before)
        factors.append(source if other == source else graph.scalar(other))
    return node if set(factors) == {source, 0.5} else None


def _cubed(graph: Graph, node: Node | None, source: str) -> bool:
    """Whether a node is 0.044715 x³."""
    name, factor = _times(graph, node)
    cube = graph.maker(name) if name else None
    if cube is None or not math.isclose(factor, 0.044715, rel_tol=1e-5):
        return False
    if cube.op_type == "Pow":
        return cube.input[0] == source and graph.scalar(cube.input[1]) == 3
    square = next((graph.maker(name) for name in cube.input if name != source), None)
    return cube.op_type == "Mul" and square is not None and list(square.input) == [source, source]


def _times(graph: Graph, node: Node | None) -> tuple[str, float]:
    """The value that a node multiplies with a constant, and the constant; ("", 0) if it does something else."""
    if node is not None and node.op_type == "Mul":
        for value, constant in (node.input, reversed(node.input)):
            factor = graph.scalar(constant)
            if factor is not None:
                return str(value), factor
    return "", 0.0
