"""Pictures of traces: rates over time, one panel a trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from scripts.traces.trace import Trace

MBIT = 1e6
RATE, GRID = "#0072b2", "#dddddd"


def draw(traces: Sequence[tuple[str, Trace]], path: Path) -> None:
    """Rates in Mbit/s, logarithmic from 0.01 on; what is below lies on the axis.

    Raises OSError, and ValueError for a format that is none.
    """
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 0.6 + 1.5 * len(traces)), layout="constrained")
        panels = figure.subplots(len(traces), 1, squeeze=False)[:, 0]
        for panel, (name, trace) in zip(panels, traces, strict=True):
            times = [sample.time_s for sample in trace.samples]
            rates = np.array([sample.bandwidth_bps for sample in trace.samples]) / MBIT
            panel.step([*times, trace.duration_s], [*rates, rates[-1]], where="post", color=RATE, linewidth=1)
            panel.set_yscale("symlog", linthresh=0.01, linscale=0.3)
            panel.set_ylim(0, max(1.0, 1.3 * float(rates.max())))
            panel.set_xlim(0, trace.duration_s)
            panel.grid(visible=True, color=GRID, linewidth=0.5)
            panel.set_title(name, loc="left", fontsize=9, parse_math=False)
            panel.set_ylabel("Mbit/s")
            panel.spines[["top", "right"]].set_visible(False)
        panels[-1].set_xlabel("seconds")
        figure.savefig(path, dpi=110)
