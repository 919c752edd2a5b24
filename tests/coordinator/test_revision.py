"""New shares for what is still on its way: as fast as a solver finds, and told to those whom they concern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_config.messages import LinkQuality, PaceOrder, SendProgress
from coordinator.fleet import Fleet
from coordinator.revision import LARGEST_RATE_BPS, LEAST_RATE_BPS, Moving, new_shares, relocated, revise
from coordinator.round import Round
from coordinator.settings import ChannelSettings, CoordinatorSettings, PlanningSettings
from tests.coordinator.builders import fleet_of, telemetry
from tests.coordinator.test_round import OTHER, PLAN, round_of

SETTINGS = CoordinatorSettings(planning=PlanningSettings())
CELL = CoordinatorSettings(channels=(ChannelSettings(name="cell", members=("pi-1", "pi-2", "jetson-1")),))
FAST = LinkQuality(round_trip_s=0.02, uplink_bps=2e7, downlink_bps=2e7)
LONG = replace(PLAN, planned_bytes=50_000_000, link_bps=2e7, share_bps=1e7)
ALSO = replace(OTHER, planned_bytes=50_000_000, link_bps=2e7, share_bps=1e7)
"""Two transfers of 40 s that share the receiver's downlink."""


def moving(transfer: str, **changes: object) -> Moving:
    base = Moving(
        transfer=transfer,
        sender=transfer,
        share_bps=1e7,
        left_bits=1e8,
        tail_s=0.1,
        hops=((f"{transfer}/up", 2e7), ("down", 2e7)),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def site(round_: Round, rates: Mapping[str, float | None], sequence: int, *, told: bool = True) -> Fleet:
    """What is known while transfers move at these rates; told: as their senders say, not by their links' rates."""
    transfers = {link.sender: transfer for transfer, link in round_.running()}
    reports = [telemetry("jetson-1", sequence=sequence, link=FAST)]
    for agent, rate_bps in rates.items():
        report = telemetry(agent, sequence=sequence, link=FAST)
        if told:
            progress = SendProgress(transfer=transfers[agent], moved_bytes=1_000_000 * sequence, goodput_bps=rate_bps)
            report = msgspec.structs.replace(report, sending=(progress,))
        else:
            report = telemetry(agent, sequence=sequence, link=msgspec.structs.replace(FAST, uplink_bps=rate_bps))
        reports.append(report)
    return fleet_of(*reports)


def played(
    round_: Round,
    story: Sequence[Mapping[str, float | None]],
    *,
    told: bool = True,
    settings: CoordinatorSettings = SETTINGS,
) -> list[tuple[int, str, PaceOrder]]:
    """The orders that come of a second after another, each with the second."""
    found = []
    for second, rates in enumerate(story):
        fleet = site(round_, rates, second, told=told)
        for agent in ("pi-1", "pi-2", "jetson-1"):
            report = fleet.agents[agent].telemetry
            assert report is not None
            orders = revise(report, [round_], fleet=fleet, settings=settings, now_s=100.0 + second)
            found += [(second, to, order) for to, order in orders]
    return found


def both(**changes: object) -> Round:
    round_ = round_of(LONG, ALSO, **changes)
    round_.drift.predicted_s = 60.0
    return round_


def test_a_sender_that_falls_behind_leaves_its_share_to_the_other() -> None:
    round_ = both()
    orders = played(round_, [{"pi-1": 1e7, "pi-2": 1e7}] * 3 + [{"pi-1": 3e6, "pi-2": 1e7}] * 2)
    assert [(second, agent) for second, agent, _ in orders] == [(4, "pi-1"), (4, "pi-2")]
    assert orders[0][2].rate_bps == pytest.approx(3e6, rel=0.1)
    assert orders[1][2].rate_bps == pytest.approx(1.7e7, rel=0.1)
    assert {order.transfer for _, _, order in orders} == set(round_.transfers)
    links = round_.report("planned").links
    assert links[0].note == f"share revised to {links[0].share_bps / 1e6:.1f} Mbit/s"
    assert links[1].share_bps == orders[1][2].rate_bps
    assert round_.report("planned").revisions == 1


@pytest.mark.parametrize("told", [True, False])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_a_fifth_of_noise_moves_no_share(told: bool, seed: int) -> None:
    dice, alone_bps = np.random.default_rng(seed), 1e7 if told else 2e7
    story: list[dict[str, float | None]] = [
        {agent: alone_bps * dice.uniform(0.8, 1.2) for agent in ("pi-1", "pi-2")} for _ in range(40)
    ]
    assert played(both(), story, told=told) == []


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_a_link_that_is_measured_three_times_slower_is_answered_once_and_so_is_its_recovery(seed: int) -> None:
    """With a tenth of noise."""
    dice = np.random.default_rng(seed)
    story: list[dict[str, float | None]] = [
        {"pi-1": (20e6 / 3 if 5 <= second < 20 else 2e7) * dice.uniform(0.9, 1.1), "pi-2": 2e7 * dice.uniform(0.9, 1.1)}
        for second in range(40)
    ]
    round_ = both()
    orders = played(round_, story, told=False)
    assert {second for second, _, _ in orders} == {6, 21}
    rates = {second: order.rate_bps or 0.0 for second, agent, order in orders if agent == "pi-1"}
    assert rates[6] < 20e6 / 3 * 1.1
    assert rates[21] > 9e6


def test_when_all_on_a_channel_are_slow_the_channel_is_and_shares_stay_as_they_were() -> None:
    slow: dict[str, float | None] = {"pi-1": 3.3e6, "pi-2": 3.3e6}
    orders = played(both(), [{"pi-1": 1e7, "pi-2": 1e7}] * 2 + [slow] * 2)
    assert [order.rate_bps for _, _, order in orders] == [pytest.approx(3.3e6, rel=0.05)] * 2
    assert played(both(), [{"pi-1": 1e7, "pi-2": 1e7}] * 2 + [slow] * 2, settings=CELL) != []


def test_who_has_only_one_transfer_left_or_is_not_paced_is_left_alone() -> None:
    slow: dict[str, float | None] = {"pi-1": 1e6, "pi-2": 1e6}
    assert played(both(), [slow] * 2) != []
    alone = round_of(LONG)
    alone.drift.predicted_s = 60.0
    fleet = site(alone, {"pi-1": 1e6}, 0)
    report = fleet.agents["pi-1"].telemetry
    assert report is not None
    for second in range(4):
        assert revise(report, [alone], fleet=fleet, settings=SETTINGS, now_s=100.0 + second) == []
    unmeasured = round_of(replace(LONG, share_bps=0.0), replace(ALSO, share_bps=0.0))
    assert played(unmeasured, [slow] * 4) == []


def test_what_its_sender_says_of_a_transfer_outweighs_the_rate_of_its_link() -> None:
    """Its link is as fast as ever, for all that the probes before the transfer tell."""
    orders = played(both(), [{"pi-1": 1e7, "pi-2": 1e7}] + [{"pi-1": 3e6, "pi-2": None}] * 4)
    assert {second for second, _, _ in orders} == {2}


def test_what_is_said_twice_is_said_once() -> None:
    """Reports may come more often than chunks."""
    round_ = both()
    assert played(round_, [{"pi-1": 1e7, "pi-2": 1e7}]) == []
    fleet = site(round_, {"pi-1": 3e6, "pi-2": 1e7}, 1)
    report = fleet.agents["pi-1"].telemetry
    assert report is not None
    for second in range(1, 6):
        assert revise(report, [round_], fleet=fleet, settings=SETTINGS, now_s=100.0 + second) == []


def test_a_report_of_another_agent_or_of_no_transfer_says_nothing() -> None:
    fleet = fleet_of(telemetry("pi-3", link=FAST), telemetry("pi-1"), telemetry("pi-2"), telemetry("jetson-1"))
    report = fleet.agents["pi-3"].telemetry
    assert report is not None
    assert revise(report, [both()], fleet=fleet, settings=SETTINGS, now_s=101.0) == []
    assert revise(report, [], fleet=fleet, settings=SETTINGS, now_s=101.0) == []


POSITIVE = st.floats(1e3, 1e9)


@given(
    st.lists(st.tuples(st.floats(1e3, 1e10), POSITIVE, POSITIVE, st.floats(0, 5)), min_size=1, max_size=5),
    st.floats(0.0, 1.0),
)
def test_shares_keep_every_channel_fill_the_tightest_and_end_as_early_as_a_fine_search_finds(
    each: list[tuple[float, float, float, float]], free: float
) -> None:
    jobs = [
        moving(f"t{index}", left_bits=bits, tail_s=tail_s, hops=((f"t{index}/up", up), ("down", down)))
        for index, (bits, up, down, tail_s) in enumerate(each)
    ]
    room = max(0.05, free)
    shares = new_shares(jobs, {"down": free})
    down = sum(rate / job.hops[1][1] for rate, job in zip(shares, jobs, strict=True))
    ups = [rate / job.hops[0][1] for rate, job in zip(shares, jobs, strict=True)]
    floor = sum(LEAST_RATE_BPS / job.hops[1][1] for job in jobs)
    assert down <= room * (1 + 1e-6) + floor
    assert max(ups) <= 1 + 1e-6 + LEAST_RATE_BPS / min(job.hops[0][1] for job in jobs)
    assert down >= room * 0.999 or min(ups) >= 0.999
    ends_s = max(job.tail_s + job.left_bits / rate for rate, job in zip(shares, jobs, strict=True))

    def fits(within_s: float) -> bool:
        rates = [job.left_bits / (within_s - job.tail_s) for job in jobs]
        used = sum(rate / job.hops[1][1] for rate, job in zip(rates, jobs, strict=True))
        return used <= room and all(rate <= job.hops[0][1] for rate, job in zip(rates, jobs, strict=True))

    latest_s = max(job.tail_s for job in jobs)
    assert not fits(latest_s + (ends_s - latest_s) * 0.999 - 1e-6 * ends_s) or ends_s - latest_s < 1e-3


ABSURD = st.sampled_from([1e-300, 1e-9, 1.0, 1e9, 1e15])


@given(st.lists(st.tuples(ABSURD, ABSURD, ABSURD, st.none() | ABSURD | st.just(0.0)), min_size=1, max_size=4))
def test_absurd_figures_give_rates_that_can_be_ordered(
    each: list[tuple[float, float, float, float | None]],
) -> None:
    jobs = [
        moving(f"t{index}", left_bits=bits, share_bps=share, hops=(("a", max(bps, 1e3)), ("b", 1e15)), goodput_bps=seen)
        for index, (bits, share, bps, seen) in enumerate(each)
    ]
    for rate in new_shares(relocated(jobs, {"a": 0.0}), {"a": 0.0}):
        assert LEAST_RATE_BPS <= rate <= LARGEST_RATE_BPS


def test_a_transfer_that_reports_late_is_taken_to_be_where_the_plan_has_it() -> None:
    round_ = both()
    orders = played(round_, [{"pi-1": 2e7, "pi-2": 2e7}] * 2 + [{"pi-1": 6e6, "pi-2": 2e7}] * 2, told=False)
    assert [agent for _, agent, _ in orders] == ["pi-1", "pi-2"]
    rates = [order.rate_bps or 0.0 for _, _, order in orders]
    assert rates[0] <= 6e6 * (1 + 1e-6)
    assert sum(rates) == pytest.approx(2e7, rel=1e-6)
