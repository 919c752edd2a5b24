"""Rungs, floors, pressure, deadlines, and the plan as a report."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.messages import LinkReport, Rung
from coordinator.errors import PolicyUnknown, RequestImpossible
from coordinator.latency import Scenario
from coordinator.policy import POLICIES, PressureCaps, get_policy
from coordinator.policy.optimum import OptimumPolicy, optimum
from coordinator.policy.raising import SLIGHTLY, raise_rungs
from coordinator.policy.rungs import allowed_rungs, named_rung, why_no_rung
from coordinator.policy.shares import Shares
from scripts.policies.scenarios import Network, random_round
from tests.coordinator.builders import CAPS, LADDER, make_link, random_scenario, scenario_of
from tests.coordinator.wild import wild_scenario


def with_deadline(scenario: Scenario, deadline_s: float) -> Scenario:
    return replace(scenario, requests=tuple(replace(terms, deadline_s=deadline_s) for terms in scenario.requests))


def test_every_policy_is_found_by_its_name() -> None:
    assert {name: get_policy(name).name for name in POLICIES} == {
        each: each for each in ("optimum", "jmsra", "token", "kv")
    }


def test_an_unknown_policy_is_refused_with_the_names_of_those_there_are() -> None:
    with pytest.raises(PolicyUnknown, match="choose one of jmsra, kv, optimum, token"):
        get_policy("best")


@pytest.mark.parametrize(
    ("pressure", "names"),
    [
        (0.0, ["int4", "int6", "int8", "fp16", "lossless"]),
        (0.69, ["int4", "int6", "int8", "fp16", "lossless"]),
        (0.70, ["int4", "int6", "int8"]),
        (0.80, ["int4", "int6"]),
        (0.90, ["int4"]),
        (1.0, ["int4"]),
    ],
)
def test_memory_pressure_caps_the_bits_per_element(pressure: float, names: list[str]) -> None:
    assert [rung.name for rung in allowed_rungs(LADDER, 0.02, pressure, CAPS)] == names


@given(st.floats(0, 0.2), st.floats(0, 1))
def test_every_allowed_rung_keeps_floor_and_cap_and_more_bits_always_lose_less(floor: float, pressure: float) -> None:
    allowed = allowed_rungs(LADDER, floor, pressure, CAPS)
    assert all(rung.kl <= floor and rung.bits_per_element <= CAPS.at_most(pressure) for rung in allowed)
    for low, high in pairwise(allowed):
        assert low.bits_per_element < high.bits_per_element
        assert low.kl > high.kl


def test_a_rung_that_costs_more_and_keeps_less_is_never_used() -> None:
    worse = msgspec.structs.replace(LADDER[2], name="worse", bits_per_element=9.0, kl=0.002)
    assert "worse" not in [rung.name for rung in allowed_rungs((*LADDER, worse), 0.02, 0.0, CAPS)]


def test_the_note_says_why_no_rung_is_left() -> None:
    assert allowed_rungs(LADDER, 0.002, 0.93, CAPS) == ()
    assert why_no_rung(0.02, 0.93, CAPS) == "no rung keeps KL 0.02 under memory pressure 0.93: sent as text"
    assert why_no_rung(0.02, 0.5, CAPS) == "no rung keeps KL 0.02: sent as text"


def test_other_caps_may_be_configured() -> None:
    caps = PressureCaps(((0.5, 4.5),))
    assert [rung.name for rung in allowed_rungs(LADDER, 0.02, 0.6, caps)] == ["int4"]


@given(st.sampled_from(LADDER), st.floats(0, 1))
def test_a_named_rung_is_the_only_one_whatever_its_loss_unless_it_is_above_the_cap(rung: Rung, pressure: float) -> None:
    fits = rung.bits_per_element <= CAPS.at_most(pressure)
    assert named_rung(LADDER, rung.name, pressure, CAPS) == ((rung,) if fits else ())


@given(st.text(alphabet="int68-", min_size=1), st.floats(0, 1))
def test_a_rung_that_the_ladder_lacks_is_refused_with_the_names_of_those_it_has(name: str, pressure: float) -> None:
    if name in {rung.name for rung in LADDER}:
        return
    with pytest.raises(RequestImpossible) as raised:
        named_rung(LADDER, name, pressure, CAPS)
    assert str(raised.value).endswith(f"has no rung {name}; it has lossless, fp16, int8, int6, int4, int3")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("seed", range(12))
def test_raising_rungs_stays_within_the_tie_fraction_and_never_lowers_quality(policy: str, seed: int) -> None:
    scenario = random_scenario(seed, links=1 + seed % 6, receivers=1 + seed % 2)
    shares = Shares(scenario)
    stage_1 = POLICIES[policy].choose(shares)  # type: ignore[attr-defined]
    plan = POLICIES[policy].plan(scenario)
    assert plan.predicted_e2e_s <= stage_1.prediction.e2e_s * (1 + scenario.tie_fraction) + 1e-9
    for link, planned in zip(sorted(scenario.links, key=lambda link: link.request), plan.links, strict=True):
        if planned.medium != "tokens":
            assert planned.kl <= link.rungs[0].kl
            assert planned.rung in {rung.name for rung in link.rungs}
        else:
            assert (planned.kl, planned.rung) == (0.0, "lossless")


def test_a_single_cache_link_climbs_as_high_as_the_tie_fraction_lets_it() -> None:
    scenario = scenario_of([make_link()])
    names = {
        tie: POLICIES["kv"].plan(replace(scenario, tie_fraction=tie)).links[0].rung for tie in (0.0, 0.1, 1.0, 3.0)
    }
    assert names == {0.0: "int8", 0.1: "int8", 1.0: "fp16", 3.0: "lossless"}


def test_a_deadline_is_used_for_quality_and_kept() -> None:
    scenario = scenario_of([make_link()])
    early, late = (POLICIES["kv"].plan(with_deadline(scenario, limit_s)) for limit_s in (4.5, 60.0))
    assert early.links[0].rung == "fp16"
    assert late.links[0].rung == "lossless"
    assert early.predicted_e2e_s <= 4.5
    assert early.requests[0].meets_deadline
    assert early.requests[0].late_s == 0


def test_a_deadline_that_is_missed_says_by_how_much_and_nothing_is_made_slower() -> None:
    scenario = scenario_of([make_link()])
    fastest = POLICIES["kv"].plan(replace(scenario, tie_fraction=0.0))
    plan = POLICIES["kv"].plan(with_deadline(scenario, 0.5))
    assert plan.predicted_e2e_s == fastest.predicted_e2e_s
    assert not plan.requests[0].meets_deadline
    assert plan.requests[0].late_s == pytest.approx(plan.predicted_e2e_s - 0.5)


def test_the_lossiest_link_climbs_first() -> None:
    links = [make_link(rungs=LADDER[2::-1]), make_link(sender="pi-2", context_id="2" * 32, rungs=LADDER[4::-1])]
    plan = POLICIES["kv"].plan(scenario_of(links, tie_fraction=0.4))
    assert [link.rung for link in plan.links] == ["int8", "int8"]


@pytest.mark.parametrize("deadline_s", [None, 60.0])
def test_a_link_with_one_rung_stays_on_it_beside_one_that_climbs(deadline_s: float | None) -> None:
    links = [make_link(rungs=(LADDER[5],)), make_link(sender="pi-2", context_id="2" * 32, rungs=LADDER[4::-1])]
    scenario = scenario_of(links, tie_fraction=20.0)
    plan = POLICIES["kv"].plan(with_deadline(scenario, deadline_s) if deadline_s else scenario)
    assert [(link.medium, link.rung, link.kl) for link in plan.links] == [
        ("cache", "int3", 0.09),
        ("cache", "lossless", 0.0),
    ]


def test_kv_sends_text_only_where_no_rung_is_left() -> None:
    links = [make_link(), make_link(sender="pi-2", rungs=(), note="no rung keeps KL 0.02: sent as text")]
    plan = POLICIES["kv"].plan(scenario_of(links))
    assert [(link.medium, link.note) for link in plan.links] == [
        ("cache", ""),
        ("tokens", "no rung keeps KL 0.02: sent as text"),
    ]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_plan_converts_into_reports_that_the_wire_accepts(policy: str) -> None:
    plan = POLICIES[policy].plan(random_scenario(4, links=5, receivers=2))
    for link in plan.links:
        report = link.report()
        assert msgspec.convert(msgspec.to_builtins(report), LinkReport) == report
        assert (report.own_tokens == report.tokens) is (report.medium == "tokens")
        assert (report.own_tokens == 0) is (report.medium == "cache")
        assert report.text_bytes + 600 == report.planned_bytes or report.medium != "tokens"
        assert 0 < report.share_bps <= report.link_bps * (1 + 1e-9)


def test_planned_bytes_are_the_bits_of_the_model() -> None:
    plan = POLICIES["kv"].plan(scenario_of([make_link(rungs=(LADDER[2],))]))
    link = plan.links[0]
    assert link.planned_bytes == 600 + 2 * 400 + 400 * 11_520 * 8.5 / 8
    assert link.fp16_bytes == 400 * 23_040


def test_nothing_asked_is_an_empty_plan() -> None:
    plan = POLICIES["jmsra"].plan(Scenario(requests=(), links=()))
    assert plan.links == ()
    assert plan.predicted_e2e_s == 0


def test_requests_planned_together_share_the_channels() -> None:
    one = make_link(receiver="rx-1", channels=(("cell", 2e7),))
    two = make_link(sender="pi-2", receiver="rx-2", channels=(("cell", 2e7),))
    alone = POLICIES["kv"].plan(scenario_of([one]))
    both = POLICIES["kv"].plan(scenario_of([one, two]))
    assert both.predicted_e2e_s > 1.5 * alone.predicted_e2e_s
    assert sum(link.share_bps for link in both.links) == pytest.approx(2e7)
    assert len(both.requests) == 2


def test_rungs_of_many_links_climb_as_far_as_there_are_rates_for_them() -> None:
    """What one link takes more, others of its receiver pay for: the last steps may be too much, the first are not."""
    scenario = replace(random_scenario(1, links=200, receivers=20), slice_tokens=64, tie_fraction=0.03)
    shares = Shares(scenario)
    chosen = optimum(shares)
    raised = raise_rungs(shares, chosen)
    assert np.any(raised.rungs > chosen.rungs)
    assert np.all(shares.table.used(raised.course.rates[:, 0]) <= shares.table.free * (1 + 1e-9))


@pytest.mark.parametrize("seed", range(8))
def test_a_receiver_whose_rungs_cannot_climb_holds_no_other_back(seed: int) -> None:
    """Receivers that share nothing climb as each would by itself in a round that takes as long."""
    scenario = replace(random_round(seed, Network.OWN, 60), tie_fraction=0.03)
    shares = Shares(scenario)
    base = shares.allocate(np.zeros(60))
    raised = raise_rungs(shares, base)
    assert np.any(raised.rungs > 0)
    limit_s = base.e2e_s * (1 + scenario.tie_fraction)
    assert np.all(raised.found.request_e2e_s <= limit_s * (1 + SLIGHTLY))
    for request, terms in enumerate(scenario.requests):
        mine = [index for index, link in enumerate(scenario.links) if link.request == request]
        links = tuple(replace(scenario.links[index], request=0) for index in mine)
        alone = Shares(replace(scenario, links=links, requests=(terms,)))
        by_itself = raise_rungs(alone, alone.allocate(np.zeros(len(mine))), base.e2e_s)
        assert raised.rungs[mine].tolist() == by_itself.rungs.tolist()


def test_what_is_kept_of_the_time_left_does_not_keep_rungs_from_climbing() -> None:
    """Several requests at one receiver need all of it: their limits are the receiver's, what is left their own."""
    shares = Shares(replace(wild_scenario(3, complete=True), tie_fraction=0.0))
    chosen = OptimumPolicy().choose(shares)
    assert np.any(raise_rungs(shares, chosen).rungs > chosen.rungs)


def test_one_slow_sender_leaves_the_order_of_all_others_alone() -> None:
    """A link that can't be used by T would cost a billion times what others do: their order must not be lost by it."""
    scenario = random_round(1, Network.CELL, 300)
    speed = scenario.links[0].sender_speed
    assert speed is not None
    slow = msgspec.structs.replace(speed, prefill_tps=1.0)
    links = (replace(scenario.links[0], cached=False, sender_speed=slow), *scenario.links[1:])
    spoilt = optimum(Shares(replace(scenario, links=links)))
    assert spoilt.within_s <= 25.3  # with their order lost: 25.73
