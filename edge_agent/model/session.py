"""The exported language model under onnxruntime.

`Model` is one loaded graph; a `LiveContext` is what it has read so far, in a buffer of its own that runs write in
place: nothing is copied from step to step. Any number of live contexts share one model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from threadpoolctl import threadpool_limits

from edge_agent.errors import BundleInvalid, ContextEmpty, ContextTooLong, ModelFailed, ModelUnsupported
from edge_agent.kv.cache import Cache, Float32, Int32, Layer
from edge_agent.kv.transform import TRANSFORM_FILE, Transform
from edge_agent.model.attention import Queries, among_the_last, attention_mass
from edge_agent.model.buffer import Buffer, Form
from edge_agent.model.kernels import products_saturate
from edge_agent.model.manifest import Manifest, read_manifest
from edge_agent.model.plain import PlainKeys, plain_between
from edge_agent.model.rotary import angles, unrotate
from edge_agent.model.signature import (
    FILLED,
    INPUT_IDS,
    LOGIT_ROWS,
    LOGITS,
    ROTATION_FILE,
    TOTAL,
    cosine_name,
    keys_name,
    past_name,
    present_name,
    queries_name,
    sine_name,
    window_bias_name,
)

DEFAULT_PREFILL_CHUNK = 128
CPU = "CPUExecutionProvider"
_NO_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
FIRST_CAPACITY = 256
_NOTHING: Float32 = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How onnxruntime works on this device.

    threads: of one run (0: one per core). spin: whether threads spin while a run goes on; they never do between runs.
    arena: whether freed memory is kept for the next run. flash_attention: attention in tiles, which holds less memory
    when contexts are long; onnxruntime 1.31's is slower than its plain one up to some thousand tokens. provider: of
    onnxruntime; what it can't do the processor does.
    """

    threads: int = 1
    spin: bool = True
    arena: bool = True
    flash_attention: bool = False
    provider: str = CPU

    def session(self, path: Path) -> ort.InferenceSession:
        """A session over the graph at `path`. Raises ModelUnsupported."""
        os.environ[_NO_FLASH] = "0" if self.flash_attention else "1"  # read when a session is made
        has = ort.get_available_providers()
        if self.provider not in has:
            raise ModelUnsupported(
                f"compute.provider: this onnxruntime has no {self.provider}, but {', '.join(has)}; "
                "another build of its package may bring it (docs/flash.md, Jetson)"
            )
        try:
            return ort.InferenceSession(path, self.options(), providers=list(dict.fromkeys((self.provider, CPU))))
        except Exception as error:  # noqa: BLE001 onnxruntime raises bare types of its own
            raise ModelUnsupported(f"{path} can't be loaded: {str(error).splitlines()[0]}") from None

    def share_with_numpy(self) -> None:
        """Give numpy's matrix products, by which caches are coded, as many threads as a run of the model."""
        threadpool_limits(limits=self.threads or os.cpu_count(), user_api="blas")

    def options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # shapes change with every run
        options.enable_cpu_mem_arena = self.arena
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spin else "0")
        options.add_session_config_entry("session.force_spinning_stop", "1")  # other work shares the device
        if products_saturate():  # then weights become unsigned at load, whose kernels are slower and exact
            options.add_session_config_entry("session.x64quantprecision", "1")
        options.log_severity_level = 4  # a failed run is an error of ours, in one line
        return options


