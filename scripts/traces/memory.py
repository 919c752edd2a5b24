"""What other work leaves of a device's memory over time: `time_s,available_bytes` and, where known, `stalled_share`.

Such a trace is read from a file, or made:

    ramp      less and less from the start to the end, down to what is left at least
    sawtooth  the same again and again, as of a program that fills up and is started anew
    spikes    mostly all of it, now and then as little as is left, for a while: Poisson arrivals, exponential durations
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scripts.traces.table import MOST_ROWS, TIME, read_table, write_table

Floats = NDArray[np.float64]

LARGEST_BYTES = 2.0**48
STALL_BELOW = 0.05
"""Of the memory: with less available, tasks wait for it in what is made, the longer the less there is."""
SAWTOOTH_S = 120.0
SPIKE_EVERY_S, SPIKE_S = 90.0, 20.0
_RANGES = {TIME: (0.0, math.inf), "available_bytes": (0.0, LARGEST_BYTES), "stalled_share": (0.0, 1.0)}


@dataclass(frozen=True, slots=True)
class MemorySample:
    """From time_s on: available without any cache of ours; the share of time in which some task waits for memory."""

    time_s: float
    available_bytes: int
    stalled_share: float = 0.0


@dataclass(frozen=True, slots=True)
class MemoryTrace:
    """Samples on a regular grid from 0 on, at least one; after the end the last holds. total_bytes: of the device."""

    samples: tuple[MemorySample, ...]
    step_s: float
    total_bytes: int

    def at(self, time_s: float) -> MemorySample:
        """The sample in force."""
        return self.samples[max(0, bisect_right(self.samples, time_s, key=lambda sample: sample.time_s) - 1)]


@dataclass(frozen=True, kw_only=True)
class MadeMemory:
    """What a memory trace is made with. least, most: available, as shares of total_bytes."""

    kind: str
    total_bytes: int
    duration_s: float
    step_s: float = 1.0
    least: float = 0.03
    most: float = 0.7
    seed: int = 0


def read_memory(path: Path, total_bytes: int) -> MemoryTrace:
    """Read a trace of a device with so much memory. Raises TraceInvalid, which names the file and the line."""
    rows, step_s = read_table(path, _RANGES | {"available_bytes": (0.0, float(total_bytes))}, required=2)
    return MemoryTrace(
        tuple(MemorySample(row[TIME], int(row["available_bytes"]), row.get("stalled_share", 0.0)) for row in rows),
        step_s,
        total_bytes,
    )


def write_memory(path: Path, trace: MemoryTrace) -> None:
    """As `read_memory` reads it; the whole file or none. Raises OSError."""
    rows = ([each.time_s, float(each.available_bytes), each.stalled_share] for each in trace.samples)
    write_table(path, tuple(_RANGES), rows)


def steady(total_bytes: int, share: float = 0.7) -> MemoryTrace:
    """The same all the time."""
    return MemoryTrace((MemorySample(0.0, int(share * total_bytes)),), 1.0, total_bytes)


def made_memory(terms: MadeMemory) -> MemoryTrace:
    """The trace. Raises ValueError for terms that make none."""
    if terms.kind not in MEMORY_KINDS:
        raise ValueError(f"no memory trace is of the kind {terms.kind}; there are {', '.join(MEMORY_KINDS)}")
    steps = terms.duration_s / terms.step_s if terms.step_s > 0 else 0.0
    if not 0.5 < steps <= MOST_ROWS:  # nor is nan
        raise ValueError(f"{terms.duration_s:g} s in steps of {terms.step_s:g} s are not 1 to {MOST_ROWS:,} steps")
    if not 0 <= terms.least <= terms.most <= 1 or not 0 < terms.total_bytes <= LARGEST_BYTES:
        raise ValueError("least and most are shares of the memory, 0 <= least <= most <= 1; a device has some memory")
    dice = np.random.default_rng((terms.seed, list(MEMORY_KINDS).index(terms.kind)))
    times_s: Floats = terms.step_s * np.arange(round(steps), dtype=np.float64)
    shares = terms.most - (terms.most - terms.least) * MEMORY_KINDS[terms.kind](dice, times_s, terms.duration_s)
    stalls = np.clip((STALL_BELOW - shares) / STALL_BELOW, 0.0, 1.0)
    rows = zip(times_s.tolist(), shares.tolist(), stalls.tolist(), strict=True)
    return MemoryTrace(
        tuple(MemorySample(at_s, int(share * terms.total_bytes), stall) for at_s, share, stall in rows),
        terms.step_s,
        terms.total_bytes,
    )


def _ramp(_dice: np.random.Generator, times_s: Floats, duration_s: float) -> Floats:
    return times_s / duration_s


def _sawtooth(dice: np.random.Generator, times_s: Floats, _duration_s: float) -> Floats:
    return ((times_s + dice.uniform(0, SAWTOOTH_S)) % SAWTOOTH_S) / SAWTOOTH_S


def _spikes(dice: np.random.Generator, times_s: Floats, duration_s: float) -> Floats:
    found, at_s = np.zeros(len(times_s)), 0.0
    while (at_s := at_s + float(dice.exponential(SPIKE_EVERY_S))) < duration_s:
        long_s = float(dice.exponential(SPIKE_S))
        found[(times_s >= at_s) & (times_s < at_s + long_s)] = 1.0
        at_s += long_s
    return found


MEMORY_KINDS: dict[str, Callable[[np.random.Generator, Floats, float], Floats]] = {
    "ramp": _ramp,
    "sawtooth": _sawtooth,
    "spikes": _spikes,
}
"""By name: the share of what can be taken that is taken, over time."""
