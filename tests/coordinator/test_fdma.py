"""Channels shared in frequency (fdma): shares of a band against a root finder, min-max against a solver."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize

from coordinator.latency import Scenario
from coordinator.policy.shares import Shares
from coordinator.table import Table, band_shares, rates_of_shares
from coordinator.timeline import evaluate
from tests.coordinator.builders import make_link, random_scenario, scenario_of
from tests.coordinator.wild import random_split, wild_scenario

ratios = st.floats(1e-3, 1e6)
fractions = st.floats(1e-6, 1.0)


def rate_of(share: float, snr: float) -> float:
    """b·log2(1 + snr/b) over what the whole band gives, as the paper has it."""
    return share * float(np.log2(1 + snr / share) / np.log2(1 + snr))


@given(fractions, ratios)
def test_a_share_of_a_band_is_what_a_root_finder_says(fraction: float, snr: float) -> None:
    share = band_shares(np.array([fraction]), np.array([snr]))[0]
    root = brentq(lambda b: rate_of(b, snr) - fraction, 1e-300, 1.0, xtol=1e-300, rtol=1e-12)
    assert share == pytest.approx(root, rel=1e-6, abs=1e-11)
    assert rate_of(float(share), snr) >= fraction * (1 - 1e-7)


@given(fractions, ratios)
def test_the_rate_of_a_share_undoes_the_share_of_a_rate(share: float, snr: float) -> None:
    rate = rates_of_shares(np.array([share]), np.array([snr]))
    assert rate[0] == pytest.approx(rate_of(share, snr), rel=1e-9)
    assert band_shares(rate, np.array([snr]))[0] == pytest.approx(share, rel=1e-6, abs=1e-11)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), ratios)
def test_shares_of_a_band_rise_with_the_rate_and_are_never_above_it(rates: list[float], snr: float) -> None:
    rising = np.sort(np.array(rates))
    shares = band_shares(rising, np.full(len(rising), snr))
    assert np.all(np.diff(shares) >= -1e-12)
    assert np.all(shares <= rising * (1 + 1e-9) + 1e-12)


@given(st.floats(1e-3, 1e5), fractions, st.floats(0, 1))
def test_tangents_are_nowhere_above_the_curve(snr: float, near: float, at: float) -> None:
    bps = 2e7
    link = make_link(snr=snr, channels=(("band", bps),))
    table = Table(scenario_of([link]))
    slope, intercept = table.tangents(np.array([near * bps]))
    assert slope[0] * at * bps + intercept[0] <= table.used(np.array([at * bps]))[0] + 1e-7
    touched = slope[0] * near * bps + intercept[0]
    assert touched == pytest.approx(table.used(np.array([near * bps]))[0], abs=1e-7)


def test_a_link_alone_on_a_part_of_a_band_has_more_than_that_part_of_its_rate() -> None:
    links = [make_link(snr=100.0, channels=(("band", 2e7),))]
    found = Shares(scenario_of(links, airtime_free={"band": 0.25})).allocate(np.zeros(1))
    assert found.course.rates[0, 0] == pytest.approx(2e7 * rate_of(0.25, 100.0), rel=1e-6)
    assert found.course.rates[0, 0] == pytest.approx(Table(found.table.scenario).most_bps[0], rel=1e-6)


def in_a_band(seed: int) -> Scenario:
    """Two to four links to as many receivers, all in one band."""
    dice = np.random.default_rng(seed)
    count = 2 + seed % 3
    scenario = random_scenario(seed, links=count, receivers=count, shared=True)
    links = tuple(
        replace(link, snr=10 ** dice.uniform(0, 4), channels=(("band", link.channels[0][1]),))
        for link in scenario.links
    )
    return replace(scenario, links=links, header_bytes=0)


@pytest.mark.parametrize("seed", range(24))
def test_min_max_shares_of_a_band_are_what_a_solver_finds(seed: int) -> None:
    """SLSQP over the shares b themselves: T ≥ offset_i + bits_i / r_i(b_i), Σ b_i ≤ 1, media fixed."""
    scenario = in_a_band(seed)
    shares = Shares(scenario)
    cache = np.random.default_rng(seed).random(len(scenario.links)) < 0.7
    cache[0] = True
    found = shares.allocate(shares.own_of(cache))
    decisions = found.decisions
    plain = evaluate(scenario, [replace(decision, rate_bps=1e30) for decision in decisions])
    offset_s = np.array([plain.request_e2e_s[link.request] for link in scenario.links])
    bits = np.array(
        [
            (link.tokens - decision.own_tokens) * link.elements_per_token * decision.rung.bits_per_element
            if decision.rung
            else 8.0 * link.bytes_per_token_id * link.tokens
            for link, decision in zip(scenario.links, decisions, strict=True)
        ]
    )
    alone = np.array([link.channels[0][1] for link in scenario.links])
    snr = np.array([link.snr for link in scenario.links])
    count = len(bits)

    def takes_s(b: np.ndarray) -> np.ndarray:
        b = np.maximum(b, 1e-9)
        return np.asarray(bits / (alone * b * np.log2(1 + snr / b) / np.log2(1 + snr)))

    scale = found.within_s
    solved = minimize(
        lambda x: x[0],
        np.array([float((offset_s + takes_s(np.full(count, 1 / count))).max()) / scale, *np.full(count, 1 / count)]),
        constraints=[
            {"type": "ineq", "fun": lambda x: 1 - x[1:].sum()},
            {"type": "ineq", "fun": lambda x: x[0] - (offset_s + takes_s(x[1:])) / scale},
        ],
        bounds=[(0, None)] + [(1e-7, 1)] * count,
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 500},
    )
    assert solved.x[1:].sum() <= 1 + 1e-7
    assert found.within_s == pytest.approx(solved.x[0] * scale, rel=1e-3)
    assert found.e2e_s == pytest.approx(found.within_s, rel=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_no_channel_is_given_more_than_its_band(seed: int) -> None:
    scenario = wild_scenario(seed, fdma=True)
    shares = Shares(scenario)
    found = shares.allocate(random_split(shares, seed))
    used = shares.table.used(found.course.rates[:, 0])
    assert np.all(used <= shares.table.free * (1 + 1e-9))
    assert found.e2e_s <= found.within_s * (1 + 1e-9)


@given(st.floats(1e-3, 1e5), st.floats(1e-4, 1e3))
def test_what_a_band_is_used_grows_as_its_slope_says_beyond_all_of_it_too(snr: float, alone: float) -> None:
    bps = 2e7
    table = Table(scenario_of([make_link(snr=snr, channels=(("band", bps),))]))
    around = alone * bps * np.array([[1 - 1e-4], [1.0], [1 + 1e-4]])
    shares, slope = table.steepness(around)
    assert slope[0, 0] * (1 - 1e-3) <= (shares[2, 0] - shares[0, 0]) / (around[2, 0] - around[0, 0])
    assert (shares[2, 0] - shares[0, 0]) / (around[2, 0] - around[0, 0]) <= slope[2, 0] * (1 + 1e-3)
