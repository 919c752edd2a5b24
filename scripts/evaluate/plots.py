"""Rate against quality as a picture: what each method loses for the bits it sends."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, pairwise
from math import ceil
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from scripts.evaluate.errors import EvaluationError
from scripts.evaluate.method import FACTS, NONE, TEXT
from scripts.evaluate.summary import Row
from scripts.prepare_model.errors import DiskFull, is_disk_full

_BASELINES: dict[str, Any] = {TEXT: "-.", NONE: ":", NONE + FACTS: (0, (5, 2, 1, 2, 1, 2))}
_PANELS = (("kl", "KL, nats (10⁻⁵ is that or less)", 1.0), ("agreement", "agreement", 1.0), ("f1", "F1, %", 100.0))
# Of multiple choice, where others have F1.
_CHOICE = ("choice", "right choice, %", 100.0)
# A logarithmic axis has no 0: what is nearer to it, as an exact cache, stands here.
_LEAST_KL = 1e-5
_EXACT = "exact"
_COLOURS = {
    "klt*": "#0072B2",
    "q*": "#E69F00",
    "mix*": "#009E73",
    "mix*-whole": "#009E73",
    "qkvcomm-*": "#D55E00",
    "group-*": "#CC79A7",
    "kivi-*": "#7A6A00",
    _EXACT: "#222222",
}
# Okabe and Ito's palette, which stays apart under the common forms of colour blindness; most of it stands above.
FURTHER = ("#0072B2", "#CC79A7", "#56B4E9", "#7A6A00", "#5B3FA0", "#777777")
MARKERS = ("s", "D", "^", "o", "v", "P", "X", "<", ">", "h")
_BITS = (0.25, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# Where a label may stand beside its marker, in points, best first: x, y, horizontal and vertical alignment.
_PLACES = tuple(
    (x * far, y * far, {1: "left", 0: "center", -1: "right"}[x], {1: "bottom", 0: "center", -1: "top"}[y])
    for far in (4, 9, 15, 22, 30, 40, 50, 60)
    for x, y in ((1, 1), (-1, -1), (1, -1), (-1, 1), (0, 1), (0, -1), (1, 0), (-1, 0))
)


class Label(Struct, frozen=True):
    """A text beside the marker at (x, y), in the panel's units."""

    text: str
    x: float
    y: float
    colour: str


class _Style(Struct, frozen=True):
    """filled: without it, hollow and dashed, as facts and backfill are beside the same without."""

    colour: str
    marker: str
    filled: bool = True


class _Point(Struct, frozen=True):
    """A method in a panel: x in bits an element, y with its interval in the panel's unit."""

    method: str
    x: float
    y: float
    low: float
    high: float


def rate_quality(rows: Sequence[Row], path: Path) -> None:
    """A column for each data set; KL, agreement and F1 (of multiple choice the share of right choices) over bits per
    element; the file's ending says its format.

    Methods of a family are joined by a line, dashed and hollow with facts or backfill; those that send no cache are
    levels. Rows of a data set may be of several runs and of different numbers of its items: the legend names those of
    fewer, and the last panel leaves them out, for scores hang on which items were asked; the others are against the
    uncompressed run of the same item.
    Raises EvaluationError if there is nothing to draw or the file can't be written.
    """
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    if not datasets:
        raise EvaluationError("there are no results to draw")
    plt = pyplot()
    figure, axes = plt.subplots(
        len(_PANELS),
        len(datasets),
        figsize=(max(8.5, 1.4 + 4.6 * len(datasets)), 12.5),
        height_ratios=(1.4, 1.2, 1),
        layout="constrained",
        sharex="col",
        squeeze=False,
    )
    styles = _styles(rows)
    by_dataset = [[row for row in rows if row.dataset == dataset] for dataset in datasets]
    with saving(figure, path):
        titles = [""] * len(_PANELS)
        for column, (dataset, own) in enumerate(zip(datasets, by_dataset, strict=True)):
            most = max(row.items for row in own)
            axes[0][column].set_title(f"{dataset}, {most} items", fontsize=10, loc="left")
            axes[-1][column].set_xlabel("bits per element", fontsize=9)
            for place, (metric, title, scale) in enumerate(_panels(own)):
                panel = axes[place][column]
                panel.set_ylabel(title if title != titles[place] else "", fontsize=9)
                titles[place] = title
                last = panel is axes[-1][column]
                _draw(panel, [row for row in own if row.items == most or not last], styles, metric, scale)
        _legend(figure, rows, styles)
        figure.draw_without_rendering()
        for column, own in enumerate(by_dataset):
            # The last panel's intervals leave no room for names, and the markers are those above.
            for panel, (metric, _, scale) in zip(axes[:-1, column], _panels(own)[:-1], strict=True):
                points = list(_points(own, metric, scale))
                label(panel, _labels(points, styles), [(each.x, each.y) for each in points], _lines(panel))


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only; imported when it is first needed, for it is heavy."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    return plt


