"""The end of the graph: everything after the last attention runs for the tokens only whose logits are wanted."""

from __future__ import annotations

import onnx

from edge_agent.model.signature import LOGIT_ROWS, LOGITS
from scripts.prepare_model.graph.editing import FLOAT, Graph
from scripts.prepare_model.graph.errors import GraphNotUnderstood


def choose_rows(graph: Graph) -> None:
    """Let an input, logit_rows, choose the tokens that go on after the last layer's attention."""
    last = [node for node in graph.nodes if node.op_type == "GroupQueryAttention"][-1]
    after = downstream(graph, last.output[0])
    if LOGITS not in after:
        raise GraphNotUnderstood(LOGITS, "they do not depend on the last layer's attention")
    crossing = {
        name: None
        for node in graph.nodes
        if after & set(node.output)
        for name in node.input
        if name and name not in after and graph.constant(name) is None
    }
    for name in crossing:
        if name in graph.inputs:
            raise GraphNotUnderstood(LOGITS, f"they depend on {name} directly")
        if graph.kind(name) != FLOAT:  # a shape, say, has no rows to choose from
            raise GraphNotUnderstood(LOGITS, f"they depend on {name}, which is no activation")
        chosen = graph.fresh("chosen")
        users = [node for node in graph.users(name) if after & set(node.output)]
        graph.redirect(name, chosen, users)
        graph.insert_before(users[0], [graph.node("Gather", [name, LOGIT_ROWS], chosen, axis=1)])
    graph.inputs[LOGIT_ROWS] = onnx.helper.make_tensor_value_info(LOGIT_ROWS, onnx.TensorProto.INT64, ["rows"])
    vocabulary = graph.outputs[LOGITS].type.tensor_type.shape.dim[2].dim_value
    graph.outputs[LOGITS] = onnx.helper.make_tensor_value_info(LOGITS, FLOAT, [1, "rows", vocabulary])
    graph.sort()


def downstream(graph: Graph, name: str) -> set[str]:
    """Values that depend on a value, the value itself left out."""
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        for node in graph.users(waiting.pop()):
            new = set(node.output) - reached
            reached |= new
            waiting += new
    return reached
