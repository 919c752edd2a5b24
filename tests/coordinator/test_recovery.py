"""What was found slow gets its share back once it is as fast as before, and does others no harm while it is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_config.messages import RateStep, SendProgress
from coordinator.probing import LONGEST_WAIT_S, PROBING, WAIT_S, Hops, Probing
from coordinator.revision import revise
from coordinator.round import Round
from tests.coordinator.builders import fleet_of, telemetry
from tests.coordinator.site import sent
from tests.coordinator.test_revision import ALSO, CELL, FAST, LONG, SETTINGS
from tests.coordinator.test_round import round_of

DOWN_BPS = 2e7
Truth = Callable[[str, int], float]
"""What an agent's link carries in a second, in bits."""


@dataclass
class Course:
    """What became of a round: shares by agent and second (0: paced no more), and when orders were given."""

    shares: list[dict[str, float]] = field(default_factory=list)
    ordered_s: dict[str, list[int]] = field(default_factory=dict)


def lived(
    round_: Round,
    truth: Truth,
    seconds: int,
    *,
    noise: float = 0.0,
    seed: int = 0,
    down: Callable[[int], float] = lambda _: DOWN_BPS,
    cell: bool = False,
    ends: Mapping[str, int] = MappingProxyType({}),
    unpaced: Collection[str] = (),
) -> Course:
    """Every second each transfer moves at its share, as far as links carry it, and its sender says so.

    ends: in which second an agent's transfer has arrived. unpaced: those that move as their links do.
    """
    dice, course, moved = np.random.default_rng(seed), Course(), dict.fromkeys(round_.transfers, 0.0)
    paces = {transfer: link.share_bps for transfer, link in round_.running()}
    sends = dict(round_.send_orders(60.0))
    for second in range(seconds):
        for agent in (agent for agent, end in ends.items() if end == second):
            round_.take_send(sent(sends[agent], agent))
        running = dict(round_.running())
        reached = {}
        for transfer, link in running.items():
            free = paces[transfer] == 0 or link.sender in unpaced
            reached[transfer] = min(math.inf if free else paces[transfer], truth(link.sender, second))
        crowded = max(1.0, sum(reached.values()) / down(second))
        reports = [telemetry("jetson-1", sequence=second, link=FAST)]
        for transfer, link in running.items():
            seen_bps = reached[transfer] / crowded * dice.uniform(1 - noise, 1 + noise)
            moved[transfer] += seen_bps / 8
            progress = SendProgress(transfer=transfer, moved_bytes=int(moved[transfer]), goodput_bps=seen_bps)
            known = telemetry(link.sender, sequence=second, link=FAST)
            reports.append(msgspec.structs.replace(known, sending=(progress,)))
        fleet, site = fleet_of(*reports), CELL if cell else SETTINGS
        for report in reports:
            for agent, order in revise(report, [round_], fleet=fleet, settings=site, now_s=100.0 + second):
                paces[order.transfer] = order.rate_bps or 0.0
                course.ordered_s.setdefault(agent, []).append(second)
        course.shares.append({link.sender: paces[transfer] for transfer, link in running.items()})
    return course


def long(**changes: Any) -> Round:
    """Two transfers of 800 s, each with half of the receiver's downlink."""
    round_ = round_of(*(replace(link, planned_bytes=1_000_000_000, **changes) for link in (LONG, ALSO)))
    round_.drift.predicted_s = 900.0
    return round_


def dropped(low_bps: float, start: int, end: int, agents: Sequence[str] = ("pi-1",)) -> Truth:
    return lambda agent, second: low_bps if agent in agents and start <= second < end else DOWN_BPS


SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("low_bps", [5e6, 3e6, 1e6])
@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_a_link_that_drops_and_recovers_has_its_share_again_within_twenty_reports(low_bps: float, seed: int) -> None:
    course = lived(long(), dropped(low_bps, 5, 20), 45, noise=0.05, seed=seed)
    assert course.shares[8]["pi-1"] == pytest.approx(low_bps, rel=0.1)
    assert course.shares[8]["pi-2"] > 1.4e7
    assert course.shares[40]["pi-1"] > 0.9e7
    recovered = next(second for second, shares in enumerate(course.shares) if second > 20 and shares["pi-1"] > 9e6)
    assert recovered <= 40
    assert max(course.ordered_s["pi-1"]) <= 42


@given(seed=SEEDS, noise=st.sampled_from([0.0, 0.05, 0.1]))
@settings(max_examples=15, deadline=None)
def test_a_link_that_stays_slow_is_tried_ever_less_often_and_at_little_cost(seed: int, noise: float) -> None:
    course = lived(long(), dropped(3e6, 5, 1000), 200, noise=noise, seed=seed)
    shares = [each["pi-1"] for each in course.shares]
    rises = [second for second in range(7, 200) if shares[second] > 1.1 * shares[second - 1]]
    assert len(rises) <= 5 if not noise else 9
    assert rises[0] - 6 >= WAIT_S
    assert sum(share > 3.5e6 for share in shares[7:]) < 40
    assert np.mean([each["pi-2"] for each in course.shares[7:]]) > 0.97 * 1.7e7


@pytest.mark.parametrize("cell", [False, True])
@given(seed=SEEDS)
@settings(max_examples=5, deadline=None)
def test_a_channel_that_slows_all_and_recovers_gives_all_their_shares_again(cell: bool, seed: int) -> None:
    course = lived(
        long(), lambda *_: DOWN_BPS, 50, noise=0.05, seed=seed, cell=cell, down=lambda at: 6e6 if 5 <= at < 20 else 2e7
    )
    crossings = 2 if cell else 1  # up to the broker and down again
    assert sum(course.shares[9].values()) == pytest.approx(6e6 / crossings, rel=0.15)
    assert sum(course.shares[48].values()) == pytest.approx(2e7 / crossings, rel=0.1)