@contextmanager
def saving(figure: Any, path: Path) -> Iterator[None]:
    """Save a figure once its block has drawn it, and close it. Raises EvaluationError if the file can't be written."""
    try:
        yield
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        if is_disk_full(error):
            raise EvaluationError(str(DiskFull(str(path), path.parent))) from None
        why = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise EvaluationError(f"{path} can't be written ({why})") from None
    finally:
        pyplot().close(figure)


def family(method: str) -> str:
    """What a method's curve is: its name with * for its first number and without facts, `q6-l70` → `q*-l70`.

    The number in fp16 and float32 is none: theirs is the share of entries, `fp16-e30-b4` → `fp16-e*-b4`.
    """
    name = method.removesuffix(FACTS)
    if name in {"fp16", "float32"}:
        return _EXACT
    if name.startswith(("fp16", "float32")):
        return re.sub(r"(-[eh])\d+", r"\1*", name)
    return re.sub(r"\d+(\.\d+)?", "*", name, count=1)


def _panels(rows: Sequence[Row]) -> tuple[tuple[str, str, float], ...]:
    """Metric, title and scale of a data set's panels."""
    return (*_PANELS[:-1], _CHOICE) if any(row.choice is not None for row in rows) else _PANELS


def _is_level(method: str) -> bool:
    """Whether no cache is sent, so that the method has no place on the axis of bits."""
    return method.removesuffix(FACTS) in _BASELINES


def _unfilled(name: str) -> str:
    """The same without backfill."""
    return re.sub(r"-b\d+$", "", name)


def _styles(rows: Sequence[Row]) -> dict[str, _Style]:
    names = list(dict.fromkeys(family(row.method) for row in rows if not _is_level(row.method)))
    names.sort(key=lambda name: name not in _COLOURS)
    taken = {_COLOURS.get(name) for name in names}
    further, markers = cycle([each for each in FURTHER if each not in taken] or FURTHER), cycle(MARKERS)
    styles = {
        name: _Style(_COLOURS.get(name) or next(further), next(markers))
        for name in dict.fromkeys(map(_unfilled, names))
    }
    return {name: msgspec.structs.replace(styles[_unfilled(name)], filled=name == _unfilled(name)) for name in names}


def _points(rows: Sequence[Row], metric: str, scale: float) -> Iterator[_Point]:
    least = _LEAST_KL if metric == "kl" else float("-inf")
    for row in rows:
        found = getattr(row, metric)
        if row.bits_per_element is not None and not _is_level(row.method) and found is not None:
            y, low, high = (max(scale * value, least) for value in (found.mean, found.low, found.high))
            yield _Point(row.method, row.bits_per_element, y, low, high)


