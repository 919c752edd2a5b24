"""How fast tokens come, and how many are worth computing meanwhile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.arrivals import LATE, REMEMBERED, Arrivals, worth_computing

rates = st.floats(1, 10_000)


def steady(tps: float, tokens: int, count: int, *, began_s: float = 10.0) -> tuple[Arrivals, float]:
    """So many arrivals at this rate, and when the last was."""
    arrivals, now_s = Arrivals(began_s), began_s
    for _ in range(count):
        now_s += tokens / tps
        arrivals.came(tokens, now_s)
    return arrivals, now_s


@given(rates, st.integers(1, 128), st.integers(1, 3 * REMEMBERED))
def test_a_steady_rate_is_measured_from_the_first_arrival_on(tps: float, tokens: int, count: int) -> None:
    arrivals, now_s = steady(tps, tokens, count)
    assert arrivals.any
    assert arrivals.tps(now_s) == pytest.approx(tps, rel=1e-3)
    assert arrivals.late_s() == pytest.approx(now_s + LATE * tokens / tps, rel=1e-3)


@given(rates, st.integers(1, 128), st.floats(1.01, 100))
def test_it_decays_once_what_is_due_does_not_come(tps: float, tokens: int, times: float) -> None:
    arrivals, now_s = steady(tps, tokens, 5)
    assert arrivals.tps(now_s + times * tokens / tps) == pytest.approx(tps / times, rel=1e-3)


def test_before_anything_came_there_is_no_rate() -> None:
    arrivals = Arrivals(10.0)
    assert not arrivals.any
    assert arrivals.tps(99.0) == 0
    assert arrivals.late_s() == 10.0


def test_it_follows_a_link_that_changes() -> None:
    arrivals, now_s = steady(1_000, 64, 20)
    for _ in range(REMEMBERED):
        now_s += 64 / 50
        arrivals.came(64, now_s)
    assert arrivals.tps(now_s) == pytest.approx(50, rel=1e-3)


def test_two_slices_in_one_breath_are_no_division_by_nothing() -> None:
    arrivals = Arrivals(10.0)
    arrivals.came(64, 11.0)
    arrivals.came(64, 11.0)
    assert arrivals.tps(11.0) > 1_000
    assert arrivals.tps(12.0) == pytest.approx(64)


@given(st.integers(1, 4_096), st.floats(0, 10_000), rates)
def test_what_is_worth_computing_meets_what_comes_meanwhile(gap: int, come_tps: float, own_tps: float) -> None:
    computed = worth_computing(gap, come_tps=come_tps, own_tps=own_tps)
    assert 0 <= computed <= gap
    came = computed / own_tps * come_tps
    assert computed + came == pytest.approx(gap, rel=1e-6)
