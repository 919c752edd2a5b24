"""Root-mean-square norms, seven nodes each in an export, as one SimplifiedLayerNormalization."""

from __future__ import annotations

from scripts.prepare_model.graph.editing import CONTRIB, Graph, Node, attribute

NORM, SKIP_NORM = "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"


def fuse_norms(graph: Graph) -> int:
    """Replace every `x / sqrt(mean(x²) + ε) · weight` over the last axis. Returns how many there were.

    What has another form is left as it is: it computes the same.
    """
    found = 0
    for square in [node for node in graph.nodes if node.op_type == "Pow"]:
        found += _fuse(graph, square)
    graph.prune()
    return found


def join_sums(graph: Graph) -> int:
    """Let norms of a sum compute the sum as well. Returns how many do."""
    found = 0
    for norm in [node for node in graph.nodes if node.op_type == NORM]:
        total = graph.maker(norm.input[0])
        if total is None or total.op_type != "Add" or any(graph.constant(name) is not None for name in total.input):
            continue
        outputs = [norm.output[0], "", "", total.output[0]]
        epsilon = attribute(norm, "epsilon", 1e-5)
        joined = graph.node(SKIP_NORM, [*total.input, norm.input[1]], outputs, domain=CONTRIB, epsilon=epsilon)
        graph.nodes = [node for node in graph.nodes if node is not norm]
        graph.replace(total, [joined])
        found += 1
    return found


def _fuse(graph: Graph, square: Node) -> bool:
    source = graph.same(square.input[0])
    mean = _next(graph, square, "ReduceMean") if graph.scalar(square.input[1]) == 2 else None
    if mean is None or _axes(graph, mean) != [-1] or not attribute(mean, "keepdims", 1):
        return False
    shifted = _next(graph, mean, "Add")
    epsilon = None if shifted is None else _constant_operand(graph, shifted)
    root = None if shifted is None else _next(graph, shifted, "Sqrt")
    if root is None or epsilon is None:
        return False
    inverse = _next(graph, root, "Div") or _next(graph, root, "Reciprocal")
    if inverse is None or (inverse.op_type == "Div" and graph.scalar(inverse.input[0]) != 1):
        return False
    scaled = _next(graph, inverse, "Mul")
    if scaled is None or source not in {graph.same(name) for name in scaled.input}:
        return False
    weighted = _next(graph, scaled, "Mul") or _next_through_cast(graph, scaled)
    vectors = {} if weighted is None else {name: graph.constant(name) for name in weighted.input}
    weight, value = next(((n, v) for n, v in vectors.items() if v is not None and v.ndim == 1), ("", None))
    if weighted is None or value is None:
        return False
    scale = weight if weight in graph.weights else graph.weight("norm", value)
    fused = graph.node(NORM, [source, scale], list(weighted.output), axis=-1, epsilon=epsilon, stash_type=1)
    graph.replace(weighted, [fused])
    return True


def _next(graph: Graph, node: Node, kind: str) -> Node | None:
    user = graph.only_user(node.output[0])
    return user if user is not None and user.op_type == kind else None


def _next_through_cast(graph: Graph, node: Node) -> Node | None:
    cast = _next(graph, node, "Cast")
    return None if cast is None else _next(graph, cast, "Mul")


def _axes(graph: Graph, node: Node) -> list[int] | None:
    axes = graph.constant(node.input[1]) if len(node.input) > 1 else attribute(node, "axes", None)
    return None if axes is None else [int(axis) for axis in axes]


def _constant_operand(graph: Graph, node: Node) -> float | None:
    return next((value for name in node.input if (value := graph.scalar(name)) is not None), None)