class Model:
    """One loaded graph. Runs are safe from several threads, as long as each live context is used by one at a time."""

    def __init__(
        self, bundle: Path, runtime: Runtime | None = None, *, prefill_chunk: int = DEFAULT_PREFILL_CHUNK
    ) -> None:
        self.manifest: Manifest = read_manifest(bundle)
        self.prefill_chunk = prefill_chunk
        self.session = (runtime or Runtime()).session(bundle / self.manifest.model_file)
        self._check_graph()
        self.transform = self._transform(bundle)
        self._rotation = Runtime().session(bundle / ROTATION_FILE)
        self._frequencies = [np.array(row, dtype=np.float32) for row in self.manifest.rotary]
        self.windows = [
            (i, layer.sliding_window) for i, layer in enumerate(self.manifest.layers) if layer.sliding_window
        ]
        self.form = Form(
            len(self.manifest.layers), self.manifest.kv_heads, self.manifest.head_dim, self.manifest.query_heads
        )

    def _transform(self, bundle: Path) -> Transform | None:
        """The bundle's transform of caches. Raises BundleInvalid if it is not the manifest's."""
        if self.manifest.transform is None:
            return None
        transform = Transform.load(bundle / TRANSFORM_FILE)
        layers, width = len(self.manifest.layers), 2 * self.manifest.kv_heads * self.manifest.head_dim
        if (transform.id, transform.layers, transform.width) != (self.manifest.transform, layers, width):
            raise BundleInvalid(f"{bundle / TRANSFORM_FILE} is not the transform of this model; prepare it again")
        return transform

    def _check_graph(self) -> None:
        """Refuse by name what the graph lacks."""
        layers, kinds = range(len(self.manifest.layers)), ("key", "value")
        inputs = {INPUT_IDS, LOGIT_ROWS, FILLED, TOTAL} | {past_name(i, kind) for i in layers for kind in kinds}
        for index in range(len(self.manifest.rotary)):
            inputs |= {cosine_name(index), sine_name(index)}
        inputs |= {window_bias_name(i) for i in layers if self.manifest.layers[i].sliding_window}
        outputs = {LOGITS} | {present_name(i, kind) for i in layers for kind in kinds}
        outputs |= {name(i) for i in layers for name in (keys_name, queries_name)}
        found_in = {node.name for node in self.session.get_inputs()}
        found_out = {node.name for node in self.session.get_outputs()}
        for what, missing in (("input", inputs - found_in), ("output", outputs - found_out)):
            if missing:
                raise ModelUnsupported(f"the graph lacks {what} {min(missing)} ({len(missing)} missing)")
        if extra := found_in - inputs:
            raise ModelUnsupported(f"the graph wants an input this agent does not know: {min(extra)}")

    def new_context(self, *, capacity: int = FIRST_CAPACITY) -> LiveContext:
        """An empty live context with room for `capacity` entries; it grows when it must. Raises MemoryShort."""
        return LiveContext(self, Buffer(self.form, capacity), 0)

    def frequencies(self, layer: int) -> Float32:
        """Rotary frequencies of a layer, float32 (head_dim/2,)."""
        return self._frequencies[self.manifest.layers[layer].rotary]

    def rotated(self, layer: int, keys: Float32, positions: Int32) -> Float32:
        """Keys of a layer, float32 (kv_heads, entries, head_dim), with the phase of positions (entries,).

        By the operator that the graph itself uses: at the same position the same key gets the same bits. positions may
        be (kv_heads, entries), each head's own.
        """
        if positions.ndim > 1:
            heads = [self.rotated(layer, keys[i : i + 1], own) for i, own in enumerate(positions)]
            return np.concatenate(heads)
        cosine, sine = angles(positions, self.frequencies(layer))
        try:
            found: Float32 = self._rotation.run(None, {"keys": keys[None], "cos": cosine, "sin": sine})[0][0]
        except Exception as error:  # noqa: BLE001 onnxruntime raises bare types of its own
            raise ModelFailed(f"keys could not be rotated: {str(error).splitlines()[0]}") from None
        return found

    def unrotated(self, layer: int, keys: Float32, positions: Int32) -> Float32:
        """The inverse of `rotated`, exact up to float32 rounding."""
        frequencies = self.frequencies(layer)
        if positions.ndim == 1:
            return unrotate(keys, positions, frequencies)
        heads = [unrotate(keys[i : i + 1], own, frequencies) for i, own in enumerate(positions)]
        return np.concatenate(heads)

    def angles(self, positions: Int32) -> list[tuple[Float32, Float32]]:
        """Cosines and sines, float32 (tokens, head_dim/2), of each rotary embedding."""
        return [angles(positions, frequencies) for frequencies in self._frequencies]


