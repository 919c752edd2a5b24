"""The decorrelating transform of a layer's keys and values, and the embedded quantization of its components.

An entry of a layer, its keys (without phase) and values of all heads, is one row x of 2 · kv_heads · head_dim numbers.
Its components are y = (x - mean) · analysis, sorted by falling variance. The transform is fitted when a bundle is made
(scripts/prepare_model/fitting.py) in the metric in which an error costs most KL divergence, so that one step for every
component of every layer spends bits where answers need them.

Quantization is embedded. At level 0 the step is 1; two levels coarser doubles it, one level is a factor of √2:

    magnitude = floor(|y| / √2^(level mod 2) + 1/2) >> (level div 2)

so that a level follows from any finer one of the same parity by shifting alone, as if it had been coded at once. The
growing dead zone of truncation costs nothing at equal bits: SmolLM2, SQuAD, 1.24 bits at 0.0130 nats, 1.29 at 0.0128
with uniform rounding. Components whose deviation is below DROPPED steps are not coded at all.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_agent.errors import BundleInvalid, CacheInvalid
from edge_agent.kv.cache import Float32, Int32, Layer
from edge_agent.kv.entropy import LARGEST

LEVELS = 16
DROPPED = 0.35
_DROPPED_SQUARED = DROPPED * DROPPED
TRANSFORM_FILE = "transform.npz"
_ARRAYS = ("mean", "scale", "analysis", "deviation")


@dataclass(frozen=True, eq=False)
class Transform:
    """mean, scale, deviation: float32 (layers, width), width = 2 · kv_heads · head_dim; analysis: float16 (layers,
    width, width), whose column c is to be multiplied by scale[c]. deviation: of each component, in finest steps,
    falling within a layer.
    """

    mean: Float32
    scale: Float32
    analysis: npt.NDArray[np.float16]
    deviation: Float32

    @property
    def layers(self) -> int:
        return int(self.analysis.shape[0])

    @property
    def width(self) -> int:
        return int(self.analysis.shape[1])

    @cached_property
    def id(self) -> str:
        """32 hexadecimal digits, of all its numbers."""
        digest = hashlib.sha256()
        for name in _ARRAYS:
            array: npt.NDArray[np.generic] = getattr(self, name)
            digest.update(f"{name}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes())
        return digest.hexdigest()[:32]

    @cached_property
    def _forward(self) -> Float32:
        """(layers, width, width): rows to components."""
        forward: Float32 = self.analysis.astype(np.float32) * self.scale[:, None, :]
        return forward

    @cached_property
    def _backward(self) -> Float32:
        """(layers, width, width): components to rows; the inverse of what is stored, so that both ends agree."""
        backward: Float32 = np.linalg.inv(self._forward.astype(np.float64)).astype(np.float32)
        return backward

    @cached_property
    def variance(self) -> npt.NDArray[np.float64]:
        """Of each component, in squared finest steps: exact, so that both ends see the same in any comparison."""
        variance: npt.NDArray[np.float64] = np.square(self.deviation.astype(np.float64))
        return variance

    def coded(self, layer: int, level: int) -> int:
        """How many components of a layer are coded at a level: the first ones."""
        return self._coded(level)[layer]

    @lru_cache(maxsize=LEVELS)  # noqa: B019  (a bundle has one transform, which lives as long as the agent)
    def _coded(self, level: int) -> tuple[int, ...]:
        limit = _DROPPED_SQUARED * 2**level
        return tuple(int(np.count_nonzero(row >= limit)) for row in self.variance)

    def symbols(self, layer: int, entries: Layer, level: int) -> Int32:
        """The symbols of a layer's entries at a level, int32 (components, entries).

        Components beyond LARGEST finest steps, which no real cache has, are cut there.
        Raises CacheInvalid for a NaN, an infinity, or a cache of another shape.
        """
        heads = entries.keys.shape[0]
        if 2 * heads * entries.keys.shape[2] != self.width:
            raise CacheInvalid(f"layer {layer}: entries of {entries.keys.shape}, the transform is for {self.width}")
        rows = np.empty((entries.entries, 2, heads, entries.keys.shape[2]), dtype=np.float32)
        mean = self.mean[layer].reshape(rows.shape[1:])
        for kind, array in enumerate((entries.keys, entries.values)):
            np.subtract(array.transpose(1, 0, 2), mean[kind], out=rows[:, kind])
        with np.errstate(invalid="ignore", over="ignore"):  # it is refused below
            components: Float32 = self._forward[layer, :, : self.coded(layer, level)].T @ rows.reshape(len(rows), -1).T
        peak = max(components.max(initial=0), -components.min(initial=0))
        if not np.isfinite(peak):
            raise CacheInvalid(f"layer {layer}: a cache to be coded holds a NaN or an infinity")
        if peak > LARGEST:
            np.clip(components, -LARGEST, LARGEST, out=components)
        return quantize(components, level)

    def entries(self, layer: int, symbols: Int32, level: int, kv_heads: int) -> tuple[Float32, Float32]:
        """Keys and values, float32 (kv_heads, entries, head_dim) each, of symbols (components, entries) at a level."""
        step = np.float32(step_of(level))
        values = np.multiply(symbols, step, dtype=np.float32)
        within = np.sign(values)
        within *= (self._middles(layer, level) * step)[:, None]
        values += within
        rows = (values.T @ self._backward[layer, : len(symbols)]).reshape(symbols.shape[1], 2, kv_heads, -1)
        mean = self.mean[layer].reshape(2, kv_heads, 1, -1)
        found = np.empty((2, kv_heads, rows.shape[0], rows.shape[3]), dtype=np.float32)
        np.add(rows.transpose(1, 2, 0, 3), mean, out=found)
        return found[0], found[1]

    def _middles(self, layer: int, level: int) -> Float32:
        """Where in its interval a component's value is to be expected, float32 (components,), in steps.

        An interval begins at the magnitude less what was added before the shift, and is one step long; within it
        the density of a Laplacian of the component's deviation falls by rate a step, and its mean is at
        1/rate - 1/(e^rate - 1).
        """
        deviation = self.deviation[layer, : self.coded(layer, level)].astype(np.float64) / step_of(level)
        rate = np.maximum(2**0.5 / deviation, 1e-3)
        begins = -0.5 / 2 ** (level // 2)
        middles: Float32 = (begins + 1 / rate - 1 / np.expm1(rate)).astype(np.float32)
        return middles

    def save(self, path: Path) -> None:
        """Write it as a plain .npz."""
        with path.open("wb") as file:
            np.savez(file, **{name: getattr(self, name) for name in _ARRAYS})

    @classmethod
    def load(cls, path: Path) -> Transform:
        """Raises BundleInvalid, naming the file, if it is missing, damaged or not a transform."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in _ARRAYS}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise BundleInvalid(f"{path} is no transform: {error}; prepare the model again") from None
        layers, width = arrays["mean"].shape if arrays["mean"].ndim == 2 else (0, 0)
        for name in _ARRAYS:
            wanted = (layers, width, width) if name == "analysis" else (layers, width)
            kind = np.float16 if name == "analysis" else np.float32
            if not layers or arrays[name].shape != wanted or arrays[name].dtype != kind:
                raise BundleInvalid(f"{path} is no transform: {name} is {arrays[name].dtype} {arrays[name].shape}")
            if not np.isfinite(arrays[name]).all():
                raise BundleInvalid(f"{path} is no transform: {name} holds a NaN or an infinity")
        if np.any(arrays["deviation"] <= 0) or np.any(np.diff(arrays["deviation"], axis=1) > 0):
            raise BundleInvalid(f"{path} is no transform: its deviations do not fall")
        return cls(**arrays)


def step_of(level: int) -> float:
    """The quantization step of a level, in finest steps."""
    return float(2 ** (level / 2))


def quantize(components: Float32, level: int) -> Int32:
    """Symbols, int32, of components in finest steps, at most LARGEST. The components are overwritten."""
    shift = 2.0 ** -(level // 2)
    components *= np.float32(2**-0.5) * np.float32(shift) if level % 2 else np.float32(shift)
    components += np.copysign(np.float32(shift / 2), components)
    return components.astype(np.int32)  # towards zero: a shift is then all it takes to coarsen it


def coarser(symbols: Int32, levels: int) -> Int32:
    """Symbols of a level, int32, at one that is `levels` (even) coarser: exactly what coding at it would have given.

    Raises ValueError for an odd number of levels.
    """
    if levels < 0 or levels % 2:
        raise ValueError(f"{levels} levels coarser: must be an even number, 0 or more")
    magnitude: Int32 = np.abs(symbols) >> (levels // 2)
    np.negative(magnitude, out=magnitude, where=symbols < 0)
    return magnitude
