"""An ONNX graph that is being edited: who makes a value, who uses it, what is constant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from scripts.prepare_model.graph.errors import GraphNotUnderstood

Array = NDArray[Any]
Node = Any

CONTRIB = "com.microsoft"
FLOAT = onnx.TensorProto.FLOAT

_SEEN_THROUGH = frozenset({"Identity", "Transpose", "Cast", "Unsqueeze"})
# What has another element type than its first input.
_MAKES: dict[str, int] = dict.fromkeys(("Shape", "Size", "NonZero", "ArgMax", "ArgMin"), onnx.TensorProto.INT64) | (
    dict.fromkeys(
        ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN", "IsInf"), onnx.TensorProto.BOOL
    )
)


class Graph:
    """Nodes in topological order, weights as numpy arrays by name, and named inputs and outputs.

    Weights of the file it was read from are views of the file's bytes: change them by replacing, never in place.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes: list[Node] = list(model.graph.node)
        self.weights: dict[str, Array] = {}
        for tensor in model.graph.initializer:
            self.weights[tensor.name] = onnx.numpy_helper.to_array(tensor)
        self.inputs: dict[str, Any] = {value.name: value for value in model.graph.input}
        self.outputs: dict[str, Any] = {value.name: value for value in model.graph.output}
        self.opset = max(entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"})
        self._fresh = 0
        self.reindex()

    def reindex(self) -> None:
        """See who makes and uses what; call it after changing `nodes` by hand."""
        self._makers: dict[str, Node] = {name: node for node in self.nodes for name in node.output if name}
        self._users: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                if name:
                    self._users.setdefault(name, []).append(node)

    def maker(self, name: str) -> Node | None:
        """The node that makes a value; None for inputs and weights."""
        return self._makers.get(name)

    def users(self, name: str) -> list[Node]:
        """The nodes that use a value, in order."""
        return self._users.get(name, [])

    def only_user(self, name: str) -> Node | None:
        """The one node that uses a value, if there is exactly one and it is no output."""
        users = self.users(name)
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def constant(self, name: str) -> Array | None:
        """The value of a weight or a Constant node (seen through Identity, Cast, Transpose and Unsqueeze)."""
        if name in self.weights:
            return self.weights[name]
        node = self.maker(name)
        if node is None or node.op_type == "Constant":
            return None if node is None else _constant(node)
        inner = self.constant(node.input[0]) if node.op_type in _SEEN_THROUGH else None
        if inner is None or node.op_type != "Unsqueeze":
            return None if inner is None else _seen_through(node, inner)
        axes = self.constant(node.input[1]) if len(node.input) > 1 else attribute(node, "axes", None)
        return None if axes is None else np.expand_dims(inner, tuple(int(axis) for axis in axes))

    def scalar(self, name: str) -> float | None:
        """The value of a constant of one element."""
        value = self.constant(name)
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None

    def same(self, name: str) -> str:
        """The value behind Identity and float-to-float Cast nodes, which change nothing here."""
        node = self.maker(name)
        while node is not None and (
            node.op_type == "Identity"
            or (node.op_type == "Cast" and attribute(node, "to", 0) == FLOAT and self.kind(node.input[0]) == FLOAT)
        ):
            name = node.input[0]
            node = self.maker(name)
        return name

    def kind(self, name: str) -> int | None:
        """The element type of a value, an onnx.TensorProto.DataType; None where its maker does not tell."""
        while (node := self.maker(name)) is not None:
            if node.op_type == "Cast":
                return int(attribute(node, "to", 0))
            if node.op_type in {"Constant", "ConstantOfShape"}:
                value = attribute(node, "value", None)
                return FLOAT if value is None else int(value.data_type)
            if node.op_type in _MAKES:
                return _MAKES[node.op_type]
            name = node.input[1 if node.op_type == "Where" else 0]
        if name in self.weights:
            return int(onnx.helper.np_dtype_to_tensor_dtype(self.weights[name].dtype))
        return int(self.inputs[name].type.tensor_type.elem_type) if name in self.inputs else None

    def fresh(self, stem: str) -> str:
        """A name that nothing has."""
        self._fresh += 1
        return f"kvbus.{stem}.{self._fresh}"

    def weight(self, stem: str, value: Array) -> str:
        """Add a weight; its name."""
        name = self.fresh(stem)
        self.weights[name] = np.ascontiguousarray(value)
        return name

    def shared(self, stem: str, value: Array) -> str:
        """A small weight that many nodes use; made once."""
        name = f"kvbus.{stem}"
        self.weights.setdefault(name, value)
        return name

    def fill(self, shape: str, value: Array, output: str) -> Node:
        """A node that makes a tensor of that shape with all elements equal."""
        return onnx.helper.make_node(
            "ConstantOfShape", [shape], [output], name=output, value=onnx.numpy_helper.from_array(value)
        )

    def node(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str] | str, *, domain: str = "", **attributes: Any
    ) -> Node:
        """A new node, not yet in the graph. Its name is that of its first output."""
        outputs = [outputs] if isinstance(outputs, str) else list(outputs)
        return onnx.helper.make_node(kind, list(inputs), outputs, name=outputs[0], domain=domain, **attributes)

    def replace(self, at: Node, new: Sequence[Node]) -> None:
        """New nodes where `at` stood; `at` goes. The new ones may make what `at` made."""
        place = next(index for index, node in enumerate(self.nodes) if node is at)
        self.nodes[place : place + 1] = new
        self.reindex()

    def insert_before(self, at: Node, new: Sequence[Node]) -> None:
        """New nodes just before `at`."""
        place = next(index for index, node in enumerate(self.nodes) if node is at)
        self.nodes[place:place] = new
        self.reindex()

    def redirect(self, old: str, new: str, users: Iterable[Node] | None = None) -> None:
        """Let the users of one value use another."""
        for node in list(self.users(old)) if users is None else users:
            for place, name in enumerate(node.input):
                if name == old:
                    node.input[place] = new
        self.reindex()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within the block the graph may be changed in any way; after it, it is what it was."""
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        before = (dict(self.weights), dict(self.inputs), dict(self.outputs))
        try:
            yield
        finally:
            self.nodes = copies
            self.weights, self.inputs, self.outputs = before
            self.reindex()

    def rename(self, old: str, new: str) -> None:
        """Give a value that a node makes another name."""
        for node in self.nodes:
            for names in (node.input, node.output):
                for place, name in enumerate(names):
                    if name == old:
                        names[place] = new
        self.reindex()

    def prune(self) -> None:
        """Drop nodes and weights that no output needs."""
        needed = set(self.outputs)
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if any(name in needed for name in node.output):
                needed.update(name for name in node.input if name)
                kept.append(node)
        self.nodes = kept[::-1]
        self.weights = {name: value for name, value in self.weights.items() if name in needed}
        self.reindex()

    def sort(self) -> None:
        """Put nodes into topological order. Raises GraphNotUnderstood if a value is made by nobody."""
        ready = {*self.inputs, *self.weights, ""}
        waiting, done = list(self.nodes), list[Node]()
        while waiting:
            left: list[Node] = []
            for node in waiting:
                if all(name in ready for name in node.input):
                    ready.update(node.output)
                    done.append(node)
                else:
                    left.append(node)
            if len(left) == len(waiting):
                missing = next(name for name in left[0].input if name not in ready)
                raise GraphNotUnderstood(left[0].name, f"nothing makes {missing}")
            waiting = left
        self.nodes = done
        self.reindex()


def attribute(node: Node, name: str, default: Any) -> Any:
    """A node's attribute, or the default."""
    for entry in node.attribute:
        if entry.name == name:
            return onnx.helper.get_attribute_value(entry)
    return default


def _seen_through(node: Node, inner: Array) -> Array:
    if node.op_type == "Transpose":
        return inner.transpose(attribute(node, "perm", None))
    if node.op_type == "Cast":
        return inner.astype(onnx.helper.tensor_dtype_to_np_dtype(attribute(node, "to", 0)))
    return inner


def _constant(node: Node) -> Array | None:
    value = attribute(node, "value", None)
    return None if value is None else onnx.numpy_helper.to_array(value)
