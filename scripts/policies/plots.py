"""The figures, as PNG: each from its data alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from scripts.evaluate.plots import dress, pyplot
from scripts.policies.errors import PoliciesError
from scripts.policies.findings import Curve, Findings
from scripts.policies.regions import MEDIA, Region, Regions
from scripts.policies.scale import STAGES, Timed
from scripts.policies.simulation import Simulation, ratios

# Okabe and Ito's palette, which stays apart under the common forms of colour blindness.
_INK = "#222222"
_POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "token": ("token (NL only)", {"color": "#E69F00", "linewidth": 1.6}),
    "kv": ("kv (KV only)", {"color": "#56B4E9", "linewidth": 1.6}),
    "jmsra": ("jmsra", {"color": "#D55E00", "linewidth": 1.8}),
    "binary": (
        "best binary",
        {"color": _INK, "linestyle": "none", "marker": "o", "markersize": 4, "fillstyle": "none"},
    ),
    "optimum": ("optimum", {"color": "#009E73", "linewidth": 1.8}),
    "bound": ("bound", {"color": "#009E73", "linewidth": 1.0, "linestyle": ":"}),
    "streaming": ("optimum, streaming", {"color": "#0072B2", "linewidth": 2.2}),
    "streaming bound": ("bound, streaming", {"color": "#0072B2", "linewidth": 1.0, "linestyle": ":"}),
}
_TOKENS, _CACHE = "#F3C86B", "#8FB9DD"
# Splits, the darker the more they gain: from each of these shares of the best binary's E2E on.
_GAINS = {0.0: "#DDEFE6", 0.05: "#A9D8C2", 0.15: "#5CB391", 0.3: "#1B7A58"}
_STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "table": ("table", {"color": "#56B4E9", "marker": "s"}),
    "choice": ("choice", {"color": "#0072B2", "marker": "o"}),
    "rungs": ("raising of rungs", {"color": "#E69F00", "marker": "^"}),
    "bound": ("bound", {"color": "#009E73", "marker": "D"}),
    "plan": ("plan: table, choice, rungs", {"color": _INK, "marker": "v", "linewidth": 2.2}),
    "again": ("plan again, one link changed", {"color": "#CC79A7", "marker": "P", "linewidth": 2.2}),
    "links": ("links as values", {"color": "#D55E00", "marker": "x"}),
}


def draw_findings(found: Findings, directory: Path) -> tuple[str, ...]:
    """A file for given and one for generated text: a row an axis, E2E, and E2E over the better fixed medium's."""
    made = []
    for name, curves in (("given", found.given), ("generated", found.generated)):
        figure, axes = pyplot().subplots(len(curves), 2, figsize=(10, 12.5), layout="constrained", squeeze=False)
        file = f"policies-{name}.png"
        with _saving(figure, directory / file):
            for (left, right), curve in zip(axes, curves, strict=True):
                _draw_curve(left, curve)
                _draw_ratios(right, curve)
            axes[0][0].set_title("E2E of the round", fontsize=10, loc="left")
            axes[0][1].set_title("E2E ÷ that of the better fixed medium", fontsize=10, loc="left")
            handles, labels = axes[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9, frameon=False)
        made.append(file)
    return tuple(made)


def _draw_curve(panel: Any, curve: Curve) -> None:
    for policy, (label, style) in _POLICIES.items():
        panel.plot(curve.x, _floats(curve, policy), label=label, **style)
    panel.set_yscale("log")
    panel.set_ylabel("s", fontsize=9)
    _dress_curve(panel, curve)
    _plain(panel.yaxis)


def _draw_ratios(panel: Any, curve: Curve) -> None:
    fixed = np.minimum(_floats(curve, "token"), _floats(curve, "kv"))
    for policy in ("jmsra", "binary", "optimum", "streaming"):
        panel.plot(curve.x, _floats(curve, policy) / fixed, **_POLICIES[policy][1])
    panel.axhline(1, color=_INK, linewidth=0.8)
    _dress_curve(panel, curve)


def _dress_curve(panel: Any, curve: Curve) -> None:
    panel.set_xlabel(curve.x_title, fontsize=9)
    if curve.name in {"compute", "rate"}:
        panel.set_xscale("log")
        _plain(panel.xaxis)
    _frame(panel)
    if curve.name == "agents":
        panel.set_xticks([x for x in curve.x if x not in {3.0, 10.0}])


def _floats(curve: Curve, policy: str) -> Any:
    return np.array([np.nan if value is None else value for value in curve.e2e_s[policy]])


def draw_regions(found: Regions, path: Path) -> None:
    """A map a device, cache ready above and not ready below: media as colours, splits the darker the more they gain."""
    devices = list(dict.fromkeys(each.device for each in found.maps))
    figure, axes = pyplot().subplots(
        2,
        len(devices),
        figsize=(3.9 * len(devices), 7.4),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    with _saving(figure, path):
        for each in found.maps:
            _draw_region(axes[0 if each.ready else 1][devices.index(each.device)], each)
        for panel in axes[-1]:
            panel.set_xlabel("link rate, Mbit/s", fontsize=9)
        for panel, state in zip(axes[:, 0], ("sender's cache ready", "cache to be computed first"), strict=True):
            panel.set_ylabel(f"{state}\nreceiver's prefill, tokens/s", fontsize=9)
        gains = [*_GAINS, None]
        splits = [
            f"split, {_percent(low)}-{_percent(high)} % faster" if high else f"split, {_percent(low)} % or more"
            for low, high in pairwise(gains)
            if low is not None
        ]
        handles = [_patch(colour) for colour in (_TOKENS, *_GAINS.values(), _CACHE)] + [_line(_INK, "--", 1.2)]
        labels = ["tokens", *splits, "cache", "the device's own prefill"]
        figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9, frameon=False)


