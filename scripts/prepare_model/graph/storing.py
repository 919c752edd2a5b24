"""A graph on disk: model.onnx with the structure, and beside it one file with the weights, laid out to be mapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from scripts.prepare_model.graph.editing import CONTRIB, FLOAT, Array, Graph

DATA_SUFFIX = ".weights"
_SMALL_BYTES = 256
"""Weights below that stay in the graph: shape inference at load wants to see them."""
_PAGE_BYTES = 4_096
_IR_VERSION = 10
_PRODUCER = "kvbus"


def save(graph: Graph, path: Path) -> None:
    """Write what the outputs need of a graph to `path` and its weights beside it, making directories as needed.

    Weights begin on pages, so that a runtime can map them instead of reading them.
    """
    graph.prune()
    graph.sort()
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_name(path.name + DATA_SUFFIX)
    tensors, offset = [], 0
    with place.open("wb") as file:
        for name, value in sorted(graph.weights.items()):
            if value.nbytes < _SMALL_BYTES:
                tensors.append(onnx.numpy_helper.from_array(value, name))
                continue
            offset = -(-offset // _PAGE_BYTES) * _PAGE_BYTES
            file.seek(offset)
            file.write(np.ascontiguousarray(value).data.cast("B"))
            tensors.append(_external(name, value, place.name, offset))
            offset += value.nbytes
    values = list(graph.inputs.values()), list(graph.outputs.values())
    _write(onnx.helper.make_graph(graph.nodes, "kvbus", *values, initializer=tensors), graph.opset, path)


def save_rotation(path: Path, *, head_dim: int, opset: int) -> None:
    """Write the rotation of keys by itself: see edge_agent.model.signature."""

    def value(name: str, shape: list[str | int]) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, FLOAT, shape)

    keys: list[str | int] = [1, "heads", "entries", head_dim]
    angles: list[str | int] = ["entries", head_dim // 2]
    first_row = onnx.numpy_helper.from_array(np.zeros(1, dtype=np.int64), "first_row")
    rotate = onnx.helper.make_node(
        "RotaryEmbedding", ["keys", "first_row", "cos", "sin"], ["rotated"], name="rotate", domain=CONTRIB
    )
    inputs = [value("keys", keys), value("cos", angles), value("sin", angles)]
    _write(onnx.helper.make_graph([rotate], "rotation", inputs, [value("rotated", keys)], [first_row]), opset, path)


def _write(graph: onnx.GraphProto, opset: int, path: Path) -> None:
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(CONTRIB, 1)],
        producer_name=_PRODUCER,
        ir_version=_IR_VERSION,
    )
    onnx.save(model, path)


def _external(name: str, value: Array, location: str, offset: int) -> onnx.TensorProto:
    tensor = onnx.TensorProto(
        name=name,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(value.dtype),
        dims=value.shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, entry in (("location", location), ("offset", offset), ("length", value.nbytes)):
        tensor.external_data.add(key=key, value=str(entry))
    return tensor
