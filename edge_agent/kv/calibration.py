"""Another model's cache, shifted and scaled to the receiver's statistics (Q-KVComm, eqs. 9-11; methods.md 1.6).

Mean and standard deviation of every layer's keys (without phase) and values are taken over the same texts in both
models, once. They move no meaning from one model's space into the other's: that an entry then looks like one of the
receiver's does not say that the receiver can read it. Between SmolLM2-135M and Gemma-3-270M, whose shapes allow scalars
only, it can't: answers on SQuAD are 3 to 7 nats a token less likely than with no cache at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from broker_config.messages.base import Digest
from edge_agent.errors import CacheInvalid, CalibrationInvalid
from edge_agent.kv.cache import Cache, Float32, Layer

Float64 = npt.NDArray[np.float64]
Kind = Literal["dimension", "scalar"]

KINDS = 2
"""Keys and values, in this order."""


class Side(Struct, frozen=True, kw_only=True):
    """One of the two models: which it is, and the shape of its caches."""

    fingerprint: Digest
    layers: Annotated[int, Meta(ge=1, le=512)]
    kv_heads: Annotated[int, Meta(ge=1, le=4_096)]
    head_dim: Annotated[int, Meta(ge=1, le=4_096)]

    @property
    def width(self) -> int:
        """Dimensions of one entry's keys, or values, in one layer."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, eq=False)
