"""What flows into each group of products, for choosing how to quantize them: a float32 graph that gives it out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from edge_agent.kv.cache import Float32
from edge_agent.model.rotary import angles
from edge_agent.model.signature import (
    FILLED,
    INPUT_IDS,
    LOGIT_ROWS,
    TOTAL,
    cosine_name,
    past_name,
    sine_name,
    window_bias_name,
)
from scripts.prepare_model.architecture import Architecture
from scripts.prepare_model.graph.editing import FLOAT, Graph
from scripts.prepare_model.graph.storing import DATA_SUFFIX, save
from scripts.prepare_model.graph.weights import sites

SAMPLED_ROWS = 32
"""Rows kept of each text: enough to see a channel's size, few enough to compare forms in seconds."""

MAX_TOKENS = 192


def capture(
    graph: Graph, scratch: Path, architecture: Architecture, texts: Sequence[Sequence[int]], *, seed: int = 0
) -> dict[str, Float32]:
    """Rows of the activation of every site, float32 (rows, channels), while the model reads texts (token ids)."""
    names = [site.activation for site in sites(graph)]
    path = scratch / "capture.onnx"
    with graph.kept():
        graph.outputs |= {
            name: onnx.helper.make_tensor_value_info(name, FLOAT, [1, "any", "channels"]) for name in names
        }
        save(graph, path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(seed)
    rows: dict[str, list[Float32]] = {name: [] for name in names}
    for ids in texts:
        for name, found in zip(names, session.run(names, _feeds(architecture, ids[:MAX_TOKENS])), strict=True):
            rows[name].append(_some(np.asarray(found[0], dtype=np.float32), rng))
    del session
    for left in (path, path.with_name(path.name + DATA_SUFFIX)):
        left.unlink()
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def _some(rows: Float32, rng: np.random.Generator) -> Float32:
    """A few rows: the first, on which attention sinks stand, and random others."""
    if len(rows) <= SAMPLED_ROWS:
        return rows
    others = rng.choice(np.arange(1, len(rows)), SAMPLED_ROWS - 1, replace=False)
    chosen: Float32 = rows[np.sort(np.concatenate([[0], others]))]
    return chosen


def _feeds(architecture: Architecture, ids: Sequence[int]) -> dict[str, NDArray[Any]]:
    """One run over a text from its beginning."""
    count = len(ids)
    positions = np.arange(count, dtype=np.int32)
    empty = np.zeros((1, architecture.kv_heads, count, architecture.head_dim), dtype=np.float32)
    feeds: dict[str, NDArray[Any]] = {
        INPUT_IDS: np.array([ids], dtype=np.int64),
        LOGIT_ROWS: np.arange(count, dtype=np.int64),
        FILLED: np.full(len(architecture.layers), count - 1, dtype=np.int32),
        TOTAL: np.array(count, dtype=np.int32),
    }
    for index, frequencies in enumerate(architecture.rotary):
        cosine, sine = angles(positions, np.array(frequencies, dtype=np.float32))
        feeds[cosine_name(index)], feeds[sine_name(index)] = cosine, sine
    for layer, spec in enumerate(architecture.layers):
        feeds |= {past_name(layer, kind): empty for kind in ("key", "value")}
        if spec.sliding_window:
            feeds[window_bias_name(layer)] = np.zeros((1, 1, count, count), dtype=np.float32)
    return feeds
