"""When a plan is revised: noise never, a step once, and never more often or later than the rule says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.drift import LATEST_SHARE, Drift, Rule

RATE_BPS = 1e7
LONG_S = 1_000.0


def drift(predicted_s: float = LONG_S, **rule: float) -> Drift:
    return Drift(rule=Rule(**rule), accepted_s=100.0, predicted_s=predicted_s, references={"t": RATE_BPS})


def revisions(watched: Drift, rates_bps: list[float], *, every_s: float = 1.0) -> list[int]:
    """At which reports it was revised, if each revision takes what was seen as its reference."""
    found = []
    for index, rate_bps in enumerate(rates_bps):
        now_s = 100.0 + index * every_s
        if watched.heard("pi-1", {"t": rate_bps}, now_s):
            watched.revised({"t": rate_bps}, now_s)
            found.append(index)
    return found


@given(st.integers(0, 2**32 - 1))
def test_a_fifth_of_noise_is_never_a_change(seed: int) -> None:
    dice = np.random.default_rng(seed)
    assert revisions(drift(), list(RATE_BPS * dice.uniform(0.8, 1.2, 300))) == []


@given(st.integers(0, 2**32 - 1), st.sampled_from([3.0, 1 / 3]))
def test_a_step_by_three_under_noise_is_exactly_one_change_at_the_second_report(seed: int, step: float) -> None:
    dice = np.random.default_rng(seed)
    rates = RATE_BPS * dice.uniform(0.89, 1.11, 100)
    rates[50:] *= step
    assert revisions(drift(), list(rates)) == [51]


def test_a_change_back_needs_the_factor_again() -> None:
    slow, middle = RATE_BPS / 3, RATE_BPS / 3 * 1.4
    assert revisions(drift(), [RATE_BPS, slow, slow, *[middle] * 20, *[RATE_BPS] * 5]) == [2, 24]


def test_one_report_or_two_that_contradict_each_other_change_nothing() -> None:
    rates = [RATE_BPS, RATE_BPS / 4, RATE_BPS, RATE_BPS * 4, RATE_BPS / 4, RATE_BPS * 4, RATE_BPS]
    assert revisions(drift(), rates) == []


def test_two_agents_reports_of_one_moment_are_not_two_reports() -> None:
    watched = drift()
    assert not watched.heard("pi-1", {"t": 1e6}, 100.0)
    assert not watched.heard("jetson-1", {"t": 1e6}, 100.1)
    assert watched.heard("pi-1", {"t": 1e6}, 101.0)


def test_revisions_keep_their_distance() -> None:
    rates = [RATE_BPS * 3.0 ** (index // 2) for index in range(12)]
    found = revisions(drift(interval_s=1.0), rates, every_s=0.3)
    assert found[0] == 3
    assert min(np.diff(found)) * 0.3 >= 1.0


@pytest.mark.parametrize(("at_share", "revised"), [(LATEST_SHARE - 0.05, True), (LATEST_SHARE + 0.05, False)])
def test_late_in_a_round_nothing_is_revised_any_more(at_share: float, revised: bool) -> None:
    watched = drift(predicted_s=10.0)
    watched.heard("pi-1", {"t": 1e6}, 100.0)
    assert watched.heard("pi-1", {"t": 1e6}, 100.0 + 10.0 * at_share) == revised


@given(st.lists(st.tuples(st.sampled_from(["t", "u"]), st.sampled_from([0.0, 1e-300, 1.0, 1e15])), max_size=20))
def test_rates_that_are_zero_or_of_nobody_are_no_evidence(reports: list[tuple[str, float]]) -> None:
    watched = drift()
    for index, (transfer, rate_bps) in enumerate(reports):
        found = watched.heard("pi-1", {transfer: rate_bps}, 100.0 + index)
        assert not (found and all(name == "u" or rate == 0 for name, rate in reports))
