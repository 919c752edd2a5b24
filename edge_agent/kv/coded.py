"""A slice of a cache as its transform's symbols, and those as bytes: coded, tightened, refined, decoded.

Symbols are integers, (components, entries) for each layer that has entries. As bytes they stand in runs of components
of like deviation, whatever their layer; within a run in the order of layers, components, entries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from edge_agent.errors import PayloadRejected
from edge_agent.kv.cache import Cache, Int32, Layer
from edge_agent.kv.entropy import Alphabet, alphabet, compress, decompress
from edge_agent.kv.transform import Transform, coarser

Symbols = dict[int, Int32]
"""Of each layer that has entries, int32 (components, entries)."""


@dataclass(frozen=True)
class Run:
    """Components of like deviation: of each layer that has any, from the first to before the last."""

    letters: Alphabet
    parts: tuple[tuple[int, int, int], ...]

    def count(self, entries: Mapping[int, int]) -> int:
        """Numbers in the run when layers have so many entries."""
        return sum((stop - first) * entries.get(layer, 0) for layer, first, stop in self.parts)


@lru_cache(maxsize=64)
def runs(transform: Transform, level: int) -> tuple[Run, ...]:
    """The runs of a level, narrow ones first: of deviations within a factor of √2.

    A power of two of the variance bounds each, found by its exponent: a logarithm may be rounded otherwise elsewhere.
    """
    classes: dict[int, list[tuple[int, int, int]]] = {}
    for layer in range(transform.layers):
        kinds = np.frexp(transform.variance[layer, : transform.coded(layer, level)])[1] - 1 - level
        edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)] if len(kinds) else []
        for first, stop in itertools.pairwise(edges):
            classes.setdefault(int(kinds[first]), []).append((layer, first, stop))
    return tuple(Run(alphabet(2 ** ((kind + 0.5) / 2)), tuple(parts)) for kind, parts in sorted(classes.items()))


def symbols_of(transform: Transform, level: int, cache: Cache, layers: Sequence[int]) -> Symbols:
    """The symbols of these layers. Raises CacheInvalid for a NaN, an infinity or another shape."""
    return {index: transform.symbols(index, cache.layers[index], level) for index in layers}


def cache_of(
    transform: Transform, level: int, symbols: Symbols, *, kv_heads: int, positions: Mapping[int, Int32]
) -> Cache:
    """The cache of symbols at a level; positions: of the entries of each layer that has any."""
    head_dim = transform.width // (2 * kv_heads)
    empty = np.zeros((kv_heads, 0, head_dim), dtype=np.float32)
    nothing = Layer(empty, empty, np.zeros(0, dtype=np.int32))
    layers = [nothing] * transform.layers
    for index, numbers in symbols.items():
        keys, values = transform.entries(index, numbers, level, kv_heads)
        layers[index] = Layer(keys, values, positions[index])
    return Cache(tuple(layers))


def pack(transform: Transform, level: int, symbols: Symbols) -> bytes:
    """Symbols as bytes."""
    return compress([(_gathered(run, symbols), run.letters) for run in runs(transform, level)])


def unpack(transform: Transform, level: int, data: bytes | memoryview, entries: Mapping[int, int]) -> Symbols:
    """The symbols of layers with so many entries each. Raises PayloadRejected for bytes that are not just those."""
    wanted = runs(transform, level)
    found = decompress(data, [(run.count(entries), run.letters) for run in wanted])
    return _scattered(transform, level, wanted, found, entries)


def tightened(transform: Transform, symbols: Symbols, level: int, to: int) -> Symbols:
    """Symbols of a level at a coarser one of the same parity: exactly those that coding at it gives.

    Raises ValueError for another parity or a finer level.
    """
    return {layer: coarser(numbers[: transform.coded(layer, to)], to - level) for layer, numbers in symbols.items()}


def joined(parts: Sequence[tuple[Symbols, int, int]]) -> Symbols:
    """Parts of one cache in order, each the entries from the first to before the last of some symbols, as one."""
    layers = parts[0][0]
    return {
        layer: np.concatenate([symbols[layer][:, first:last] for symbols, first, last in parts], axis=1)
        for layer in layers
    }


def pack_refinement(transform: Transform, fine: Symbols, level: int, coarse_level: int) -> bytes:
    """What a holder of the symbols at coarse_level lacks of those at the finer level, as bytes.

    Of a symbol that is zero there, all of it; of any other, the bits that were shifted out.
    """
    coarse = _widened(transform, tightened(transform, fine, level, coarse_level), level)
    shift, pieces = (coarse_level - level) // 2, []
    for run in runs(transform, level):
        numbers, known = _gathered(run, fine), _gathered(run, coarse)
        zero = known == 0
        low = np.abs(numbers[~zero]) - (np.abs(known[~zero]) << shift)
        pieces += [(numbers[zero], _anew(shift)), (low, _within(shift))]
    return compress(pieces)


def refined(transform: Transform, coarse: Symbols, coarse_level: int, data: bytes | memoryview, level: int) -> Symbols:
    """Symbols at the finer level, from those at coarse_level and what pack_refinement made. Raises PayloadRejected."""
    entries = {layer: numbers.shape[1] for layer, numbers in coarse.items()}
    wide, wanted = _widened(transform, coarse, level), runs(transform, level)
    known = [_gathered(run, wide) for run in wanted]
    shift, sizes = (coarse_level - level) // 2, []
    for numbers in known:
        zeros = len(numbers) - int(np.count_nonzero(numbers))
        sizes += [(zeros, _anew(shift)), (len(numbers) - zeros, _within(shift))]
    pieces = iter(decompress(data, sizes))
    found = []
    for numbers in known:
        zero, whole = numbers == 0, np.abs(numbers) << shift
        whole[zero] = next(pieces)
        low = next(pieces)
        if len(low) and low.min() < 0:
            raise PayloadRejected("slice", "is no refinement of what is held")
        whole[~zero] = (whole[~zero] + low) * np.sign(numbers[~zero])
        found.append(whole)
    return _scattered(transform, level, wanted, found, entries)


def _anew(shift: int) -> Alphabet:
    """For symbols that were zero: below 2**shift in magnitude, but for those that the coarser level does not code."""
    return _fitting(1 << shift, closed=False)


def _within(shift: int) -> Alphabet:
    """For the bits that a shift takes away."""
    return _fitting((1 << shift) - 1, closed=True)


def _fitting(most: int, *, closed: bool) -> Alphabet:
    most = min(most, 127)
    return Alphabet(most, int(math.log(256, 2 * most + 1)), closed)


def _gathered(run: Run, symbols: Symbols) -> Int32:
    parts = [symbols[layer][first:stop].reshape(-1) for layer, first, stop in run.parts if layer in symbols]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def _scattered(
    transform: Transform, level: int, wanted: Sequence[Run], found: Sequence[Int32], entries: Mapping[int, int]
) -> Symbols:
    symbols: Symbols = {
        layer: np.empty((transform.coded(layer, level), count), dtype=np.int32) for layer, count in entries.items()
    }
    for run, numbers in zip(wanted, found, strict=True):
        start = 0
        for layer, first, stop in run.parts:
            if layer in symbols:
                size = (stop - first) * entries[layer]
                symbols[layer][first:stop] = numbers[start : start + size].reshape(stop - first, -1)
                start += size
    return symbols


def _widened(transform: Transform, symbols: Symbols, level: int) -> Symbols:
    """With zeros for the components that a finer level codes beside theirs."""
    return {
        layer: np.pad(numbers, ((0, transform.coded(layer, level) - len(numbers)), (0, 0)))
        for layer, numbers in symbols.items()
    }