class LiveContext:
    """What a model has read so far. The next token stands at `next_position`; layers may have fewer entries."""

    def __init__(
        self,
        model: Model,
        buffer: Buffer,
        next_position: int,
        *,
        plain: Sequence[PlainKeys] = (),
        queries: Queries | None = None,
    ) -> None:
        self._model, self._buffer = model, buffer
        self._next_position = next_position
        self._plain, self._queries = list(plain), queries
        self._bindings: dict[tuple[str, ...], ort.IOBinding] = {}

    @property
    def entries(self) -> int:
        """Entries of the fullest layer."""
        return self._buffer.entries

    @property
    def next_position(self) -> int:
        return self._next_position

    @property
    def capacity(self) -> int:
        """Entries that fit before the buffer must grow."""
        return self._buffer.capacity

    def fork(self, *, room: int = 0) -> LiveContext:
        """A copy that goes its own way, with room for so many entries more before it must grow. Raises MemoryShort."""
        buffer = self._buffer.copy(_capacity(self.entries + room), room=room)
        return LiveContext(self._model, buffer, self._next_position, plain=self._plain, queries=self._queries)

    def prefill(
        self,
        ids: Sequence[int],
        *,
        all_logits: bool = False,
        queries: bool = False,
        on_chunk: Callable[[int], None] | None = None,
    ) -> Float32:
        """Read ids in chunks. Returns logits, float32 (vocabulary,) after the last, or (len(ids), vocabulary) for all.

        Keys without phase are kept, so that what is read here can be extracted exactly. queries: remember the last ones
        for `attention_mass`. on_chunk is called with the number of ids read so far.
        Raises ContextEmpty, ContextTooLong, MemoryShort, ModelFailed.
        """
        rows: list[Float32] = []
        for last_of, chunk in self.chunks(ids):
            last: Literal["last"] | None = "last" if last_of == len(ids) else None
            wanted = queries and among_the_last(len(ids) - last_of)
            rows.append(self.step(chunk, logits="all" if all_logits else last, keys=True, queries=wanted))
            if on_chunk:
                on_chunk(last_of)
        return np.concatenate(rows) if all_logits else rows[-1]

    def chunks(self, ids: Sequence[int]) -> list[tuple[int, Int32]]:
        """The pieces in which ids are to be read: (ids read once it is done, piece). Raises like prefill."""
        if not len(ids):
            raise ContextEmpty("no tokens to prefill")
        self.reserve(len(ids))
        array = np.asarray(ids, dtype=np.int32)
        size = self._model.prefill_chunk
        return [(min(at + size, len(array)), array[at : at + size]) for at in range(0, len(array), size)]

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens more. Raises ContextTooLong, MemoryShort; nothing is changed then."""
        window = self._model.manifest.window_tokens
        if self._next_position + tokens > window:
            raise ContextTooLong(self._next_position + tokens, window)
        if self.entries + tokens > self.capacity:
            self._buffer = self._buffer.copy(_capacity(self.entries + tokens), room=tokens)
            self._bindings.clear()

    def step(
        self, ids: Int32, *, logits: Literal["last", "all"] | None, keys: bool = False, queries: bool = False
    ) -> Float32:
        """One run over ids. logits: None for an empty array, "last" (vocabulary,) or "all" (len(ids), vocabulary).

        keys: keep the tokens' keys without phase, for an exact `extract`; queries: for `attention_mass`.
        Raises ContextTooLong, MemoryShort, ModelFailed; what was read before is intact then.
        """
        self.reserve(len(ids))
        positions = np.arange(self._next_position, self._next_position + len(ids), dtype=np.int32)
        layers = range(self._model.form.layers)
        outputs = [LOGITS, *(keys_name(i) for i in layers if keys), *(queries_name(i) for i in layers if queries)]
        binding = self._bound(outputs)
        for name in outputs:
            binding.bind_output(name)  # made anew by every run, or it would have to fit the last one's
        for name, array in self._feeds(ids, positions, logits).items():
            binding.bind_cpu_input(name, array)
        try:
            self._model.session.run_with_iobinding(binding)
        except Exception as error:  # noqa: BLE001 onnxruntime raises bare types of its own
            raise ModelFailed(f"the model run failed: {str(error).splitlines()[0]}") from None
        self._buffer.note(positions)
        self._next_position += len(ids)
        vector = binding.get_outputs_as_ortvaluevector()
        found = [vector[index].numpy()[0] for index in range(len(outputs))]
        if keys:
            self._plain.append(PlainKeys(int(positions[0]), tuple(found[1 : 1 + len(layers)])))
        if queries:
            self._queries = Queries.after(self._queries, positions, found[-len(layers) :])
        rows: Float32 = found[0]
        return rows if logits == "all" else rows[0] if logits == "last" else _NOTHING

    def _bound(self, outputs: Sequence[str]) -> ort.IOBinding:
        """The graph's view of this buffer, after these outputs: it reads it and writes behind what is filled."""
        if tuple(outputs) in self._bindings:
            return self._bindings[tuple(outputs)]
        binding = self._model.session.io_binding()
        for name in outputs:
            binding.bind_output(name)
        names = [(layer, kind) for layer in range(self._model.form.layers) for kind in ("key", "value")]
        for (layer, kind), value in zip(names, self._buffer.values, strict=True):
            binding.bind_ortvalue_input(past_name(layer, kind), value)
            binding.bind_ortvalue_output(present_name(layer, kind), value)
        self._bindings[tuple(outputs)] = binding
        return binding

    def _feeds(self, ids: Int32, positions: Int32, logits: str | None) -> dict[str, npt.NDArray[Any]]:
        count, total = len(ids), self.entries + len(ids)
        first = 0 if logits == "all" else count - 1
        feeds: dict[str, npt.NDArray[Any]] = {
            INPUT_IDS: np.ascontiguousarray(ids, dtype=np.int64)[None],
            LOGIT_ROWS: np.arange(first, count, dtype=np.int64),
            FILLED: self._buffer.filled + np.int32(count - 1),
            TOTAL: np.array(total, dtype=np.int32),
        }
        for index, (cosine, sine) in enumerate(self._model.angles(positions)):
            feeds[cosine_name(index)], feeds[sine_name(index)] = cosine, sine
        for layer, window in self._model.windows:
            feeds[window_bias_name(layer)] = self._buffer.window_bias(layer, window, positions, total)
        return feeds

    def attention_mass(self) -> list[Float32]:
        """Share of the attention of the last queries (at most 32) that falls on each entry, by layer and KV head.

        Float32 (kv_heads, entries) for each layer, the mean over the queries and over the query heads of a KV head, so
        that each row sums to one. The queries are those of the last tokens read with `queries`. Raises ModelUnsupported
        if there are none.
        """
        if self._queries is None:
            raise ModelUnsupported("no queries were kept: read the tokens with queries=True")
        return [
            attention_mass(
                self._queries.layers[layer],
                self._queries.positions,
                self._buffer.keys(layer),
                self._buffer.positions(layer),
                scale=self._model.manifest.layers[layer].scale,
                window=self._model.manifest.layers[layer].sliding_window,
            )
            for layer in range(self._model.form.layers)
        ]

    def rewind(self, position: int) -> None:
        """Forget what was read from `position` on, which is read next.

        Of the queries that were kept for `attention_mass`, those before it stay; earlier ones do not come back.
        Raises ModelUnsupported for a position that was not read, or inside entries that differ by head.
        """
        if not 0 <= position <= self._next_position:
            raise ModelUnsupported(f"position {position} of {self._next_position} can't be gone back to")
        self._buffer.forget(position)
        self._plain = [cut for keys in self._plain if (cut := keys.before(position)) is not None]
        self._queries = self._queries and self._queries.before(position)
        self._next_position = position

    def extract(self, start: int, stop: int, *, mass: bool = False) -> Cache:
        """The entries at positions [start, stop) as a cache: keys without phase, positions relative to start.

        Exact where keys were kept while they were read, else within float32 rounding. mass: with the attention that
        the last tokens paid to each entry. Raises ModelUnsupported for positions that were not read, or if mass is
        wanted and no queries were kept, or for a bound inside entries that differ by head.
        """
        if not 0 <= start <= stop <= self._next_position:
            raise ModelUnsupported(f"positions {start} to {stop} of {self._next_position} can't be extracted")
        layers = []
        plain = plain_between(self._plain, start, stop)
        masses = self.attention_mass() if mass else None
        for index in range(self._model.form.layers):
            positions = self._buffer.positions(index)
            first, last = self._buffer.counted(index, start), self._buffer.counted(index, stop)
            values = self._buffer.layer_values(index)[:, first:last].copy()
            at = positions[..., first:last]
            if at.ndim > 1 and (at == at[0]).all():
                at = at[0]
            if plain is None:
                keys = self._model.unrotated(index, self._buffer.keys(index)[:, first:last], at)
            else:
                keys = np.ascontiguousarray(plain[index].reshape(last - first, *values.shape[::2]).transpose(1, 0, 2))
            share = None if masses is None else masses[index][:, first:last].copy()
            layers.append(Layer(keys, values, at - np.int32(start), share))
        return Cache(tuple(layers))

    def append(self, cache: Cache, *, tokens: int | None = None) -> None:
        """Put a cache after what was read: its entry at relative position p stands at next_position + p.

        tokens: how many positions the context spans (default: up to its last entry); layers may have any part of them.
        Raises ContextTooLong, MemoryShort, CacheInvalid, ModelFailed, and ModelUnsupported for one it can't hold;
        nothing is changed then.
        """
        form = self._model.form
        if len(cache.layers) != form.layers:
            raise ModelUnsupported(f"a cache of {len(cache.layers)} layers does not fit {form.layers}")
        cache.check_form()
        for index, layer in enumerate(cache.layers):
            heads, _, head_dim = layer.keys.shape
            if (heads, head_dim) != (form.kv_heads, form.head_dim):
                raise ModelUnsupported(
                    f"layer {index} of a cache has {heads} KV heads of {head_dim}, "
                    f"the model {form.kv_heads} of {form.head_dim}"
                )
        last = max((int(layer.positions[..., -1].max()) + 1 for layer in cache.layers if layer.entries), default=0)
        span = last if tokens is None else tokens
        if last > span:
            raise ModelUnsupported(f"a cache with an entry at position {last - 1} does not fit {span} tokens")
        self.reserve(span)
        try:
            for index, layer in enumerate(cache.layers):
                landing = layer.positions + np.int32(self._next_position)
                self._buffer.write(index, self._model.rotated(index, layer.keys, landing), layer.values, landing)
        except ModelFailed:
            self._buffer.forget(self._next_position)
            raise
        self._next_position += span


def _capacity(entries: int) -> int:
    """The next power of two: buffers grow by doubling."""
    return max(FIRST_CAPACITY, 1 << (entries - 1).bit_length())
