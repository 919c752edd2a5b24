"""The KV cache as a value: what a context's prefill computed, without position and without model runtime.

Keys carry no rotary phase, so an entry can stand anywhere; `positions` says where it stood relative to the first token
of its context. A layer that was not sent, or was emptied, has no entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_agent.errors import CacheInvalid

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's entries. keys, values: float32 (kv_heads, entries, head_dim); positions: int32 (entries,), rising, or
    (kv_heads, entries) where heads hold entries of different tokens.

    mass: float32 (kv_heads, entries), the share of attention that the context's last tokens paid to each entry, where
    that was asked for; it is never sent.
    """

    keys: Float32
    values: Float32
    positions: Int32
    mass: Float32 | None = None

    @property
    def entries(self) -> int:
        return int(self.positions.shape[-1])

    def between(self, start: int, stop: int) -> Layer:
        """The entries whose positions are in [start, stop), positions unchanged. Views, no copy.

        Raises CacheInvalid where heads hold different tokens.
        """
        if self.positions.ndim > 1:
            raise CacheInvalid("heads hold entries of different tokens: these can't be parted by position")
        first, last = np.searchsorted(self.positions, (start, stop))
        return self.part(int(first), int(last))

    def part(self, first: int, last: int) -> Layer:
        """The entries from the first to before the last, counted as they stand. Views, no copy."""
        mass = None if self.mass is None else self.mass[:, first:last]
        return Layer(self.keys[:, first:last], self.values[:, first:last], self.positions[..., first:last], mass)

    def moved(self, by: int) -> Layer:
        """The same entries so many positions further on. No copy."""
        return Layer(self.keys, self.values, self.positions + np.int32(by), self.mass)

    @property
    def nbytes(self) -> int:
        arrays = (self.keys, self.values, self.positions, self.mass)
        return sum(array.nbytes for array in arrays if array is not None)


@dataclass(frozen=True, eq=False)
class Cache:
    """The layers of one context, or of a part of it. `nbytes` is what its arrays occupy."""

    layers: tuple[Layer, ...]

    @property
    def entries(self) -> int:
        """Entries of the fullest layer."""
        return max((layer.entries for layer in self.layers), default=0)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def elements(self) -> int:
        """Numbers in all keys and values."""
        return sum(layer.keys.size + layer.values.size for layer in self.layers)

    def between(self, start: int, stop: int) -> Cache:
        """The part at positions [start, stop) of the context, positions unchanged."""
        return Cache(tuple(layer.between(start, stop) for layer in self.layers))

    def part(self, first: int, last: int) -> Cache:
        """Of every layer the entries from the first to before the last, counted as they stand."""
        return Cache(tuple(layer.part(first, last) for layer in self.layers))

    def moved(self, by: int) -> Cache:
        """The same entries so many positions further on. No copy."""
        return Cache(tuple(layer.moved(by) for layer in self.layers))

    def check_form(self) -> None:
        """Raise CacheInvalid, naming the layer, for disagreeing shapes or positions that do not rise from 0 on."""
        for index, layer in enumerate(self.layers):
            if layer.keys.shape != layer.values.shape or layer.keys.ndim != 3:
                raise CacheInvalid(f"layer {index}: keys {layer.keys.shape} and values {layer.values.shape} disagree")
            if layer.keys.shape[1] != layer.entries:
                raise CacheInvalid(f"layer {index}: {layer.keys.shape[1]} entries but {layer.entries} positions")
            if layer.positions.shape not in {(layer.entries,), layer.keys.shape[:2]}:
                raise CacheInvalid(f"layer {index}: positions {layer.positions.shape} of keys {layer.keys.shape}")
            if np.any(np.diff(layer.positions, prepend=-1) <= 0):
                raise CacheInvalid(f"layer {index}: positions do not rise")
            if layer.mass is not None and layer.mass.shape != layer.keys.shape[:2]:
                raise CacheInvalid(f"layer {index}: attention mass {layer.mass.shape} of keys {layer.keys.shape}")

    def check(self) -> None:
        """Raise CacheInvalid like check_form, and for a NaN or an infinity."""
        self.check_form()
        for index, layer in enumerate(self.layers):
            for kind, array in (("keys", layer.keys), ("values", layer.values)):
                if not np.isfinite(array).all():
                    raise CacheInvalid(f"layer {index}: {kind} hold a NaN or an infinity")


def concatenate(parts: Sequence[Cache]) -> Cache:
    """Parts of one context, in order, as one cache; between(0, p) and between(p, n) give back the whole exactly.

    Raises CacheInvalid if the numbers of layers differ or the parts overlap.
    """
    if not parts:
        raise CacheInvalid("nothing to concatenate")
    if len({len(part.layers) for part in parts}) != 1:
        raise CacheInvalid("parts have different numbers of layers")
    joined = []
    for index, layers in enumerate(zip(*(part.layers for part in parts), strict=True)):
        positions = _joined_positions(layers)
        if np.any(np.diff(positions) <= 0):
            raise CacheInvalid(f"layer {index}: parts overlap or are out of order")
        keys = np.concatenate([layer.keys for layer in layers], axis=1)
        values = np.concatenate([layer.values for layer in layers], axis=1)
        joined.append(Layer(keys, values, positions, _joined_mass(layers)))
    return Cache(tuple(joined))


def _joined_positions(layers: Sequence[Layer]) -> Int32:
    """(entries,), or (kv_heads, entries) if that of any part is."""
    if all(layer.positions.ndim == 1 for layer in layers):
        return np.concatenate([layer.positions for layer in layers])
    wide = [np.broadcast_to(layer.positions, layer.keys.shape[:2]) for layer in layers]
    return np.concatenate(wide, axis=1)


def _joined_mass(layers: Sequence[Layer]) -> Float32 | None:
    """Of all parts that have entries, or none: shares of one part say nothing of another's."""
    known = [layer.mass for layer in layers if layer.mass is not None]
    if len(known) < len([layer for layer in layers if layer.entries or layer.mass is not None]) or not known:
        return None
    return np.concatenate(known, axis=1)