def _percent(share: float | None) -> str:
    return f"{100 * (share or 0):.0f}"


def _draw_region(panel: Any, region: Region) -> None:
    from matplotlib.colors import ListedColormap  # noqa: PLC0415  heavy, and only for this

    codes = np.array([[MEDIA.index(medium) for medium in row] for row in region.media])
    gains = np.digitize(np.array(region.gain), list(_GAINS))
    shades = np.where(codes == MEDIA.index("split"), np.maximum(gains, 1), np.where(codes == 0, 0, len(_GAINS) + 1))
    colours = ListedColormap([_TOKENS, *_GAINS.values(), _CACHE])
    rates, prefills = np.array(region.rates_mbps), np.array(region.prefill_tps)
    panel.set(xscale="log", yscale="log")
    panel.pcolormesh(_edges(rates), _edges(prefills), shades, cmap=colours, vmin=-0.5, vmax=len(_GAINS) + 1.5)
    panel.axhline(region.device_tps, color=_INK, linestyle="--", linewidth=1.2)
    panel.set(xlim=(rates[0], rates[-1]), ylim=(prefills[0], prefills[-1]))
    panel.set_title(region.title, fontsize=10, loc="left")
    panel.tick_params(labelsize=8)
    _plain(panel.xaxis)
    _plain(panel.yaxis)


def _edges(values: Any) -> Any:
    """Of cells around values that lie evenly on a logarithmic axis."""
    step = np.sqrt(values[1] / values[0])
    return np.append(values / step, values[-1] * step)


def draw_simulation(found: Simulation, path: Path) -> None:
    """How many rounds end so much earlier than with the best binary choice."""
    figure, axes = pyplot().subplots(figsize=(7, 4.2), layout="constrained")
    with _saving(figure, path):
        for ours, binary, label, colour, line in (
            ("streaming", "whole", "optimum streaming ÷ best binary", "#0072B2", "-"),
            ("whole", "whole", "optimum ÷ best binary", "#009E73", "-"),
            ("streaming", "streaming", "optimum streaming ÷ best binary streaming", "#0072B2", "--"),
        ):
            values = np.sort(ratios(found.rounds, ours, binary))
            mean = float(np.mean(values))
            shares = np.arange(len(values) + 1) / len(values)
            values = np.append(values[0], values)
            axes.step(
                values, 100 * shares, where="post", color=colour, linestyle=line, label=f"{label}, mean {mean:.2f}"
            )
        axes.set_xlabel("E2E ratio", fontsize=9)
        axes.set_ylabel("rounds at or below it, %", fontsize=9)
        axes.set_ylim(0, 101)
        axes.set_xlim(right=1.01)
        _frame(axes)
        axes.legend(fontsize=8, frameon=False, loc="upper left")


def draw_scale(found: Sequence[Timed], path: Path) -> None:
    """Seconds by stage over links, log-log, a panel for each network."""
    networks = list(dict.fromkeys(each.network for each in found))
    figure, axes = pyplot().subplots(
        1, len(networks), figsize=(4.6 * len(networks), 4.4), layout="constrained", sharey=True, squeeze=False
    )
    titles = {"own": "links of their own", "cell": "in Wi-Fi cells of 20 links", "fdma": "in FDMA bands of 20 links"}
    with _saving(figure, path):
        for panel, network in zip(axes[0], networks, strict=True):
            own = [each for each in found if each.network is network]
            for stage in STAGES:
                label, style = _STAGES[stage]
                seconds = [np.nan if (value := each.seconds[stage]) is None else value for each in own]
                panel.plot([each.links for each in own], seconds, label=label, markersize=4, **style)
            panel.set(xscale="log", yscale="log")
            panel.set_title(titles[network.value], fontsize=10, loc="left")
            panel.set_xlabel("links (one receiver per ten)", fontsize=9)
            _frame(panel)
            _plain(panel.xaxis)
            _plain(panel.yaxis)
        axes[0][0].set_ylabel("process seconds, one core", fontsize=9)
        axes[0][0].legend(fontsize=8, frameon=False)


def _frame(panel: Any) -> None:
    dress(panel)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _plain(axis: Any) -> None:
    """Ticks as plain numbers at 1, 2 and 5 of every decade where an axis is logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    if axis.get_scale() != "log":
        return
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / max(low, 1e-12) < 300 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch  # noqa: PLC0415

    return Patch(color=colour)


def _line(colour: str, style: str, width: float) -> Any:
    from matplotlib.lines import Line2D  # noqa: PLC0415

    return Line2D([], [], color=colour, linestyle=style, linewidth=width)


@contextmanager
def _saving(figure: Any, path: Path) -> Iterator[None]:
    """Saves a figure once its block has drawn it, and closes it. Raises PoliciesError if it can't be written."""
    try:
        yield
        figure.savefig(path, dpi=130, facecolor="white")
    except OSError as error:
        raise PoliciesError(f"{path} can't be written ({error.strerror})") from None
    finally:
        pyplot().close(figure)
