"""CSV files of equal steps from 0 on: what every kind of trace is read from and written to."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from scripts.traces.errors import TraceInvalid

LARGEST_FILE_BYTES = 64 * 2**20
MOST_ROWS = 1_000_000
"""Of a trace that is made or brought in."""
TIME = "time_s"
LEAST_STEP_S = 0.001
_GRID_TOLERANCE = 0.01
_LONE_STEP_S = 1.0

Ranges = Mapping[str, tuple[float, float]]
"""Least and largest value of each column, of which the first `required` must be there."""
Row = dict[str, float]


def read_table(path: Path, ranges: Ranges, required: int) -> tuple[list[Row], float]:
    """The rows, and the step between them. Raises TraceInvalid, which names the file and the line."""
    check_size(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), start=1) if row]
    except (OSError, ValueError, csv.Error) as error:  # of UTF-8; of a name with a NUL
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TraceInvalid(path, 0, f"can't be read: {why}") from error
    if not rows:
        raise TraceInvalid(path, 0, f"is empty; it must begin with the line {','.join(list(ranges)[:required])}")
    columns = _columns(path, rows[0][1], ranges, required)
    found = [_row(path, number, columns, row, ranges) for number, row in rows[1:]]
    if not found:
        raise TraceInvalid(path, 0, "has a header and no rows")
    return found, _step_s(path, [number for number, _ in rows[1:]], [row[TIME] for row in found])


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[float | None]]) -> None:
    """As `read_table` reads it; the whole file or none. Raises OSError."""
    lines = [",".join(columns)]
    lines += [",".join("" if value is None else f"{value:.10g}" for value in row) for row in rows]
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def check_size(path: Path) -> None:
    """Raises TraceInvalid for a file that is too long to be a trace."""
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # the latter of a name with a NUL
        why = getattr(error, "strerror", None) or str(error)
        raise TraceInvalid(path, 0, f"can't be read: {why}") from error
    if size > LARGEST_FILE_BYTES:
        raise TraceInvalid(path, 0, f"has {size} bytes, a trace may have {LARGEST_FILE_BYTES}; cut it into parts")


def check_rows(path: Path, count: int, step_s: float) -> None:
    """Raises TraceInvalid for a file that would make more rows than a trace has."""
    if count > MOST_ROWS:
        why = f"would be {count:,} rows of {step_s:g} s, {MOST_ROWS:,} at most; take longer steps"
        raise TraceInvalid(path, 0, why)


def _columns(path: Path, header: Sequence[str], ranges: Ranges, required: int) -> list[str]:
    columns = [name.strip() for name in header]
    for name in columns:
        if name not in ranges:
            raise TraceInvalid(path, 1, f"unknown column {name!r}; known are {', '.join(ranges)}")
    for name in list(ranges)[:required]:
        if name not in columns:
            raise TraceInvalid(path, 1, f"the column {name} is missing")
    if len(set(columns)) < len(columns):
        raise TraceInvalid(path, 1, "a column stands there twice")
    return columns


def _row(path: Path, line: int, columns: Sequence[str], row: Sequence[str], ranges: Ranges) -> Row:
    if len(row) != len(columns):
        raise TraceInvalid(path, line, f"{len(row)} fields, the header has {len(columns)}")
    return {name: _number(path, line, name, text, ranges) for name, text in zip(columns, row, strict=True)}


def _number(path: Path, line: int, name: str, text: str, ranges: Ranges) -> float:
    try:
        value = float(text)
    except ValueError:
        raise TraceInvalid(path, line, f"{name} is {text!r}, not a number") from None
    low, high = ranges[name]
    if not math.isfinite(value) or not low <= value <= high:
        allowed = f"{low:g} or more" if math.isinf(high) else f"{low:g} to {high:g}"
        raise TraceInvalid(path, line, f"{name} is {text.strip()}; allowed is {allowed}")
    return value


def _step_s(path: Path, lines: Sequence[int], times_s: Sequence[float]) -> float:
    """The step of the grid, after checking that the times are one."""
    if times_s[0] != 0:
        raise TraceInvalid(path, lines[0], f"time_s starts at {times_s[0]:g}, not at 0")
    if len(times_s) == 1:
        return _LONE_STEP_S
    step_s = times_s[1]
    if 0 < step_s < LEAST_STEP_S:
        raise TraceInvalid(path, lines[1], f"a step of {step_s:g} s; {LEAST_STEP_S:g} s is the least")
    for index, line in enumerate(lines[1:], start=1):
        if step_s <= 0 or abs(times_s[index] - times_s[index - 1] - step_s) > _GRID_TOLERANCE * step_s:
            raise TraceInvalid(path, line, f"time_s {times_s[index]:g} is not one step after {times_s[index - 1]:g}")
    return step_s
