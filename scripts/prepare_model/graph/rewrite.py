"""The rewrite of an export, step by step."""

from __future__ import annotations

from pathlib import Path

import onnx

from scripts.prepare_model.architecture import Architecture
from scripts.prepare_model.graph.activations import fuse_activations
from scripts.prepare_model.graph.attention import replace_attention
from scripts.prepare_model.graph.editing import Graph
from scripts.prepare_model.graph.errors import GraphNotUnderstood
from scripts.prepare_model.graph.norms import fuse_norms, join_sums
from scripts.prepare_model.graph.tail import choose_rows


def read_export(path: Path) -> Graph:
    """The graph of an export. Raises GraphNotUnderstood for a file that is no ONNX model."""
    try:
        return Graph(onnx.load(path))
    except Exception as error:
        raise GraphNotUnderstood(path.name, str(error).splitlines()[0]) from error


def rewrite(graph: Graph, architecture: Architecture) -> None:
    """From the form optimum exports to the form of edge_agent.model.signature, in float32.

    Raises GraphNotUnderstood, naming the place.
    """
    fuse_norms(graph)
    fuse_activations(graph)
    replace_attention(graph, architecture)
    for node in list(graph.nodes):  # casts from float32 to float32
        if node.op_type == "Cast" and graph.same(node.output[0]) != node.output[0]:
            graph.redirect(node.output[0], graph.same(node.output[0]))
    choose_rows(graph)
    join_sums(graph)
    graph.prune()
    graph.sort()
