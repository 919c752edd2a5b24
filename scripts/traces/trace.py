"""A link's rate over time, read from a CSV file: `time_s,bandwidth_bps` and, where known, `rtt_ms,rssi_dbm,loss`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from scripts.traces.table import TIME, Row, read_table, write_table

LARGEST_BPS = 1e15
"""As messages have it."""
EDGE_S = 1e-7
"""So near to a step rounding may say either."""
_RANGES = {
    TIME: (0.0, math.inf),
    "bandwidth_bps": (0.0, LARGEST_BPS),
    "rtt_ms": (0.0, math.inf),
    "rssi_dbm": (-200.0, 100.0),
    "loss": (0.0, 1.0),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """What the link was like from `time_s` on. None where the source did not say; loss is a fraction."""

    time_s: float
    bandwidth_bps: float
    rtt_s: float | None = None
    rssi_dbm: float | None = None
    loss: float | None = None


@dataclass(slots=True)
class _Place:
    """Which sample is in force, in which lap, and between which times it surely is."""

    lap: int
    at: int
    from_s: float
    until_s: float
    next_change_s: float | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Samples on a regular grid that starts at 0, at least one. After the end it starts again, or holds the last.

    from_s: which time of the samples is its time 0.
    """

    samples: tuple[Sample, ...]
    step_s: float
    loop: bool = True
    from_s: float = 0.0
    _last: list[_Place] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def duration_s(self) -> float:
        """The end of the last sample."""
        return self.samples[-1].time_s + self.step_s

    def at(self, time_s: float) -> Sample:
        """The sample in force at a time. Raises ValueError if it is negative or not finite."""
        if not math.isfinite(time_s) or time_s < 0:
            raise ValueError(f"a trace has no time {time_s} s")
        return self.samples[self._place(time_s).at]

    def next_change_s(self, time_s: float) -> float:
        """When the rate is another than at a time; infinite if it stays."""
        place = self._place(time_s)
        if place.next_change_s is None:
            place.next_change_s = self._next_change_s(place)
        return place.next_change_s

    def _next_change_s(self, place: _Place) -> float:
        count, at = len(self.samples), place.at
        for index in range(at + 1, at + count if self.loop else count):
            if self.samples[index % count].bandwidth_bps != self.samples[at].bandwidth_bps:
                begin_s = (place.lap + index // count) * self.duration_s + self.samples[index % count].time_s
                return begin_s - self.from_s
        return math.inf

    def _place(self, time_s: float) -> _Place:
        """Where a time is; mostly where the one before it was."""
        for last in self._last:
            if last.from_s <= time_s < last.until_s:
                return last
        lap, at = self._found(time_s)
        lap_s, ends = lap * self.duration_s - self.from_s, at + 1 == len(self.samples)
        until_s = self.duration_s if ends else self.samples[at + 1].time_s
        place = _Place(
            lap=lap,
            at=at,
            from_s=lap_s + self.samples[at].time_s + EDGE_S,
            until_s=math.inf if ends and not self.loop else lap_s + until_s - EDGE_S,
        )
        self._last[:] = (place,)  # at once, so that threads may share a trace
        return place

    def _found(self, time_s: float) -> tuple[int, int]:
        """How often it has begun anew, and which sample is in force."""
        samples, time_s = self.samples, time_s + self.from_s
        lap, within_s = divmod(time_s, self.duration_s) if self.loop else (0, time_s)
        at = min(int(within_s / self.step_s), len(samples) - 1)
        while at > 0 and samples[at].time_s > within_s:  # the grid is regular up to rounding
            at -= 1
        while at + 1 < len(samples) and samples[at + 1].time_s <= within_s:
            at += 1
        return int(lap), at

    def steps(self) -> Iterator[tuple[float, Sample]]:
        """Every sample with the time it comes into force, the first at 0; without an end if the trace loops."""
        lap, at = self._found(0.0)
        while True:
            for sample in self.samples[at:]:
                yield max(0.0, lap * self.duration_s + sample.time_s - self.from_s), sample
            if not self.loop:
                return
            lap, at = lap + 1, 0


def read_trace(path: Path, *, loop: bool = True) -> Trace:
    """Read a trace. Raises TraceInvalid, which names the file and the line."""
    rows, step_s = read_table(path, _RANGES, required=2)
    return Trace(tuple(_sample(row) for row in rows), step_s, loop)


def write_trace(path: Path, trace: Trace) -> None:
    """As `read_trace` reads it, with the columns that the samples have; the whole file or none. Raises OSError."""
    columns = [name for name in _RANGES if any(_value(sample, name) is not None for sample in trace.samples)]
    write_table(path, columns, ([_value(sample, name) for name in columns] for sample in trace.samples))


def shifted(trace: Trace, offset_s: float) -> Trace:
    """The trace as it is from offset_s on (to a whole step)."""
    return replace(trace, from_s=trace.from_s + round(offset_s / trace.step_s) * trace.step_s)


def _sample(row: Row) -> Sample:
    return Sample(
        time_s=row["time_s"],
        bandwidth_bps=row["bandwidth_bps"],
        rtt_s=row["rtt_ms"] / 1000 if "rtt_ms" in row else None,
        rssi_dbm=row.get("rssi_dbm"),
        loss=row.get("loss"),
    )


def _value(sample: Sample, name: str) -> float | None:
    if name == "rtt_ms":
        return None if sample.rtt_s is None else 1000 * sample.rtt_s
    found: float | None = getattr(sample, name)
    return found
