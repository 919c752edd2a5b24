"""Damage against recovery: what eviction takes from the answers, and what backfill gives back of it.

Each method that backfills, X-bN, is set against X, which evicts the same entries and leaves it at that, as Orthogonal
BackFill's authors do (arXiv 2604.13349). Damage is what X loses of a metric against the uncompressed run (`text`),
recovery what X-bN regains of it: as much as the damage would be all, 0 nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from msgspec import Struct

from edge_agent.kv.eviction import By
from scripts.evaluate.errors import EvaluationError
from scripts.evaluate.method import FACTS, TEXT, method
from scripts.evaluate.plots import FURTHER, MARKERS, Label, dress, label, pyplot, saving
from scripts.evaluate.records import Record
from scripts.evaluate.summary import Estimate, comparable, estimate, paired, paired_if_any

_KL = ("kl", "KL, nats", 1.0)
_F1 = ("f1", "F1, points", 100.0)
_CHOICE = ("choice", "right choice, points", 100.0)
_BY: dict[By, str] = {"layer": "by layer (-e)", "head": "by head (-h)"}
_LEAST_HEIGHT = 0.15
"""Of a panel's width, in the metric's unit: where recoveries are small the line of full recovery is still seen."""


class Backfill(Struct, frozen=True):
    """A method that backfills and the one that only evicts. share: of the entries that is kept, 0-1."""

    backfilled: str
    evicted: str
    share: float
    by: By

    @property
    def curve(self) -> str:
        """What pairs have in common that differ in their share: recipe, choice and rank."""
        base, _, kept = self.evicted.removesuffix(FACTS).rpartition("-")
        rank = self.backfilled.removesuffix(FACTS).rpartition("-")[2]
        facts = FACTS if self.evicted.endswith(FACTS) else ""
        return f"{base}-{kept[0]}*-{rank}{facts}, {_BY[self.by]}"


class Recovery(Struct, frozen=True, kw_only=True):
    """A pair on a data set, over the items that all methods have done. Metrics are as in the records, damage and
    recovery positive where answers got worse and better again; None where no item has the metric or, but for KL,
    `text` was not run. choice: of multiple choice, which is not asked for its F1.
    """

    dataset: str
    method: Backfill
    items: int
    kl_damage: Estimate
    kl_recovery: Estimate
    f1_damage: Estimate | None
    f1_recovery: Estimate | None
    choice_damage: Estimate | None
    choice_recovery: Estimate | None


def pairs(methods: Sequence[str]) -> tuple[Backfill, ...]:
    """Of methods those that backfill, whose counterparts are there too; in the order of `methods`."""
    return tuple(pair for name in dict.fromkeys(methods) if (pair := _pair(name)) and pair.evicted in methods)


def recoveries(records: Sequence[Record], methods: Sequence[str]) -> tuple[Recovery, ...]:
    """For each data set, in order of appearance, the pairs that were run on it. Pure."""
    counted = comparable(records, methods)
    found = []
    for dataset in dict.fromkeys(record.dataset for record in counted):
        own = [record for record in counted if record.dataset == dataset]
        ran = {record.method for record in own}
        found += [_recovery(own, pair) for pair in pairs(methods) if {pair.backfilled, pair.evicted} <= ran]
    return tuple(found)


def _pair(name: str) -> Backfill | None:
    rung = method(name).recipe
    if rung is None or rung.eviction is None or not rung.eviction.rank:
        return None
    evicted = rung.name.removesuffix(f"-b{rung.eviction.rank}") + name.removeprefix(rung.name)
    return Backfill(name, evicted, rung.eviction.share, rung.eviction.by)


def _recovery(records: Sequence[Record], pair: Backfill) -> Recovery:
    evicted = [record for record in records if record.method == pair.evicted]
    chosen = any(record.choice is not None for record in records)
    f1, choice = (None, "choice") if chosen else ("f1", None)
    return Recovery(
        dataset=records[0].dataset,
        method=pair,
        items=len(evicted),
        kl_damage=estimate([record.kl for record in evicted], [record.context for record in evicted]),
        kl_recovery=paired(records, "kl", pair.evicted, pair.backfilled),
        f1_damage=paired_if_any(records, f1, TEXT, pair.evicted),
        f1_recovery=paired_if_any(records, f1, pair.backfilled, pair.evicted),
        choice_damage=paired_if_any(records, choice, TEXT, pair.evicted),
        choice_recovery=paired_if_any(records, choice, pair.backfilled, pair.evicted),
    )


def damage_recovery(found: Sequence[Recovery], path: Path) -> None:
    """A column for each data set; recovery over damage in KL, and in F1 or, of multiple choice, in right choices.

    Points are named by the share of entries that is kept, in percent; bars are 95 % intervals. The file's ending says
    its format. Raises EvaluationError if there is nothing to draw or the file can't be written.
    """
    datasets = list(dict.fromkeys(each.dataset for each in found))
    if not datasets:
        raise EvaluationError("there is no method with backfill and without to draw")
    styles = _styles(found)
    figure, axes = pyplot().subplots(
        2, len(datasets), figsize=(1.4 + 4.6 * len(datasets), 9.5), layout="constrained", squeeze=False
    )
    with saving(figure, path):
        drawn = []
        for column, dataset in enumerate(datasets):
            own = [each for each in found if each.dataset == dataset]
            axes[0][column].set_title(f"{dataset}, {own[0].items} items", fontsize=10, loc="left")
            second = _CHOICE if any(each.choice_recovery for each in own) else _F1
            for panel, (metric, title, scale) in zip(axes[:, column], (_KL, second), strict=True):
                points = list(_points(own, metric, scale))
                panel.set_xlabel(f"damage by eviction: {title}", fontsize=9)
                panel.set_ylabel(f"recovery by backfill: {title}", fontsize=9)
                _draw(panel, points, styles)
                drawn.append((panel, points))
        _legend(figure, styles, columns=2 * len(datasets))
        figure.draw_without_rendering()
        for panel, points in drawn:
            names = [Label(f"{100 * each.share:g} %", each.x, each.y, styles[each.curve][0]) for each in points]
            level = (panel.get_xlim()[0], 0.0, panel.get_xlim()[1], 0.0)
            bars = [bar for each in points for bar in each.bars]
            label(panel, names, [(each.x, each.y) for each in points], [level, *bars])


class _Point(Struct, frozen=True):
    """x: damage, y: recovery, with their intervals, in the panel's unit."""

    curve: str
    share: float
    x: float
    x_low: float
    x_high: float
    y: float
    y_low: float
    y_high: float

    @property
    def bars(self) -> tuple[tuple[float, float, float, float], ...]:
        return (self.x_low, self.y, self.x_high, self.y), (self.x, self.y_low, self.x, self.y_high)


