"""What a fleet may report at its worst: planned around or refused by name, never a plan that can't be carried out."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.errors import MessageRejected
from broker_config.messages import LinkQuality, ModelInfo, Rung, Speed
from broker_config.topics import TELEMETRY
from broker_config.wire import unpack
from coordinator.errors import CoordinatorError
from coordinator.fleet import Channel
from coordinator.latency import Scenario
from coordinator.policy import POLICIES, Plan, PlanRequest, build_scenario
from coordinator.table import Table
from tests.coordinator.builders import (
    CAPS,
    LADDER,
    MODEL,
    SPEED,
    context,
    fleet_of,
    instance,
    make_link,
    scenario_of,
    telemetry,
)
from tests.coordinator.wild import wild_scenario

CELL = (Channel(name="cell", members=("pi-1", "pi-2", "pi-9")),)


def check(scenario: Scenario, plan: Plan) -> None:
    """A plan that agents can carry out, in numbers that the wire accepts."""
    links = sorted(scenario.links, key=lambda link: link.request)
    table = Table(replace(scenario, links=tuple(links)))
    rates = np.array([planned.share_bps for planned in plan.links])
    assert math.isfinite(plan.predicted_e2e_s)
    assert np.isfinite(rates).all()
    assert np.all((rates > 0) == table.measured)
    assert np.all(table.used(rates) <= table.free * (1 + 1e-9))
    for link, planned in zip(links, plan.links, strict=True):
        assert 0 <= planned.own_tokens <= link.tokens
        if planned.medium == "tokens":
            assert planned.own_tokens == link.tokens
        else:
            assert link.may_cache
            assert planned.rung in {rung.name for rung in link.rungs}
        report = planned.report()
        assert msgspec.convert(msgspec.to_builtins(report), type(report)) == report
    if plan.bound_s is not None:
        assert 0 <= plan.bound_s <= plan.predicted_e2e_s * (1 + 1e-9)


def check_all(scenario: Scenario) -> dict[str, Plan]:
    plans = {name: policy.plan(scenario) for name, policy in POLICIES.items()}
    for plan in plans.values():
        check(scenario, plan)
    return plans


def scenario_from(
    *, link: LinkQuality | None = None, speed: Speed | None = SPEED, model: ModelInfo = MODEL, **asked: Any
) -> Scenario:
    """Two senders, of which the first reports that link and speed and runs that model, and a receiver."""
    reports = (
        telemetry("pi-1", 1, link=link, speed=speed, contexts=[context("report")]),
        telemetry("pi-2", 2, contexts=[context("notes", 300)]),
        telemetry("pi-9", 9),
    )
    fields: dict[str, Any] = {"quality_floor": 0.02, "question_tokens": 20} | asked
    request = PlanRequest(request=instance(77), sources=("pi-1", "pi-2"), receiver="pi-9", **fields)
    return build_scenario(fleet_of(*reports, models={"pi-1": model}), [request], CELL, caps=CAPS, tie_fraction=0.1)


@pytest.mark.parametrize("up_bps", [None, 0.0, 5e-324, 1e-3, 999.0])
def test_a_link_of_no_or_unknown_rate_goes_as_text_unpaced_and_says_so(up_bps: float | None) -> None:
    for plan in check_all(scenario_from(link=LinkQuality(round_trip_s=0.02, uplink_bps=up_bps))).values():
        assert (plan.links[0].medium, plan.links[0].share_bps) == ("tokens", 0.0)
        assert plan.links[0].note == "link not measured yet: sent as text"
        assert not plan.known


@pytest.mark.parametrize("rate_bps", [1e3, 1e6, 1e9, 1e15])
def test_rates_from_the_least_to_plan_with_to_the_most_that_messages_hold_are_planned(rate_bps: float) -> None:
    link = LinkQuality(round_trip_s=0.02, uplink_bps=rate_bps, downlink_bps=rate_bps)
    check_all(scenario_from(link=link))


NEEDED = ("prefill_tps", "encode_elements_per_s", "decode_elements_per_s")


@pytest.mark.parametrize("speed", [None, *(msgspec.structs.replace(SPEED, **{field: 0.0}) for field in NEEDED)])
def test_an_agent_without_measured_speed_sends_text_and_it_is_said_why(speed: Speed | None) -> None:
    for plan in check_all(scenario_from(speed=speed)).values():
        assert plan.links[0].medium == "tokens"
        assert plan.links[0].note == "speed of pi-1 not measured yet: sent as text"


@pytest.mark.parametrize("factor", [1e-2, 1e15])
def test_speeds_of_any_size_are_planned(factor: float) -> None:
    fields = ("prefill_tps", "decode_tps", "encode_elements_per_s", "decode_elements_per_s")
    check_all(scenario_from(speed=msgspec.structs.replace(SPEED, **dict.fromkeys(fields, factor))))


def test_an_empty_ladder_is_refused_by_the_message_and_an_empty_choice_goes_as_text() -> None:
    with pytest.raises(msgspec.ValidationError, match="length >= 1"):
        msgspec.convert(msgspec.to_builtins(msgspec.structs.replace(MODEL, ladder=())), ModelInfo)
    for plan in check_all(scenario_of([make_link(rungs=()), make_link(sender="pi-2", rungs=())])).values():
        assert [link.medium for link in plan.links] == ["tokens", "tokens"]


def test_a_floor_and_a_deadline_that_exclude_each_other_give_the_lateness_not_a_worse_rung() -> None:
    for plan in check_all(scenario_from(quality_floor=1e-6, deadline_s=0.01)).values():
        request = plan.requests[0]
        assert not request.meets_deadline
        assert request.late_s == pytest.approx(request.predicted_e2e_s - 0.01)
        assert all(link.kl <= 1e-6 for link in request.links)


def test_a_floor_that_no_rung_keeps_goes_as_text_and_says_so() -> None:
    lossy = msgspec.structs.replace(MODEL, ladder=LADDER[2:])
    for plan in check_all(scenario_from(model=lossy, quality_floor=1e-6)).values():
        assert plan.links[0].note == "no rung keeps KL 1e-06: sent as text"


def _raw(path: tuple[str, ...], number: float) -> bytes:
    """Telemetry as a hostile or broken agent could pack it."""
    message = msgspec.to_builtins(telemetry("pi-1"))
    at = message
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = number
    return msgspec.msgpack.encode(message)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -1.0, 1e16])
@pytest.mark.parametrize(
    "path",
    [
        ("link", "uplink_bps"),
        ("link", "downlink_bps"),
        ("speed", "prefill_tps"),
        ("speed", "encode_elements_per_s"),
        ("speed", "prefill_fixed_s"),
        ("memory", "pressure"),
        ("link", "round_trip_s"),
    ],
)
def test_telemetry_that_is_no_number_or_beyond_all_bounds_never_gets_in(path: tuple[str, ...], number: float) -> None:
    with pytest.raises(MessageRejected):
        unpack(TELEMETRY, _raw(path, number))


def test_the_same_telemetry_with_good_numbers_gets_in() -> None:
    assert unpack(TELEMETRY, _raw(("link", "uplink_bps"), 1e15)).link.uplink_bps == 1e15


@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("slice_tokens", [None, 1, 32])
def test_contexts_of_hardly_a_token_are_planned(tokens: int, slice_tokens: int | None) -> None:
    links = [make_link(tokens=tokens), make_link(sender="pi-2", tokens=tokens, cached=False, generated=True)]
    for plan in check_all(scenario_of(links, slice_tokens=slice_tokens)).values():
        assert tokens > 0 or all(link.medium == "tokens" for link in plan.links)


def test_hundreds_of_rungs_are_climbed_as_a_few_are() -> None:
    many = tuple(
        Rung(name=f"int{place}", bits_per_element=2 + place / 20, kl=0.02 * (1 - place / 500), agreement=1.0)
        for place in range(400)
    )
    links = [make_link(sender=f"pi-{index}", rungs=many, link_bps=1e8, channels=(("cell", 1e8),)) for index in range(6)]
    few = [replace(link, rungs=many[:1]) for link in links]
    plans = check_all(scenario_of(links, tie_fraction=0.1))
    fewer = check_all(scenario_of(few, tie_fraction=0.1))
    for name, plan in plans.items():
        assert plan.predicted_e2e_s <= fewer[name].predicted_e2e_s * 1.1 * (1 + 1e-9)


def test_ladders_longer_than_messages_allow_are_refused() -> None:
    ladder = msgspec.to_builtins(MODEL)
    ladder["ladder"] = [*ladder["ladder"]] * 20
    with pytest.raises(msgspec.ValidationError, match="length <= 64"):
        msgspec.convert(ladder, ModelInfo)


def test_all_airtime_taken_is_planned_as_if_a_little_were_free() -> None:
    fleet = fleet_of(telemetry("pi-1", 1, contexts=[context("report")]), telemetry("pi-9", 9))
    request = PlanRequest(request=instance(7), sources=("pi-1",), receiver="pi-9", question_tokens=5)
    for free in (0.0, -1.0, 1e-300, 5.0):
        scenario = build_scenario(fleet, [request], CELL, {"cell": free}, caps=CAPS)
        assert 0.05 <= scenario.airtime_free["cell"] <= 1.0
        check_all(scenario)


@given(
    st.one_of(st.none(), st.floats(0, 1e15)),
    st.one_of(st.none(), st.floats(0, 1e15)),
    st.integers(0, 3_000),
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.one_of(st.none(), st.floats(1e-9, 1e9))),
)
def test_whatever_messages_let_in_is_planned_or_refused_by_name(
    up_bps: float | None, down_bps: float | None, tokens: int, asked: tuple[float, float, float | None]
) -> None:
    pressure, floor, deadline_s = asked
    fleet = fleet_of(
        telemetry(
            "pi-1",
            1,
            pressure=pressure,
            link=LinkQuality(uplink_bps=up_bps, downlink_bps=down_bps),
            contexts=[context("report", tokens)],
        ),
        telemetry("pi-9", 9, link=LinkQuality(uplink_bps=down_bps, downlink_bps=down_bps)),
    )
    request = PlanRequest(
        request=instance(7),
        sources=("pi-1",),
        receiver="pi-9",
        question_tokens=5,
        deadline_s=deadline_s,
        quality_floor=floor,
    )
    with contextlib.suppress(CoordinatorError):
        check_all(build_scenario(fleet, [request], CELL, caps=CAPS))


@pytest.mark.parametrize("seed", range(120))
def test_every_policy_s_plan_of_a_wild_scenario_can_be_carried_out(seed: int) -> None:
    check_all(wild_scenario(10_000 + seed))
