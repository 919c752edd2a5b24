"""The runtime's picture: how fast each variant is, relative to one of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.bench.runtime.measured import LOAD, PEAK, REFERENCES, Row, RuntimeBench, ratio

# Okabe and Ito's palette, which stays apart under the common forms of colour blindness.
_OURS, _OTHERS = "#0072B2", "#E69F00"
_OUR_NAMES = frozenset({"int8", "int4", "fp32"})


def plot(benches: Sequence[RuntimeBench], path: Path) -> bool:
    """One row of panels a model, one panel a job, as PNG. False, and no file, if nothing was measured."""
    drawn = [bench for bench in benches if bench.rows]
    if not drawn:
        return False
    import matplotlib as mpl  # noqa: PLC0415  heavy, and only for this

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    columns = max(len(_speeds(bench)) for bench in drawn)
    heights = [0.9 + 0.34 * len(bench.rows) for bench in drawn]
    figure, axes = plt.subplots(
        len(drawn),
        columns,
        figsize=(2.0 + 2.3 * columns, sum(heights)),
        layout="constrained",
        squeeze=False,
        height_ratios=heights,
    )
    for bench, row in zip(drawn, axes, strict=True):
        _draw_model(bench, list(row))
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _draw_model(bench: RuntimeBench, axes: list[Any]) -> None:
    reference = next((row for name in REFERENCES if (row := bench.row(name)) is not None), bench.rows[0])
    rows = list(reversed(bench.rows))
    for panel, job in zip(axes, _speeds(bench), strict=False):
        _draw(panel, rows, reference, job)
        panel.set_title(f"{bench.model}\n{job}" if panel is axes[0] else job, fontsize=9, loc="left")
    for panel in axes[1:]:
        panel.set_yticklabels([])
    for panel in axes[len(_speeds(bench)) :]:
        panel.set_axis_off()
    axes[0].set_xlabel(f"speed ÷ {reference.name}", fontsize=8)


def _draw(panel: Any, rows: list[Row], reference: Row, job: str) -> None:
    """Bars to the median ratio, whiskers from the least round to the most."""
    for at, row in enumerate(rows):
        found = ratio(row, reference, job)
        if found is None:
            beside = panel.get_yaxis_transform()  # within the panel, whatever its scale
            panel.text(0.02, at, "not measured", transform=beside, va="center", fontsize=7, color="#555555")
            continue
        ours = row.name in _OUR_NAMES
        panel.barh(at, found.median, color=_OURS if ours else _OTHERS, hatch=None if ours else "//", edgecolor="white")
        whiskers = [[found.median - found.least], [found.most - found.median]]
        panel.errorbar(found.median, at, xerr=whiskers, color="#222222", capsize=2.5, linewidth=1)
        panel.text(found.most, at, f"  {found.median:.2f}", va="center", fontsize=7)
    panel.axvline(1, color="#222222", linewidth=0.8, linestyle=":")
    panel.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    panel.tick_params(axis="x", labelsize=7)
    panel.margins(x=0.22)
    panel.set_xlim(left=0)
    panel.set_ylim(-0.5, len(rows) - 0.5)
    panel.spines[["top", "right"]].set_visible(False)


def _speeds(bench: RuntimeBench) -> list[str]:
    return [job for job in bench.jobs if job not in {LOAD, PEAK}]