def _points(found: Sequence[Recovery], metric: str, scale: float) -> Iterator[_Point]:
    for each in found:
        damage, recovery = getattr(each, f"{metric}_damage"), getattr(each, f"{metric}_recovery")
        if damage is not None and recovery is not None:
            x = (scale * value for value in (damage.mean, damage.low, damage.high))
            y = (scale * value for value in (recovery.mean, recovery.low, recovery.high))
            yield _Point(each.method.curve, each.method.share, *x, *y)


def _styles(found: Sequence[Recovery]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each curve."""
    curves = dict.fromkeys(each.method.curve for each in found)
    return dict(zip(curves, zip(cycle(("#0072B2", "#D55E00", *FURTHER[1:])), cycle(MARKERS)), strict=False))


def _draw(panel: Any, points: Sequence[_Point], styles: dict[str, tuple[str, str]]) -> None:
    for index, (curve, (colour, marker)) in enumerate(styles.items()):
        own = [each for each in points if each.curve == curve]
        panel.errorbar(
            [each.x for each in own],
            [each.y for each in own],
            xerr=[[each.x - each.x_low for each in own], [each.x_high - each.x for each in own]],
            yerr=[[each.y - each.y_low for each in own], [each.y_high - each.y for each in own]],
            color=colour,
            **_marker(marker, index),
            elinewidth=0.6,
            ecolor=(colour, 0.35),
            capsize=2,
        )
    panel.axhline(0, color="#555555", linewidth=1, linestyle=":")
    panel.axline((0, 0), slope=1, color="#555555", linewidth=1, linestyle="--")
    left, right = _around([value for each in points for value in (each.x_low, each.x_high)])
    low, high = _around([value for each in points for value in (each.y_low, each.y_high)])
    panel.set_xlim(left, right)
    panel.set_ylim(low, max(high, _LEAST_HEIGHT * right))
    dress(panel)


def _marker(marker: str, index: int) -> dict[str, Any]:
    """Every second curve's is hollow and larger, so that of two at one place both are seen."""
    hollow: dict[str, Any] = {"markersize": 8, "markerfacecolor": "none"} if index % 2 else {"markersize": 5}
    return {"marker": marker, "linestyle": "none", **hollow}


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis around what is drawn on it and 0."""
    low, high = min([0.0, *values]), max([0.0, *values])
    room = 0.06 * (high - low) or 0.05
    return low - room, high + room


def _legend(figure: Any, styles: dict[str, tuple[str, str]], *, columns: int) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415

    handles = [
        Line2D([], [], color=colour, label=curve, **_marker(marker, index))
        for index, (curve, (colour, marker)) in enumerate(styles.items())
    ]
    handles += [
        Line2D([], [], color="#555555", linewidth=1, linestyle=line, label=name)
        for line, name in (("--", "all is given back (y = x)"), (":", "nothing is"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
