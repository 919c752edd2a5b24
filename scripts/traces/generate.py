"""Traces that are made: seeded, and of the kinds that links are known for.

    walk      a rate that wanders about its median: log10 of it is an Ornstein-Uhlenbeck process
    bursts    good and bad times in turn (Gilbert 1960, Elliott 1963): two states, each left after an exponential time
    drive     past cells along a road: path loss with distance, shadowing that changes along the way (Gudmundson 1991),
              Shannon's rate of the strongest cell, which is given up for another with hysteresis
    outages   a walk that is cut off now and then, as behind a hill: Poisson arrivals, exponential durations

Every kind has the median rate that is asked for (outages counted out), so that kinds can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scripts.traces.table import MOST_ROWS
from scripts.traces.trace import LARGEST_BPS, Sample, Trace

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a trace is made with. rtt_s: of an idle link; longer where the rate is low."""

    kind: str
    duration_s: float
    step_s: float = 1.0
    median_bps: float = 10e6
    rtt_s: float = 0.04
    seed: int = 0


WANDER_DECADES, WANDER_S = 0.3, 15.0
"""Standard deviation of log10 of the rate, and the time after which it has forgotten a third of where it was."""
GOOD_S, BAD_S, BAD_SHARE = 12.0, 4.0, 0.1
SPEED_MPS, SPACING_M, OFFSET_M, PATH_LOSS = 14.0, 600.0, 40.0, 3.5
EDGE_SNR_DB, SHADOW_DB, SHADOW_M, HYSTERESIS_DB = 3.0, 6.0, 50.0, 3.0
OUTAGE_EVERY_S, OUTAGE_S = 60.0, 6.0
RTT_GROWS = 0.5
"""A round trip is longer by this for each halving of the rate below its median: queues."""
LONGEST_RTT = 20.0
"""Times that of the idle link."""


def made(terms: Made) -> Trace:
    """The trace. Raises ValueError for terms that make none."""
    if terms.kind not in KINDS:
        raise ValueError(f"no trace is of the kind {terms.kind}; there are {', '.join(KINDS)}")
    steps = terms.duration_s / terms.step_s if terms.step_s > 0 else 0.0
    if not 0.5 < steps <= MOST_ROWS:  # nor is nan
        raise ValueError(f"{terms.duration_s:g} s in steps of {terms.step_s:g} s are not 1 to {MOST_ROWS:,} steps")
    count = round(steps)
    if not 0 < terms.median_bps <= LARGEST_BPS / 1e3 or not 0 <= terms.rtt_s <= 60:
        raise ValueError("a median rate is above 0 bit/s and at most 1e12, a round trip from 0 to 60 s")
    dice = np.random.default_rng((terms.seed, list(KINDS).index(terms.kind)))
    shape, open_share = KINDS[terms.kind](dice, count, terms.step_s)
    rates = terms.median_bps * shape / np.median(shape)
    halvings = np.maximum(-np.log2(np.maximum(rates / terms.median_bps, 1e-9)), 0.0)
    rtts_s = terms.rtt_s * np.minimum(1 + RTT_GROWS * halvings, LONGEST_RTT)
    rows = zip((rates * open_share).tolist(), rtts_s.tolist(), strict=True)
    return Trace(tuple(Sample(i * terms.step_s, rate, rtt) for i, (rate, rtt) in enumerate(rows)), terms.step_s)


def _walk(dice: np.random.Generator, count: int, step_s: float) -> tuple[Floats, Floats]:
    decades = WANDER_DECADES * _wandering(dice, count, np.exp(-step_s / WANDER_S))
    return 10**decades, np.ones(count)


def _bursts(dice: np.random.Generator, count: int, step_s: float) -> tuple[Floats, Floats]:
    good = _intervals(dice, count, step_s, GOOD_S, BAD_S, first=bool(dice.random() < GOOD_S / (GOOD_S + BAD_S)))
    return good + (1 - good) * BAD_SHARE, np.ones(count)


def _drive(dice: np.random.Generator, count: int, step_s: float) -> tuple[Floats, Floats]:
    moved_m = SPEED_MPS * step_s
    along_m = dice.uniform(0, SPACING_M) + moved_m * np.arange(count)
    cells_m = SPACING_M * np.arange(-1, int(along_m[-1] / SPACING_M) + 3)
    edge_m = np.hypot(SPACING_M / 2, OFFSET_M)
    serving, shapes = 0, np.empty(count)
    kept = np.exp(-moved_m / SHADOW_M)
    shadow = dice.normal(size=len(cells_m))
    for index, at_m in enumerate(along_m):
        distance_m = np.hypot(at_m - cells_m, OFFSET_M)
        snr_db = EDGE_SNR_DB - 10 * PATH_LOSS * np.log10(distance_m / edge_m) + SHADOW_DB * shadow
        best = int(np.argmax(snr_db))
        if index == 0 or snr_db[best] > snr_db[serving] + HYSTERESIS_DB:
            serving = best
        shapes[index] = np.log2(1 + 10 ** (snr_db[serving] / 10))
        shadow = kept * shadow + np.sqrt(1 - kept**2) * dice.normal(size=len(cells_m))
    return shapes, np.ones(count)


def _outages(dice: np.random.Generator, count: int, step_s: float) -> tuple[Floats, Floats]:
    shape, _ = _walk(dice, count, step_s)
    return shape, _intervals(dice, count, step_s, OUTAGE_EVERY_S, OUTAGE_S, first=True)


KINDS: dict[str, Callable[[np.random.Generator, int, float], tuple[Floats, Floats]]] = {
    "walk": _walk,
    "bursts": _bursts,
    "drive": _drive,
    "outages": _outages,
}
"""By name: the rate's shape, and the share of each step in which the link is there."""


def _wandering(dice: np.random.Generator, count: int, kept: float) -> Floats:
    """An Ornstein-Uhlenbeck process of variance 1 in its steady state."""
    noise = dice.normal(size=count)
    found = np.empty(count)
    found[0] = noise[0]
    for index in range(1, count):
        found[index] = kept * found[index - 1] + np.sqrt(1 - kept**2) * noise[index]
    return found


def _intervals(
    dice: np.random.Generator, count: int, step_s: float, on_s: float, off_s: float, *, first: bool
) -> Floats:
    """Which share of each step is on, if on and off take turns for exponential times. first: how it begins."""
    end_s, at_s, on = count * step_s, 0.0, first
    switches = [0.0]
    while at_s < end_s:
        at_s += float(dice.exponential(on_s if on else off_s))
        switches.append(min(at_s, end_s))
        on = not on
    edges = step_s * np.arange(count + 1)
    times = np.array(switches)
    begun_on = (np.arange(len(times) - 1) % 2 == 0) == first
    upto = np.concatenate([[0.0], np.cumsum(np.diff(times) * begun_on)])
    return np.asarray(np.clip(np.diff(np.interp(edges, times, upto)) / step_s, 0.0, 1.0))
