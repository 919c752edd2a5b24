"""The exported language model under onnxruntime.

`Model` is one loaded graph; a `LiveContext` is what it has read so far: past keys (rotated, as the graph wants them)
and values, entry by entry. Live contexts are cheap to fork, since a run never changes the arrays it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edge_agent.errors import ContextEmpty, ContextTooLong, ModelFailed, ModelUnsupported
from edge_agent.kv.cache import Cache, Float32, Int32, Layer
from edge_agent.model.manifest import Manifest, read_manifest
from edge_agent.model.rotary import rotate, unrotate

DEFAULT_PREFILL_CHUNK = 128


class Model:
    """One loaded graph. Thread-safe for runs; threads: intra-op threads (0: one per core)."""

    def __init__(self, bundle: Path, *, threads: int = 1, prefill_chunk: int = DEFAULT_PREFILL_CHUNK) -> None:
        self.manifest: Manifest = read_manifest(bundle)
        self.prefill_chunk = prefill_chunk
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # shapes change with every run
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # several agents may share a machine
        options.log_severity_level = 3
        path = bundle / self.manifest.model_file
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 onnxruntime raises bare types of its own
            raise ModelUnsupported(f"{path} can't be loaded: {str(error).splitlines()[0]}") from None
        self._inputs = {node.name for node in self._session.get_inputs()}
        self._outputs = [node.name for node in self._session.get_outputs()]
        self._check_graph()
        self._frequencies = [np.array(row, dtype=np.float32) for row in self.manifest.rotary]
        self._states = [
            f"past_key_values.{index}.{kind}" for index in range(len(self.manifest.layers)) for kind in ("key", "value")
        ]
        self._presents = [name.replace("past_key_values", "present") for name in self._states]

    def _check_graph(self) -> None:
        """Refuse by name what the graph lacks."""
        layers = range(len(self.manifest.layers))
        wanted_in = {"input_ids", "attention_mask"} | {
            f"past_key_values.{i}.{kind}" for i in layers for kind in ("key", "value")
        }
        wanted_out = {"logits"} | {f"present.{i}.{kind}" for i in layers for kind in ("key", "value")}
        for what, missing, extra in (
            ("input", wanted_in - self._inputs, self._inputs - wanted_in - {"position_ids"}),
            ("output", wanted_out - set(self._outputs), set[str]()),
        ):
            if missing:
                raise ModelUnsupported(f"the exported graph lacks {what} {min(missing)} ({len(missing)} missing)")
            if extra:
                raise ModelUnsupported(f"the exported graph wants an {what} this agent does not know: {min(extra)}")

    def new_context(self) -> LiveContext:
        """An empty live context."""
        shape = (1, self.manifest.kv_heads, 0, self.manifest.head_dim)
        empty = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=np.float32))
        return LiveContext(self, [empty] * len(self._states), np.zeros(0, dtype=np.int32))

    def frequencies(self, layer: int) -> Float32:
        """Rotary frequencies of a layer, float32 (head_dim/2,)."""
        return self._frequencies[self.manifest.layers[layer].rotary]

    def run(
        self, ids: Int32, positions: Int32, past: list[ort.OrtValue], *, logits: bool
    ) -> tuple[ort.OrtValue | None, list[ort.OrtValue]]:
        """One run of the graph over ids after past. Returns the logits (if wanted) and the new past."""
        entries = past[0].shape()[2]
        feeds = dict(zip(self._states, past, strict=True))
        feeds["input_ids"] = _int64(ids)
        feeds["attention_mask"] = _int64(np.ones(entries + len(ids), dtype=np.int64))
        if "position_ids" in self._inputs:
            feeds["position_ids"] = _int64(positions)
        elif len(positions) and int(positions[0]) != entries:
            raise ModelUnsupported("this graph has no position_ids: entries can only stand at their own positions")
        names = (["logits"] if logits else []) + self._presents
        try:
            out = self._session.run_with_ort_values(names, feeds)
        except Exception as error:  # noqa: BLE001 onnxruntime raises bare types of its own
            raise ModelFailed(f"the model run failed: {str(error).splitlines()[0]}") from None
        return (out[0], out[1:]) if logits else (None, out)


class LiveContext:
    """What a model has read so far. `entries` counts cache entries; the next token stands at `next_position`."""

    def __init__(self, model: Model, past: list[ort.OrtValue], positions: Int32) -> None:
        self._model = model
        self._past = past
        self._positions = positions

    @property
    def entries(self) -> int:
        return int(self._positions.shape[0])

    @property
    def next_position(self) -> int:
        return int(self._positions[-1]) + 1 if self.entries else 0

    def fork(self) -> LiveContext:
        """A copy that goes its own way; shares what was read so far."""
        return LiveContext(self._model, list(self._past), self._positions)

    def prefill(
        self, ids: Sequence[int], *, all_logits: bool = False, on_chunk: Callable[[int], None] | None = None
    ) -> Float32:
        """Read ids in chunks. Returns logits, float32 (vocabulary,) after the last, or (len(ids), vocabulary) for all.

        on_chunk is called with the number of ids read so far. Raises ContextEmpty, ContextTooLong.
        """
        rows: list[Float32] = []
        for last_of, chunk in self.chunks(ids):
            rows.append(self.step(chunk, logits="all" if all_logits else "last" if last_of == len(ids) else None))
            if on_chunk:
                on_chunk(last_of)
        return np.concatenate(rows) if all_logits else rows[-1]

    def chunks(self, ids: Sequence[int]) -> list[tuple[int, Int32]]:
        """The pieces in which ids are to be read: (ids read once it is done, piece). Raises like prefill."""
        if not len(ids):
            raise ContextEmpty("no tokens to prefill")
        self.check_room(len(ids))
        array = np.asarray(ids, dtype=np.int32)
        size = self._model.prefill_chunk
        return [(min(at + size, len(array)), array[at : at + size]) for at in range(0, len(array), size)]

    def check_room(self, tokens: int) -> None:
        """Raise ContextTooLong if so many tokens more would not fit the window."""
        window = self._model.manifest.window_tokens
        if self.next_position + tokens > window:
            raise ContextTooLong(self.next_position + tokens, window)

    def step(self, ids: Int32, *, logits: str | None) -> Float32:
        """One run over ids. logits: None, "last" (vocabulary,) or "all" (len(ids), vocabulary)."""
        start = self.next_position
        positions = np.arange(start, start + len(ids), dtype=np.int32)
        out, past = self._model.run(ids, positions, self._past, logits=logits is not None)
        self._past, self._positions = past, np.concatenate([self._positions, positions])
        if out is None:
            return np.zeros(0, dtype=np.float32)
        rows: Float32 = out.numpy()[0]
        return rows if logits == "all" else rows[-1].copy()

    def extract(self, start: int, stop: int) -> Cache:
        """Entries [start, stop) as a cache: keys without phase, positions relative to the first of them."""
        if not 0 <= start <= stop <= self.entries:
            raise ModelUnsupported(f"entries {start} to {stop} of {self.entries} can't be extracted")
        positions = self._positions[start:stop]
        relative = positions - (positions[0] if len(positions) else 0)
        layers = []
        for index in range(len(self._past) // 2):
            keys = self._past[2 * index].numpy()[0, :, start:stop]
            values = np.ascontiguousarray(self._past[2 * index + 1].numpy()[0, :, start:stop])
            layers.append(Layer(unrotate(keys, positions, self._model.frequencies(index)), values, relative))
        return Cache(tuple(layers))

    def append(self, cache: Cache, *, tokens: int | None = None) -> None:
        """Put a cache after what was read: its entry at relative position p stands at next_position + p.

        tokens: how many positions the context spans (default: up to its last entry). Raises ContextTooLong, and
        ModelUnsupported for a cache this graph can't hold (another number of layers, or entries that differ by layer).
        """
        if len(cache.layers) != len(self._past) // 2:
            raise ModelUnsupported(f"a cache of {len(cache.layers)} layers does not fit {len(self._past) // 2}")
        positions = cache.layers[0].positions
        if any(not np.array_equal(layer.positions, positions) for layer in cache.layers[1:]):
            raise ModelUnsupported("this graph can't hold different entries in different layers")
        span = tokens if tokens is not None else (int(positions[-1]) + 1 if len(positions) else 0)
        if span != len(positions):
            raise ModelUnsupported(f"this graph can't hold a context of {span} tokens in {len(positions)} entries")
        self.check_room(span)
        landing = positions + np.int32(self.next_position)
        past = []
        for index, layer in enumerate(cache.layers):
            keys = rotate(layer.keys, landing, self._model.frequencies(index))
            for old, new in zip(self._past[2 * index : 2 * index + 2], (keys, layer.values), strict=True):
                joined = np.concatenate([old.numpy(), new[None]], axis=2)
                past.append(ort.OrtValue.ortvalue_from_numpy(joined))
        self._past, self._positions = past, np.concatenate([self._positions, landing])


def _int64(values: Int32) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values, dtype=np.int64)[None])
