"""JMSRA's own comparison (arXiv 2605.25422), under the coordinator's model: E2E over compute, channel and agents.

Agents of one receiver share a band by FDMA, or a cell by airtime. The paper streams nothing; so does everything here
but our optimum with slices. Its text is generated when it is sent, ours is mostly at hand: both are computed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
from msgspec import Struct

from broker_config.messages import Speed
from coordinator.latency import Scenario
from coordinator.policy.optimum import OptimumPolicy
from coordinator.policy.shares import Shares
from scripts.policies.compare import compare
from scripts.policies.profiles import profiles
from scripts.policies.scenarios import Radio, link_of, round_of, whole

AGENTS = 6
MANY_AGENTS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 24)
BAND_HZ = 10e6
SNR_DB = 15.0
CELL_BPS = 50e6
SEED = 2605
SHORTER = 4
"""A text that an agent generates has so many times fewer tokens than a document that it holds."""


class Curve(Struct, frozen=True, kw_only=True):
    """Seconds of E2E over x, by policy; None where a policy was not asked.

    streaming: our optimum with slices; bound: below which no plan of constant rates is, with slices.
    """

    name: str
    x_title: str
    x: tuple[float, ...]
    e2e_s: dict[str, tuple[float | None, ...]]


class Findings(Struct, frozen=True, kw_only=True):
    """Curves of given text, and of text that is still to be generated."""

    given: tuple[Curve, ...]
    generated: tuple[Curve, ...]


def curves(points: int) -> tuple[tuple[str, str, tuple[float, ...], Callable[[float], Scenario]], ...]:
    """Name, title of the axis, its values, and the round of given text at one of them."""
    compute = tuple(np.geomspace(20, 5_000, points).tolist())
    rates = tuple(np.geomspace(2, 500, points).tolist())
    snrs = tuple(np.linspace(-10, 40, points).tolist())
    agents = tuple(float(count) for count in MANY_AGENTS[: max(3, min(points, len(MANY_AGENTS)))])
    return (
        ("compute", "receiver's prefill, tokens/s", compute, lambda tps: senders(receiver_tps=tps)),
        ("rate", "rate of the cell (airtime), Mbit/s", rates, lambda mbps: senders(cell_bps=mbps * 1e6)),
        ("snr", "mean SNR of the band (FDMA), dB", snrs, lambda snr_db: senders(snr_db=snr_db)),
        ("agents", "senders", agents, lambda count: senders(count=int(count))),
    )


def steps(points: int) -> int:
    """Rounds to compare."""
    return 2 * sum(len(values) for _, _, values, _ in curves(points))


def findings(points: int, hear: Callable[[str], None]) -> Findings:
    """All curves; hear is told before each round."""
    given, made = (
        tuple(
            _curve(name, title, values, partial(_round, at, generated), hear)
            for name, title, values, at in curves(points)
        )
        for generated in (False, True)
    )
    return Findings(given=given, generated=made)


def senders(
    *,
    count: int = AGENTS,
    receiver_tps: float | None = None,
    snr_db: float = SNR_DB,
    cell_bps: float | None = None,
) -> Scenario:
    """The first so many of a fixed row of Pi 5-class agents of unlike speed, context and place, one Pi 5 receiving.

    On a band of BAND_HZ each with its SNR around snr_db, or, if cell_bps is named, in a cell shared by airtime.
    Contexts of 256 to 768 tokens, their caches ready.
    """
    pi = profiles()["pi-5"]
    receiver = pi.speed((receiver_tps or pi.prefill_tps) / pi.prefill_tps)
    links = []
    for index, (speed, tokens, beside_db) in enumerate(_row(count)):
        radio = Radio(hertz=BAND_HZ, snr_db=snr_db + beside_db)
        channels, snr = ((("band", radio.bps),), radio.snr) if cell_bps is None else ((("cell", cell_bps),), 0.0)
        links.append(
            link_of(index, 0, tokens=tokens, sender_speed=speed, receiver_speed=receiver, channels=channels, snr=snr)
        )
    return round_of(links, slices=True)


def _row(count: int) -> Iterator[tuple[Speed, int, float]]:
    dice = random.Random(SEED)
    for _ in range(count):
        yield profiles()["pi-5"].speed(10 ** dice.uniform(-0.15, 0.15)), dice.randint(256, 768), dice.uniform(-4, 4)


def _round(at: Callable[[float], Scenario], generated: bool, x: float) -> Scenario:
    """With what each agent holds, or with a shorter text that it is still to write."""
    scenario = at(x)
    if not generated:
        return scenario
    links = tuple(replace(link, tokens=link.tokens // SHORTER, cached=False, generated=True) for link in scenario.links)
    return replace(scenario, links=links)


def _curve(
    name: str, x_title: str, values: tuple[float, ...], at: Callable[[float], Scenario], hear: Callable[[str], None]
) -> Curve:
    rows: list[dict[str, float | None]] = []
    for x in values:
        hear(f"{name} {x:.3g}")
        scenario = at(x)
        found = compare(whole(scenario))
        shares, policy = Shares(scenario), OptimumPolicy()
        chosen = policy.choose(shares)
        rows.append(
            {
                "token": found.token,
                "kv": found.kv,
                "jmsra": found.jmsra,
                "tightest": found.tightest,
                "binary": found.binary,
                "optimum": found.optimum,
                "bound": found.bound,
                "streaming": chosen.e2e_s,
                "streaming bound": policy.bound_s(shares, chosen),
            }
        )
    return Curve(name=name, x_title=x_title, x=values, e2e_s={key: tuple(row[key] for row in rows) for key in rows[0]})
