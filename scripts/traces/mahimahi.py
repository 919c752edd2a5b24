"""Traces of mahimahi (Netravali et al., USENIX ATC 2015): a line for each packet that a link could deliver, in ms.

Each line is one chance to deliver 1,500 bytes, at so many milliseconds since the start; several lines of one moment are
several packets, and the trace begins anew at the time of its last line.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scripts.traces.errors import TraceInvalid
from scripts.traces.table import check_rows, check_size
from scripts.traces.trace import LARGEST_BPS, Sample, Trace

PACKET_BITS = 8 * 1_500
LONGEST_MS = 7 * 24 * 3_600_000


def read_mahimahi(path: Path, *, step_s: float = 1.0, loop: bool = True) -> Trace:
    """The rate in bins of step_s; a last one that is not full is left out, unless it is the only one.

    Raises TraceInvalid, which names the file and the line.
    """
    check_size(path)
    try:
        rows = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is no text"
        raise TraceInvalid(path, 0, f"can't be read: {why}") from error
    times_ms: list[int] = []
    for line, row in enumerate(rows, start=1):
        text = row.strip()
        if not text:
            continue
        if not text.isdigit() or (time_ms := int(text[:12])) > LONGEST_MS:
            raise TraceInvalid(path, line, f"{text[:40]!r} is no time in milliseconds, a week at most")
        if times_ms and time_ms < times_ms[-1]:
            raise TraceInvalid(path, line, f"{time_ms} ms comes after {times_ms[-1]} ms")
        times_ms.append(time_ms)
    if not times_ms or times_ms[-1] == 0:
        raise TraceInvalid(path, 0, "holds no packets after its start")
    return Trace(_samples(path, np.array(times_ms), step_s), step_s, loop)


def _samples(path: Path, times_ms: np.ndarray[tuple[int], np.dtype[np.int_]], step_s: float) -> tuple[Sample, ...]:
    bins = max(1, int(times_ms[-1] / (1000 * step_s)))
    check_rows(path, bins, step_s)
    width_s = step_s if bins > 1 else min(step_s, times_ms[-1] / 1000)
    # a packet at a bin's end is the bin's: what arrives then was on its way in it
    places = np.ceil(times_ms / (1000 * step_s)).astype(int) - 1
    counts = np.bincount(np.maximum(places, 0), minlength=bins)[:bins]
    rates_bps = counts * PACKET_BITS / width_s
    if rates_bps.max() > LARGEST_BPS:
        raise TraceInvalid(path, 0, f"has a rate of {rates_bps.max():g} bit/s")
    return tuple(Sample(index * step_s, float(rate)) for index, rate in enumerate(rates_bps))
