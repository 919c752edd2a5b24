"""A link's rate over time, read from a CSV file: `time_s,bandwidth_bps` and, where known, `rtt_ms,rssi_dbm,loss`."""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.traces.errors import TraceInvalid

LARGEST_BPS = 1e15
"""As messages have it."""
LARGEST_FILE_BYTES = 64 * 2**20
MOST_ROWS = 1_000_000
"""Of a trace that is made or brought in."""
_REQUIRED = ("time_s", "bandwidth_bps")
_RANGES = {
    "time_s": (0.0, math.inf),
    "bandwidth_bps": (0.0, LARGEST_BPS),
    "rtt_ms": (0.0, math.inf),
    "rssi_dbm": (-200.0, 100.0),
    "loss": (0.0, 1.0),
}
_GRID_TOLERANCE = 0.01
_LONE_STEP_S = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What the link was like from `time_s` on. None where the source did not say; loss is a fraction."""

    time_s: float
    bandwidth_bps: float
    rtt_s: float | None = None
    rssi_dbm: float | None = None
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Samples on a regular grid that starts at 0, at least one. After the end it starts again, or holds the last."""

    samples: tuple[Sample, ...]
    step_s: float
    loop: bool = True

    @property
    def duration_s(self) -> float:
        """The end of the last sample."""
        return self.samples[-1].time_s + self.step_s

    def at(self, time_s: float) -> Sample:
        """The sample in force at a time. Raises ValueError if it is negative or not finite."""
        if not math.isfinite(time_s) or time_s < 0:
            raise ValueError(f"a trace has no time {time_s} s")
        return self.samples[self._place(time_s)[1]]

    def next_change_s(self, time_s: float) -> float:
        """When the rate is another than at a time; infinite if it stays."""
        lap, at = self._place(time_s)
        count = len(self.samples)
        for index in range(at + 1, at + count if self.loop else count):
            if self.samples[index % count].bandwidth_bps != self.samples[at].bandwidth_bps:
                return (lap + index // count) * self.duration_s + self.samples[index % count].time_s
        return math.inf

    def _place(self, time_s: float) -> tuple[int, int]:
        """How often it has begun anew, and which sample is in force."""
        lap, within_s = divmod(time_s, self.duration_s) if self.loop else (0, time_s)
        return int(lap), bisect_right(self.samples, within_s, key=lambda sample: sample.time_s) - 1

    def steps(self) -> Iterator[tuple[float, Sample]]:
        """Every sample with the time it comes into force; without an end if the trace loops."""
        lap = 0
        while True:
            for sample in self.samples:
                yield lap * self.duration_s + sample.time_s, sample
            if not self.loop:
                return
            lap += 1


def read_trace(path: Path, *, loop: bool = True) -> Trace:
    """Read a trace. Raises TraceInvalid, which names the file and the line."""
    check_size(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), start=1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TraceInvalid(path, 0, f"can't be read: {why}") from error
    if not rows:
        raise TraceInvalid(path, 0, "is empty; it must begin with the line time_s,bandwidth_bps")
    columns = _columns(path, rows[0][1])
    samples = tuple(_sample(path, number, columns, row) for number, row in rows[1:])
    if not samples:
        raise TraceInvalid(path, 0, "has a header and no rows")
    return Trace(samples, _step_s(path, [number for number, _ in rows[1:]], samples), loop)


def check_size(path: Path) -> None:
    """Raises TraceInvalid for a file that is too long to be a trace."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise TraceInvalid(path, 0, f"can't be read: {error.strerror}") from error
    if size > LARGEST_FILE_BYTES:
        raise TraceInvalid(path, 0, f"has {size} bytes, a trace may have {LARGEST_FILE_BYTES}; cut it into parts")


def check_rows(path: Path, count: int, step_s: float) -> None:
    """Raises TraceInvalid for a file that would make more rows than a trace has."""
    if count > MOST_ROWS:
        why = f"would be {count:,} rows of {step_s:g} s, {MOST_ROWS:,} at most; take longer steps"
        raise TraceInvalid(path, 0, why)


def write_trace(path: Path, trace: Trace) -> None:
    """As `read_trace` reads it, with the columns that the samples have; the whole file or none. Raises OSError."""
    columns = [name for name in _RANGES if any(_value(sample, name) is not None for sample in trace.samples)]
    lines = [",".join(columns)]
    lines += [",".join(_text(_value(sample, name)) for name in columns) for sample in trace.samples]
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _value(sample: Sample, name: str) -> float | None:
    if name == "rtt_ms":
        return None if sample.rtt_s is None else 1000 * sample.rtt_s
    found: float | None = getattr(sample, name)
    return found


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}"


def _columns(path: Path, header: Sequence[str]) -> list[str]:
    columns = [name.strip() for name in header]
    for name in columns:
        if name not in _RANGES:
            raise TraceInvalid(path, 1, f"unknown column {name!r}; known are {', '.join(_RANGES)}")
    for name in _REQUIRED:
        if name not in columns:
            raise TraceInvalid(path, 1, f"the column {name} is missing")
    if len(set(columns)) < len(columns):
        raise TraceInvalid(path, 1, "a column stands there twice")
    return columns


def _sample(path: Path, line: int, columns: Sequence[str], row: Sequence[str]) -> Sample:
    if len(row) != len(columns):
        raise TraceInvalid(path, line, f"{len(row)} fields, the header has {len(columns)}")
    values = {name: _number(path, line, name, text) for name, text in zip(columns, row, strict=True)}
    return Sample(
        time_s=values["time_s"],
        bandwidth_bps=values["bandwidth_bps"],
        rtt_s=_seconds(values),
        rssi_dbm=values.get("rssi_dbm"),
        loss=values.get("loss"),
    )


def _seconds(values: Mapping[str, float]) -> float | None:
    return values["rtt_ms"] / 1000 if "rtt_ms" in values else None


def _number(path: Path, line: int, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise TraceInvalid(path, line, f"{name} is {text!r}, not a number") from None
    low, high = _RANGES[name]
    if not math.isfinite(value) or not low <= value <= high:
        allowed = f"{low:g} or more" if math.isinf(high) else f"{low:g} to {high:g}"
        raise TraceInvalid(path, line, f"{name} is {text.strip()}; allowed is {allowed}")
    return value


def _step_s(path: Path, lines: Sequence[int], samples: Sequence[Sample]) -> float:
    """The step of the grid, after checking that the times are one."""
    times_s = [sample.time_s for sample in samples]
    if times_s[0] != 0:
        raise TraceInvalid(path, lines[0], f"time_s starts at {times_s[0]:g}, not at 0")
    if len(times_s) == 1:
        return _LONE_STEP_S
    step_s = times_s[1]
    for index, line in enumerate(lines[1:], start=1):
        if step_s <= 0 or abs(times_s[index] - times_s[index - 1] - step_s) > _GRID_TOLERANCE * step_s:
            raise TraceInvalid(path, line, f"time_s {times_s[index]:g} is not one step after {times_s[index - 1]:g}")
    return step_s
