"""The buffer a context's keys and values live in while a model works on them: allocated once, written in place."""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
import psutil

from edge_agent.errors import MemoryShort, ModelUnsupported
from edge_agent.kv.cache import Float32, Int32

RESERVE_BYTES = 16 << 20
"""Memory that stays free when a buffer is made: the run itself needs some, and so do others."""


MASKED = np.float32(-1e30)
"""Added to a score that a window does not reach: no weight is left of it in float32."""


@dataclass(frozen=True)
class Form:
    """What one entry of every layer looks like."""

    layers: int
    kv_heads: int
    head_dim: int
    query_heads: int = 1

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry in all layers, keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 4


class Buffer:
    """Room for `capacity` entries in every layer; `filled` says how many of them each layer has.

    Entries are rotated keys and values, float32, as the graph wants them, in front of the room that is left. The
    operating system gives memory for what is written only, so room that is not used costs none.
    Raises MemoryShort if `used` entries would not fit the free memory.
    """

    def __init__(self, form: Form, capacity: int, *, used: int = 0) -> None:
        free = psutil.virtual_memory().available
        if used * form.entry_bytes + RESERVE_BYTES > free:
            raise MemoryShort(used * form.entry_bytes + RESERVE_BYTES, free)
        self.form, self.capacity = form, capacity
        try:
            memory = reserve(capacity * form.entry_bytes)
        except (OSError, MemoryError):
            raise MemoryShort(capacity * form.entry_bytes, free) from None
        shape = (form.layers, 2, form.kv_heads, capacity, form.head_dim)
        self._block: Float32 = np.frombuffer(memory, dtype=np.float32).reshape(shape)
        self.filled: Int32 = np.zeros(form.layers, dtype=np.int32)
        self._positions: Int32 = np.zeros((form.layers, form.kv_heads, capacity), dtype=np.int32)
        self._apart = np.zeros(form.layers, dtype=bool)
        """Of each layer, whether its heads hold entries of different tokens."""
        self.values = [
            ort.OrtValue.ortvalue_from_numpy(self._block[layer, kind][None])
            for layer in range(form.layers)
            for kind in (0, 1)
        ]
        """Key 0, value 0, key 1, …: float32 (1, kv_heads, capacity, head_dim), sharing this buffer's memory."""

    @property
    def entries(self) -> int:
        """Entries of the fullest layer."""
        return int(self.filled.max())

    def keys(self, layer: int) -> Float32:
        """Rotated keys of a layer, (kv_heads, entries, head_dim), a view."""
        return self._block[layer, 0, :, : self.filled[layer]]

    def layer_values(self, layer: int) -> Float32:
        """Values of a layer, (kv_heads, entries, head_dim), a view."""
        return self._block[layer, 1, :, : self.filled[layer]]

    def positions(self, layer: int) -> Int32:
        """Positions of a layer's entries, a view: (entries,), or (kv_heads, entries) where heads differ."""
        heads = slice(None) if self._apart[layer] else 0
        return self._positions[layer, heads, : self.filled[layer]]

    def counted(self, layer: int, position: int) -> int:
        """A layer's entries before a position. Raises ModelUnsupported if its heads have not as many there."""
        counts = np.atleast_1d((self.positions(layer) < position).sum(axis=-1))
        if np.any(counts != counts[0]):
            raise ModelUnsupported(f"position {position} is inside entries that differ by head")
        return int(counts[0])

    def note(self, positions: Int32) -> None:
        """Entries that a run has written behind those of every layer, at these positions."""
        count = len(positions)
        if self.entries + count > self.capacity:
            raise ValueError(f"{count} entries more than the buffer's {self.capacity} were written")
        for layer, filled in enumerate(self.filled):
            self._positions[layer, :, filled : filled + count] = positions
        self.filled += np.int32(count)

    def forget(self, position: int) -> None:
        """Drop the entries at `position` and after, of every layer. Raises like `counted`; nothing is changed then."""
        self.filled[:] = [self.counted(layer, position) for layer in range(self.form.layers)]

    def write(self, layer: int, keys: Float32, values: Float32, positions: Int32) -> None:
        """Put entries behind those of a layer, positions (entries,) or (kv_heads, entries).

        Raises ValueError if they do not fit.
        """
        start = int(self.filled[layer])
        stop = start + positions.shape[-1]
        if stop > self.capacity:
            raise ValueError(f"{stop} entries do not fit a buffer of {self.capacity}")
        self._block[layer, 0, :, start:stop] = keys
        self._block[layer, 1, :, start:stop] = values
        self._positions[layer, :, start:stop] = positions
        self._apart[layer] |= positions.ndim > 1
        self.filled[layer] = stop

    def window_bias(self, layer: int, window: int, positions: Int32, total: int) -> Float32:
        """What a run over tokens at `positions` adds to the scores of a layer with a sliding window.

        Float32 (1, 1, tokens, total), or (1, query_heads, tokens, total) where heads hold different entries: zeros, but
        MASKED for an entry that stands `window` positions or more before the token. The graph itself counts entries,
        which is the same as long as positions have no gap within reach.
        """
        tokens = len(positions)
        held = np.atleast_2d(self.positions(layer))
        reach = held[:, max(0, held.shape[1] - window) :]
        if not reach.size or np.all(positions[0] - reach[:, 0] == reach.shape[1]):
            return _zeros(tokens * total).reshape(1, 1, tokens, total)
        bias = np.zeros((1, len(held), tokens, total), dtype=np.float32)
        bias[0, :, :, : held.shape[1]][positions[None, :, None] - held[:, None] >= window] = MASKED
        return bias if len(held) == 1 else np.repeat(bias, self.form.query_heads // len(held), axis=1)

    def copy(self, capacity: int, *, room: int = 0) -> Buffer:
        """The same entries in a buffer of another capacity, of which `room` more will be filled soon.

        Raises MemoryShort if there is no memory for both; this one stays as it is.
        """
        other = Buffer(self.form, capacity, used=self.entries + room)
        for layer, count in enumerate(self.filled):
            other._block[layer, :, :, :count] = self._block[layer, :, :, :count]
            other._positions[layer, :, :count] = self._positions[layer, :, :count]
        other.filled[:] = self.filled
        other._apart[:] = self._apart
        return other


def reserve(size_bytes: int) -> mmap.mmap:
    """Memory that the system gives page by page, as it is written. Raises OSError if there is no room for it.

    In small pages: numpy's own arrays of this size ask for huge ones, which makes room that nobody uses resident.
    """
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


_ZEROS = np.zeros(0, dtype=np.float32)


def _zeros(count: int) -> Float32:
    """So many zeros; the array is kept for the next call, nobody writes to it."""
    global _ZEROS  # noqa: PLW0603
    zeros = _ZEROS  # another thread may put its own there meanwhile
    if len(zeros) < count:
        zeros = _ZEROS = np.zeros(1 << (count - 1).bit_length(), dtype=np.float32)
    return zeros[:count]
