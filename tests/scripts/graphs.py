"""Small graphs for tests, and what they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from scripts.prepare_model.graph.editing import Graph, Node
from scripts.prepare_model.graph.storing import save

Array = NDArray[Any]


def node(kind: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes: Any) -> Node:
    return onnx.helper.make_node(kind, list(inputs), [output], name=output, domain=domain, **attributes)


def graph_of(
    nodes: Sequence[Node],
    weights: Mapping[str, Array],
    outputs: Sequence[str],
    *,
    inputs: Mapping[str, tuple[int, list[Any]]],
) -> Graph:
    """A graph of nodes; inputs: element type and shape by name."""
    return Graph(
        onnx.helper.make_model(
            onnx.helper.make_graph(
                list(nodes),
                "test",
                [onnx.helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
                [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
                initializer=[onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
            ),
            opset_imports=[onnx.helper.make_opsetid("", 18)],
        )
    )


def run(graph: Graph, directory: Path, feeds: Mapping[str, Array]) -> list[Array]:
    """What a graph computes, by way of a file."""
    save(graph, directory / "graph.onnx")
    session = ort.InferenceSession(directory / "graph.onnx", providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def kinds(graph: Graph) -> list[str]:
    return [each.op_type for each in graph.nodes]


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
