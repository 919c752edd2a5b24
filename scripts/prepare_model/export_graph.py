"""The graph as optimum exports it, under plain onnxruntime: what the rewritten one is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from scripts.prepare_model.architecture import Architecture
from scripts.prepare_model.errors import ExportFailed

MODEL_FILE = "model.onnx"


class ExportGraph:
    """The exported graph with its past, fed by name. Raises ExportFailed if its inputs are not the model's."""

    def __init__(self, path: Path, architecture: Architecture) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs = {node.name for node in self._session.get_inputs()}
        self._outputs = [node.name for node in self._session.get_outputs()]
        self._shape = (architecture.kv_heads, 0, architecture.head_dim)
        self._past: dict[str, NDArray[np.float32]] = {}
        self._read = 0
        self.restart()
        if len(self._past) != 2 * len(architecture.layers):
            raise ExportFailed(
                f"the exported graph has {len(self._past)} past inputs for {len(architecture.layers)} layers"
            )

    def restart(self, *, batch: int = 1) -> None:
        """Forget what was read; from here on so many rows are read side by side."""
        empty = np.zeros((batch, *self._shape), dtype=np.float32)
        self._past = {name: empty for name in self._inputs if name.startswith("past_key_values.")}
        self._read = 0

    def run(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits (batch, tokens, vocabulary) of ids (batch, tokens) after what was read."""
        batch, tokens = ids.shape
        end = self._read + tokens
        feeds: dict[str, NDArray[Any]] = {
            **self._past,
            "input_ids": ids,
            "attention_mask": np.ones((batch, end), dtype=np.int64),
            "position_ids": np.tile(np.arange(self._read, end, dtype=np.int64), (batch, 1)),
        }
        found = self._session.run(None, {name: value for name, value in feeds.items() if name in self._inputs})
        results = dict(zip(self._outputs, found, strict=True))
        self._past = {name: results[name.replace("past_key_values", "present")] for name in self._past}
        self._read = end
        logits: NDArray[np.float32] = results["logits"]
        return logits
