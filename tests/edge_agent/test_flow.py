"""What a transfer under way shows of its link, in a time of the tests' own."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.flow import BACKLOG_BYTES, Flow

MEGABYTE = 1_000_000


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run(clock: Clock, moving: Flow, bytes_per_s: float, seconds: float, every_s: float = 0.05) -> None:
    """It moves at this rate, and someone reports so often."""
    start = moving.moved_bytes
    for step in range(1, round(seconds / every_s) + 1):
        clock.now_s += every_s
        moving.moved(int(start + bytes_per_s * step * every_s))


def test_nothing_is_known_before_half_a_second_is_over(clock: Clock) -> None:
    moving = Flow("t", clock=clock)
    assert (moving.rate_bps, moving.goodput_bps, moving.moved_bytes) == (None, None, 0)
    moving.made(10 * MEGABYTE)
    run(clock, moving, MEGABYTE, 0.3)
    assert moving.goodput_bps is None
    run(clock, moving, MEGABYTE, 0.3)
    assert moving.goodput_bps == pytest.approx(8e6, rel=0.01)
    assert moving.moved_bytes == pytest.approx(0.6 * MEGABYTE, rel=0.01)


def test_a_change_is_seen_within_a_second_and_silence_too(clock: Clock) -> None:
    moving = Flow("t", clock=clock)
    moving.made(100 * MEGABYTE)
    run(clock, moving, 3 * MEGABYTE, 2)
    run(clock, moving, MEGABYTE, 0.6)
    assert moving.goodput_bps == pytest.approx(8e6, rel=0.01)
    clock.now_s += 2
    assert moving.goodput_bps is not None
    assert moving.goodput_bps < 2.5e6


def test_after_a_change_of_pace_only_the_new_one_is_told(clock: Clock) -> None:
    moving = Flow("t", clock=clock)
    moving.made(100 * MEGABYTE)
    run(clock, moving, MEGABYTE, 2, every_s=0.5)
    moving.repaced()
    assert moving.goodput_bps is None
    run(clock, moving, 2 * MEGABYTE, 2, every_s=0.5)
    assert moving.goodput_bps == pytest.approx(16e6, rel=0.01)
    assert moving.moved_bytes == pytest.approx(6 * MEGABYTE, rel=0.01)


def test_of_fewer_than_three_intervals_no_rate_is_told_unless_they_take_long(clock: Clock) -> None:
    moving = Flow("t", clock=clock)
    moving.made(100 * MEGABYTE)
    run(clock, moving, MEGABYTE, 1.5, every_s=0.5)
    assert moving.goodput_bps is None
    run(clock, moving, MEGABYTE, 0.5, every_s=0.5)
    assert moving.goodput_bps == pytest.approx(8e6, rel=0.01)
    seldom = Flow("t", clock=clock)
    seldom.made(100 * MEGABYTE)
    run(clock, seldom, MEGABYTE, 4, every_s=2.0)
    assert seldom.goodput_bps is None
    clock.now_s += 5
    assert seldom.goodput_bps is not None


def test_reports_that_come_seldom_are_taken_over_a_longer_time(clock: Clock) -> None:
    moving = Flow("t", clock=clock)
    moving.made(100 * MEGABYTE)
    run(clock, moving, MEGABYTE / 8, 4, every_s=0.4)
    assert moving.goodput_bps == pytest.approx(1e6, rel=0.01)


def test_a_transfer_that_waits_for_its_encoder_says_nothing_of_the_link(clock: Clock) -> None:
    moving = Flow("t", clock=clock)
    for _ in range(20):
        moving.made(moving.moved_bytes + BACKLOG_BYTES - 1)
        run(clock, moving, MEGABYTE, 0.05)
    assert moving.goodput_bps is None
    assert moving.rate_bps == pytest.approx(8e6, rel=0.01)
    moving.made(moving.moved_bytes, all_of_it=True)
    run(clock, moving, MEGABYTE, 1)
    assert moving.goodput_bps == pytest.approx(8e6, rel=0.01)


def test_a_paced_transfer_tells_of_its_link_only_if_it_falls_behind(clock: Clock) -> None:
    moving = Flow("t", clock=clock, pace=lambda: 8e6)
    moving.made(100 * MEGABYTE)
    run(clock, moving, 0.9 * MEGABYTE, 1)
    assert moving.goodput_bps == pytest.approx(7.2e6, rel=0.01)
    assert moving.link_bps is None
    run(clock, moving, 0.5 * MEGABYTE, 1)
    assert moving.link_bps == pytest.approx(4e6, rel=0.01)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 2**40), st.integers(0, 2**40)), max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_reported_rates_are_finite_and_totals_never_fall(
    clock: Clock, reports: list[tuple[float, int, int]]
) -> None:
    moving, before = Flow("t", clock=clock), 0
    for waited_s, made, moved in reports:
        clock.now_s += waited_s
        moving.made(made)
        moving.moved(moved)
        assert moving.moved_bytes >= before
        before = moving.moved_bytes
        assert moving.rate_bps is None or 0 <= moving.rate_bps < 1e15


def test_three_chunks_under_way_keep_a_link_busy_and_what_was_before_them_does_not_count(clock: Clock) -> None:
    chunk = 16 * 1024
    moving = Flow("t", clock=clock, chunk_bytes=chunk)
    moving.made(chunk)
    run(clock, moving, chunk, 0.5, every_s=0.25)
    assert moving.goodput_bps is None
    for _ in range(10):
        clock.now_s += 0.1
        moving.made(moving.moved_bytes + 4 * chunk)
        moving.moved(moving.moved_bytes + chunk)
    assert moving.goodput_bps == pytest.approx(8 * chunk / 0.1, rel=0.01)
    moving.moved(moving.moved_bytes + chunk)
    assert moving.goodput_bps is None
