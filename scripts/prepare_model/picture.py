"""A picture of a model's profile: how sensitive each layer is, how much attention it gets, and the bits it is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.kv.allocation import MAX_BITS, MIN_BITS, allocate
from edge_agent.kv.profile import Profile
from edge_agent.kv.selection import Selection, best_layers, gaussian_prior, layer_scores
from edge_agent.model.manifest import Manifest
from scripts.prepare_model.errors import PreparationError

TARGETS = (8, 6, 4)
_BLUE, _ORANGE, _GREY = "#2a6f97", "#d1495b", "#8d99ae"


def draw(manifest: Manifest, path: Path) -> None:
    """Write the picture (its format by the suffix). Raises PreparationError if it can't be drawn or written."""
    profile = manifest.profile
    if profile is None:
        raise PreparationError(f"the bundle of {manifest.name} has no profile; prepare it again")
    try:
        import matplotlib as mpl  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise PreparationError("matplotlib not installed: the picture needs the extra `evaluate`") from None
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False}):
        figure = Figure(figsize=(max(7.0, 0.32 * len(profile.error)), 7.6), layout="constrained")
        above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 4))
        _sensitivity(above, profile)
        _choice(middle, profile)
        _bits(below, profile)
        below.set_xlabel("layer")
        figure.suptitle(
            f"{manifest.name}: sensitivity and bits by layer ({profile.passages} passages, {profile.tokens} tokens)"
        )
        try:
            figure.savefig(path, dpi=130)
        except (OSError, ValueError) as error:
            raise PreparationError(f"--picture {path}: {error}") from None


def _sensitivity(axes: Any, profile: Profile) -> None:
    layers = np.arange(len(profile.error))
    bars = axes.bar(layers, profile.error, color=_GREY, width=0.7, label="squared error E (eq. 4)")
    axes.set_ylabel(f"E at {MIN_BITS} bits")
    other = axes.twinx()
    (line,) = other.plot(
        layers, profile.divergence, "o-", color=_ORANGE, markersize=4, label="KL divergence of the answers"
    )
    other.set_ylabel(f"KL, nats, this layer alone at {MIN_BITS} bits")
    other.set_ylim(bottom=0)
    axes.set_title("sensitivity: the paper ranks by E; what 4 bits cost the answers is another ranking", loc="left")
    axes.legend(handles=[bars, line], loc="upper left", frameon=False)


def _choice(axes: Any, profile: Profile) -> None:
    selection = Selection()
    layers = np.arange(len(profile.attention))
    attention = np.array(profile.attention)
    scores = layer_scores(attention, selection)
    sent = best_layers(scores, selection.ratio)
    colours = [_BLUE if layer in sent else "#dde3ea" for layer in layers]
    bars = axes.bar(layers, attention, color=colours, width=0.7, label="attention on the context (blue: layer sent)")
    prior = gaussian_prior(len(layers), selection.prior_mean, selection.prior_spread)
    (line,) = axes.plot(layers, prior, "--", color=_GREY, label="Gaussian prior P")
    (score,) = axes.plot(layers, scores, "s", color="black", markersize=3, label="score S (eq. 3)")
    axes.set_ylim(0, 1.35)
    axes.set_title(f"choice of layers: {len(sent)} of {len(layers)} with these texts' mean attention", loc="left")
    axes.legend(handles=[bars, line, score], loc="upper center", ncols=3, frameon=False)


def _bits(axes: Any, profile: Profile) -> None:
    layers = len(profile.error)
    sent = best_layers(layer_scores(np.array(profile.attention), Selection()), Selection().ratio)
    every = tuple(range(layers))
    rows: dict[str, list[int]] = {}
    for target in TARGETS:
        rows[f"mix{target}"] = _widths(profile.error, every, target)
    rows["klmix6"] = _widths(profile.divergence, every, 6)
    for target in TARGETS:
        rows[f"qkvcomm-{target}"] = _widths(profile.error, sent, target)
    table = np.array(list(rows.values()), dtype=float)
    table[table == 0] = np.nan
    axes.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=MAX_BITS + 2)
    for row, widths in enumerate(rows.values()):
        for layer, bits in enumerate(widths):
            colour = "white" if bits == MAX_BITS else "black"
            axes.text(layer, row, str(bits) if bits else "·", ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_title("bits by layer (·: not sent)", loc="left")
    axes.tick_params(length=0)


def _widths(figures: Sequence[float], sent: Sequence[int], target: int) -> list[int]:
    """Bits of every layer, 0 where it is not sent."""
    widths = [0] * len(figures)
    for layer, bits in zip(sent, allocate([figures[layer] for layer in sent], target), strict=True):
        widths[layer] = bits
    return widths