def test_of_two_slow_links_the_one_that_recovers_is_not_held_back_by_the_other() -> None:
    def truth(agent: str, second: int) -> float:
        return 3e6 if (agent == "pi-2" and second >= 12) or (agent == "pi-1" and 5 <= second < 25) else DOWN_BPS

    course = lived(long(), truth, 60)
    assert course.shares[24] == {"pi-1": pytest.approx(3e6, rel=0.3), "pi-2": pytest.approx(3e6, rel=0.3)}
    assert course.shares[58] == {"pi-1": pytest.approx(1.7e7, rel=0.1), "pi-2": pytest.approx(3e6, rel=0.3)}


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_whatever_links_do_no_channel_is_promised_more_than_it_is_taken_to_carry(seed: int) -> None:
    dice = np.random.default_rng(seed)
    walk = {agent: np.exp(np.cumsum(dice.normal(0, 0.4, 60))) * 1e7 for agent in ("pi-1", "pi-2")}
    course = lived(long(), lambda agent, second: float(walk[agent][second]), 60, noise=0.1, seed=seed)
    for shares in course.shares:
        assert sum(shares.values()) <= DOWN_BPS * 1.011


def test_the_last_of_a_revised_round_is_paced_no_more_and_of_another_round_goes_on_as_planned() -> None:
    revised = lived(long(), dropped(3e6, 5, 1000), 30, ends={"pi-2": 12})
    assert revised.shares[11]["pi-1"] < 4e6
    assert [shares["pi-1"] for shares in revised.shares[13:]] == [0.0] * 17
    planned = lived(long(), dropped(3e6, 50, 1000), 30, ends={"pi-2": 12})
    assert planned.ordered_s == {}


@pytest.mark.parametrize("lag_s", [0, 2])
def test_a_share_that_changes_as_planned_is_no_drift_and_what_falls_behind_it_then_is(lag_s: int) -> None:
    def truth(agent: str, second: int) -> float:
        if agent != "pi-1" or second < 10 + lag_s:
            return 5e6
        return 1.5e7 if second < 20 else 4e6

    steps = (RateStep(after_s=10.0, rate_bps=1.5e7),)
    round_ = round_of(replace(LONG, share_bps=5e6, later_rates=steps), replace(ALSO, share_bps=5e6))
    round_.drift.predicted_s = 60.0
    course = lived(round_, truth, 30, unpaced=("pi-1",))
    assert course.ordered_s["pi-1"][0] == 21


def test_a_link_that_collapses_late_is_answered_if_much_is_left() -> None:
    round_ = long()
    round_.drift.predicted_s = 20.0
    assert lived(round_, dropped(1e6, 19, 1000), 25).ordered_s["pi-1"][0] == 20


def measured(*bps: float) -> dict[str, Hops]:
    return {f"t{index}": ((f"up{index}", rate), ("down", rate)) for index, rate in enumerate(bps)}


def test_trials_of_a_channel_are_made_and_judged_together() -> None:
    probing, full = Probing(), measured(1e7, 2e7)
    slow = {name: tuple((at, bps / 4) for at, bps in hops) for name, hops in full.items()}
    probing.found(slow, 100.0)
    for _ in range(3):
        probing.heard("t0", 1.0)
    probing.heard("t1", 0.5)
    assert probing.due(full, 100.0 + WAIT_S) == {}
    for _ in range(3):
        probing.heard("t1", 1.0)
    assert probing.due(full, 99.0 + WAIT_S) == {}
    raised = probing.due(full, 100.0 + WAIT_S)
    assert raised == {name: tuple((at, PROBING * bps) for at, bps in hops) for name, hops in slow.items()}
    probing.begin(raised)
    for _ in range(4):
        assert not probing.settle(full, 105.0)
        probing.heard("t0", 1.0)
        probing.heard("t1", 0.8)
    assert probing.settle(full, 110.0)
    for name, ratio in (("t0", 1.0), ("t1", 0.8)):
        assert [bps for _, bps in probing.hops[name]] == pytest.approx([PROBING * ratio * bps for _, bps in slow[name]])


@given(
    st.lists(
        st.tuples(st.sampled_from(["found", "heard", "settle", "due"]), st.sampled_from([0.0, 1e-9, 0.8, 1.0, 1e9])),
        max_size=60,
    )
)
def test_whatever_is_heard_hops_stay_within_what_was_measured_and_trials_keep_their_distance(
    events: list[tuple[str, float]],
) -> None:
    probing, full, now_s = Probing(), measured(1e7, 2e7), 100.0
    for number, (what, value) in enumerate(events):
        now_s += 1.0
        name = f"t{number % 2}"
        if what == "found":
            probing.found({name: tuple((at, max(1e3, min(1.0, value) * bps)) for at, bps in full[name])}, now_s)
        elif what == "heard":
            probing.heard(name, value)
        elif what == "settle":
            probing.settle(full, now_s)
        elif raised := probing.due(full, now_s):
            probing.begin(raised)
            assert probing.due(full, now_s + LONGEST_WAIT_S) == {} or len(raised) < len(full)
        for transfer, hops in probing.hops.items():
            for (_, bps), (_, most) in zip(hops, full[transfer], strict=True):
                assert 0 <= bps <= most