class Moments:
    """What a model's caches look like (eqs. 9-10).

    mean, deviation: float32 (layers, 2, kv_heads * head_dim), keys then values. entries: how many were counted in each
    layer; a layer without any has zeros.
    """

    kv_heads: int
    head_dim: int
    mean: Float32
    deviation: Float32
    entries: tuple[int, ...]

    def side(self, fingerprint: str) -> Side:
        """The model they were taken of."""
        return Side(fingerprint=fingerprint, layers=len(self.entries), kv_heads=self.kv_heads, head_dim=self.head_dim)


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a receiver needs for caches of one other model: x' = x * scale + shift, which is eq. 11.

    layers: the sender's layer that feeds each of the receiver's. scale, shift: float32 (receiver's layers, 2, width),
    keys then values, where width is the receiver's for "dimension" and 1 for "scalar". mean: float32 (receiver's
    layers, 2, receiver's width), the receiver's own, for dimensions that the sender does not have.
    """

    sender: Side
    receiver: Side
    kind: Kind
    layers: tuple[int, ...]
    scale: Float32
    shift: Float32
    mean: Float32


def moments(caches: Iterable[Cache]) -> Moments:
    """Mean and standard deviation over all entries of all caches, for each layer, kind and dimension (eqs. 9-10).

    Caches are taken one by one and not kept. The paper's E[x²] - μ² cancels where the mean is large against the
    deviation; here squares are summed about the mean, in float64. Raises CacheInvalid for caches of different shapes, a
    NaN or an infinity, or no entries at all.
    """
    sums: _Sums | None = None
    for cache in caches:
        cache.check()
        if sums is None and cache.layers:
            heads, _, head_dim = cache.layers[0].keys.shape
            sums = _Sums(len(cache.layers), heads, head_dim)
        if sums is not None:
            sums.add(cache)
    if sums is None or not sums.entries.any():
        raise CacheInvalid("no entries to take mean and deviation of")
    return sums.moments()


def kind_for(sender: Side, receiver: Side, asked: Kind | None = None) -> Kind:
    """Per dimension where KV heads and their dimension agree, else scalar; or what is asked for.

    Raises CalibrationInvalid if that is per dimension and they disagree.
    """
    theirs, ours = (sender.kv_heads, sender.head_dim), (receiver.kv_heads, receiver.head_dim)
    if asked == "dimension" and theirs != ours:
        raise CalibrationInvalid(
            f"no statistics per dimension: the sender has {theirs[0]} KV heads of {theirs[1]}, "
            f"the receiver {ours[0]} of {ours[1]}; scalar ones fit any shape"
        )
    return asked or ("dimension" if theirs == ours else "scalar")


def pair(
    sender: Moments,
    receiver: Moments,
    *,
    sender_fingerprint: str,
    receiver_fingerprint: str,
    kind: Kind | None = None,
) -> Calibration:
    """The calibration from one model's caches to the other's. kind: see `kind_for`.

    scalar: mean and deviation of a layer are averages over its dimensions, as in the paper. What is constant at the
    sender (or varies so little that float32 can't hold the scale) becomes the receiver's mean: scale 0.
    Raises CalibrationInvalid for a kind that does not fit, or a layer in use of which no entries were counted.
    """
    theirs, ours = sender.side(sender_fingerprint), receiver.side(receiver_fingerprint)
    kind = kind_for(theirs, ours, kind)
    layers = layers_by_depth(theirs.layers, ours.layers)
    for name, used, counted in (("sender", layers, sender), ("receiver", range(ours.layers), receiver)):
        for index in used:
            if not counted.entries[index]:
                raise CalibrationInvalid(f"no entries of the {name}'s layer {index} were counted")
    scale, shift = _folded(
        *(
            _averaged(array.astype(np.float64), kind)
            for array in (sender.mean[list(layers)], sender.deviation[list(layers)], receiver.mean, receiver.deviation)
        )
    )
    return Calibration(theirs, ours, kind, layers, scale, shift, receiver.mean.copy())


def layers_by_depth(sender: int, receiver: int) -> tuple[int, ...]:
    """Which of the sender's layers stands at the relative depth of each of the receiver's.

    The first goes to the first, the last to the last; halves go to the deeper one. A receiver of a single layer gets
    the first.
    """
    last = max(1, receiver - 1)
    return tuple((2 * index * (sender - 1) + last) // (2 * last) for index in range(receiver))


def apply(cache: Cache, calibration: Calibration) -> Cache:
    """A sender's cache as the receiver's, by eq. 11, positions unchanged. A layer without entries gives none.

    Where shapes disagree the paper does not say how to fit one to the other. Our reading: a token's dimensions are one
    vector of kv_heads * head_dim, head after head, cut to the receiver's length or filled up with the receiver's own
    mean, then split into the receiver's heads; layers go by relative depth. Attention mass, which was paid by the
    sender's heads, is dropped.
    Raises CacheInvalid for a cache that is not of the sender's shape, or whose result is not finite.
    """
    sender = calibration.sender
    if len(cache.layers) != sender.layers:
        raise CacheInvalid(f"a cache of {len(cache.layers)} layers, calibrated is a sender of {sender.layers}")
    cache.check_form()
    for index, layer in enumerate(cache.layers):
        heads, _, head_dim = layer.keys.shape
        if (heads, head_dim) != (sender.kv_heads, sender.head_dim):
            raise CacheInvalid(
                f"layer {index} has {heads} KV heads of {head_dim}, "
                f"calibrated is a sender with {sender.kv_heads} of {sender.head_dim}"
            )
    layers = []
    for index, source in enumerate(calibration.layers):
        layer = cache.layers[source]
        keys, values = (_fitted(x, calibration, index, kind) for kind, x in enumerate((layer.keys, layer.values)))
        layers.append(Layer(keys, values, layer.positions))
    found = Cache(tuple(layers))
    found.check()
    return found


class _Sums:
    """Running means and sums of squares about them, float64 (layers, 2, width), merged cache by cache (Chan et al.)."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int) -> None:
        self._heads, self._head_dim = kv_heads, head_dim
        self.entries = np.zeros(layers, dtype=np.int64)
        self._mean = np.zeros((layers, KINDS, kv_heads * head_dim))
        self._squares = np.zeros_like(self._mean)

    def add(self, cache: Cache) -> None:
        if len(cache.layers) != len(self.entries):
            raise CacheInvalid(f"a cache of {len(cache.layers)} layers among caches of {len(self.entries)}")
        for index, layer in enumerate(cache.layers):
            heads, _, head_dim = layer.keys.shape
            if (heads, head_dim) != (self._heads, self._head_dim):
                raise CacheInvalid(
                    f"layer {index} has {heads} KV heads of {head_dim} among caches with "
                    f"{self._heads} of {self._head_dim}"
                )
            if layer.entries:
                self._merge(index, np.stack([_vectors(layer.keys), _vectors(layer.values)]).astype(np.float64))

    def _merge(self, index: int, vectors: Float64) -> None:
        """vectors: float64 (2, entries, width)."""
        before, more = int(self.entries[index]), vectors.shape[1]
        mean = vectors.mean(axis=1)
        apart = mean - self._mean[index]
        self._squares[index] += ((vectors - mean[:, None]) ** 2).sum(axis=1)
        self._squares[index] += apart**2 * (before * more / (before + more))
        self._mean[index] += apart * (more / (before + more))
        self.entries[index] += more

    def moments(self) -> Moments:
        counted = np.maximum(self.entries, 1)[:, None, None]
        return Moments(
            kv_heads=self._heads,
            head_dim=self._head_dim,
            mean=self._mean.astype(np.float32),
            deviation=np.sqrt(self._squares / counted).astype(np.float32),
            entries=tuple(self.entries.tolist()),
        )


def _vectors(x: Float32) -> Float32:
    """(kv_heads, entries, head_dim) as (entries, kv_heads * head_dim)."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], x.shape[0] * x.shape[2])


def _averaged(array: Float64, kind: Kind) -> Float64:
    """(layers, 2, width) as it is, or (layers, 2, 1)."""
    average: Float64 = array.mean(axis=-1, keepdims=True)
    return average if kind == "scalar" else array


def _folded(mean_s: Float64, deviation_s: Float64, mean_r: Float64, deviation_r: Float64) -> tuple[Float32, Float32]:
    """Eq. 11 as scale and shift. The shift goes with the scale as rounded, so that the means still meet."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scale = (deviation_r / deviation_s).astype(np.float32)
        shift = (mean_r - mean_s * scale).astype(np.float32)
    usable = np.isfinite(scale) & np.isfinite(shift)
    return np.where(usable, scale, np.float32(0)), np.where(usable, shift, mean_r.astype(np.float32))


def _fitted(x: Float32, calibration: Calibration, index: int, kind: int) -> Float32:
    """Keys or values of the sender's layer, (kv_heads, entries, head_dim), in the receiver's layer `index`."""
    ours, entries = calibration.receiver, x.shape[1]
    width = min(calibration.sender.width, ours.width)
    out = np.empty((entries, ours.width), dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is refused by name
        np.multiply(_vectors(x)[:, :width], calibration.scale[index, kind], out=out[:, :width])
        out[:, :width] += calibration.shift[index, kind]
    out[:, width:] = calibration.mean[index, kind, width:]
    return np.ascontiguousarray(out.reshape(entries, ours.kv_heads, ours.head_dim).transpose(1, 0, 2))