def dress(panel: Any) -> None:
    """Small ticks, a pale grid behind what is drawn, no frame to the top and the right."""
    panel.tick_params(labelsize=8)
    panel.grid(color="#eeeeee", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _draw(panel: Any, rows: Sequence[Row], styles: dict[str, _Style], metric: str, scale: float) -> None:
    points = list(_points(rows, metric, scale))
    for name, style in styles.items():
        for facts in (False, True):
            curve = sorted(
                (each for each in points if family(each.method) == name and each.method.endswith(FACTS) == facts),
                key=lambda each: each.x,
            )
            panel.errorbar(
                [each.x for each in curve],
                [each.y for each in curve],
                yerr=[[each.y - each.low for each in curve], [each.high - each.y for each in curve]],
                color=style.colour,
                marker=style.marker,
                markersize=5,
                markerfacecolor=style.colour if style.filled and not facts else "white",
                linestyle="-" if style.filled and not facts else "--",
                linewidth=1,
                elinewidth=0.6,
                ecolor=(style.colour, 0.55),
                capsize=2,
            )
    levels = []
    for row in rows:
        found = getattr(row, metric)
        if row.method in _BASELINES and found is not None and (metric != "kl" or found.mean > _LEAST_KL):
            levels.append(scale * found.mean)  # but not of the reference itself, whose KL of 0 would stretch the axis
            panel.axhline(levels[-1], color="#555555", linewidth=1, linestyle=_BASELINES[row.method])
    panel.set_xscale("log")
    if metric == "kl":
        panel.set_yscale("log")
    bits = [row.bits_per_element for row in rows if row.bits_per_element is not None] or [1.0, 32.0]
    low, high = min(bits) / 1.5, max(bits) * 1.5
    panel.set_xlim(low, high)
    panel.set_ylim(*_range([y for each in points for y in (each.low, each.high)] + levels, metric))
    panel.set_xticks([], minor=True)
    ticks = [each for each in _BITS if low <= each <= high]
    panel.set_xticks(ticks, [f"{each:g}" for each in ticks])
    dress(panel)


def _range(values: Sequence[float], metric: str) -> tuple[float, float]:
    """Limits of an axis around what is drawn on it."""
    low, high = min(values, default=0.1), max(values, default=1.0)
    if metric == "kl":
        return low / 2, high * 2
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    return low - room, high + room


def _legend(figure: Any, rows: Sequence[Row], styles: dict[str, _Style]) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415

    handles = [
        Line2D(
            [],
            [],
            color=style.colour,
            marker=style.marker,
            markersize=5,
            markerfacecolor=style.colour if style.filled else "white",
            linestyle="-" if style.filled else "--",
            linewidth=1,
            label=f"{name}{_fewer(name, rows)}",
        )
        for name, style in styles.items()
    ]
    if any(row.method.endswith(FACTS) and not _is_level(row.method) for row in rows):
        grey = Line2D([], [], color="#555555", marker="o", markersize=5, linewidth=1, label="with facts")
        grey.set(markerfacecolor="white", linestyle="--")
        handles.append(grey)
    handles += [
        Line2D([], [], color="#555555", linewidth=1, linestyle=line, label=name)
        for name, line in _BASELINES.items()
        if any(row.method == name for row in rows)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def _fewer(name: str, rows: Sequence[Row]) -> str:
    """Of how many items a family is, if others on its data sets are of more."""
    most = {row.dataset: max(other.items for other in rows if other.dataset == row.dataset) for row in rows}
    own = [row for row in rows if family(row.method) == name]
    if all(row.items == most[row.dataset] for row in own):
        return ""
    return f", {min(row.items for row in own)} items"


def _labels(points: Sequence[_Point], styles: dict[str, _Style]) -> list[Label]:
    """The methods' names; one with facts or backfill needs none beside itself."""
    drawn = {each.method for each in points}
    return [
        Label(each.method, each.x, each.y, styles[family(each.method)].colour)
        for each in points
        if (plain := _unfilled(each.method.removesuffix(FACTS))) == each.method or plain not in drawn
    ]


def label(
    panel: Any,
    labels: Sequence[Label],
    points: Sequence[tuple[float, float]],
    bars: Sequence[tuple[float, float, float, float]] = (),
) -> None:
    """Texts beside their markers, covering neither a text with what leads to it nor any of the markers at `points`.

    bars: of intervals and curves, x, y, x, y of their ends, which are kept free where there is room. The figure must
    have been laid out before.
    """
    pixels = panel.transData.transform(list(points)) if points else []
    markers: list[tuple[float, ...]] = [(x - 5, y - 5, x + 5, y + 5) for x, y in pixels]
    ends = panel.transData.transform([(x, y) for bar in bars for x, y in (bar[:2], bar[2:])]) if bars else []
    lines = [box for one, other in zip(ends[::2], ends[1::2], strict=True) for box in _along(one, other)]
    texts: list[tuple[float, ...]] = []
    for each in sorted(labels, key=lambda each: each.x):
        found = _placed(panel, each, [*markers, *lines], texts) or _placed(panel, each, markers, texts)
        if not found:
            panel.annotate(each.text, (each.x, each.y), (4, 4), textcoords="offset points", fontsize=7)
        texts += found


def _along(one: Sequence[float], other: Sequence[float]) -> Iterator[tuple[float, ...]]:
    """Boxes in pixels that cover a line and little beside it."""
    (x, y), (u, v) = one, other
    pieces = max(1, ceil(min(abs(u - x), abs(v - y)) / 4))
    for at in range(pieces):
        a, b, c, d = (low + (high - low) * (at + end) / pieces for end in (0, 1) for low, high in ((x, u), (y, v)))
        yield min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1


def _lines(panel: Any) -> list[tuple[float, float, float, float]]:
    """The ends of all lines that are drawn in a panel: pieces of curves, levels and intervals."""
    lines = [line for line in panel.lines if line.get_linestyle() != "None"]
    paths = [line.get_transform().transform(line.get_xydata()) for line in lines]
    paths += [panel.transData.transform(part) for bars in panel.collections for part in bars.get_segments()]
    back = panel.transData.inverted()
    return [(*one, *other) for path in paths if len(path) for one, other in pairwise(back.transform(path).tolist())]


def _placed(
    panel: Any, label: Label, taken: Sequence[tuple[float, ...]], texts: Sequence[tuple[float, ...]]
) -> list[tuple[float, ...]]:
    """The boxes in pixels of a label and of the line that leads to it, where both were put within the panel, the label
    off all that is taken and both off other texts; none if there is no such place.
    """
    from matplotlib.patheffects import withStroke  # noqa: PLC0415
    from matplotlib.text import Text  # noqa: PLC0415

    renderer, bounds = panel.figure.canvas.get_renderer(), panel.get_window_extent()
    marker, point = panel.transData.transform((label.x, label.y)), panel.figure.dpi / 72
    for x, y, horizontal, vertical in _PLACES:
        led = max(x, y, -x, -y) > 9
        name = panel.annotate(
            label.text,
            (label.x, label.y),
            (x, y),
            textcoords="offset points",
            ha=horizontal,
            va=vertical,
            fontsize=7,
            color=label.colour,
            path_effects=[withStroke(linewidth=1.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#999999"} if led else None,
        )
        name.update_positions(renderer)
        box = tuple(Text.get_window_extent(name, renderer).extents)  # without the arrow
        leader = list(_along(marker, (marker[0] + x * point, marker[1] + y * point))) if led else []
        inside = bounds.x0 <= box[0] and box[2] <= bounds.x1 and bounds.y0 <= box[1] and box[3] <= bounds.y1
        free = not any(_overlap(box, other) for other in (*taken, *texts))
        if inside and free and not any(_overlap(part, other) for part in leader for other in texts):
            return [box, *leader]
        name.remove()
    return []


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
