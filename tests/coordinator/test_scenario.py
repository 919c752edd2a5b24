"""From a fleet to a scenario: what is refused, what is noted, and that no order matters that should not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_config.messages import Ask, LinkQuality, Rung, Telemetry
from coordinator.errors import AgentOffline, ContextAmbiguous, ModelsDiffer, RequestImpossible
from coordinator.fleet import Channel
from coordinator.policy import POLICIES, PlanRequest, build_scenario
from coordinator.policy.scenario import LEAST_FREE
from tests.coordinator.builders import CAPS, LADDER, MODEL, context, fleet_of, instance, telemetry

CELL = Channel("cell", ("pi-1", "pi-2", "pi-3"))
OTHER_MODEL = msgspec.structs.replace(MODEL, name="gemma-3-270m", fingerprint="d" * 32)


def agents() -> list[Telemetry]:
    return [
        telemetry("pi-1", contexts=[context("report", 900)]),
        telemetry("pi-2", contexts=[context("log", 300, cached=False), context("map", 120)]),
        telemetry("pi-3", contexts=[context("plan", 600)], pressure=0.75),
        telemetry("rx-1"),
        telemetry("rx-2"),
    ]


def ask(
    *sources: str,
    receiver: str = "rx-1",
    floor: float = 0.02,
    deadline_s: float | None = None,
    rung: str | None = None,
) -> PlanRequest:
    return PlanRequest(
        request=instance(1),
        sources=sources,
        receiver=receiver,
        question_tokens=20,
        quality_floor=floor,
        deadline_s=deadline_s,
        rung=rung,
    )


def message(**changes: Any) -> Ask:
    """A question of 3 + 12 tokens to rx-1, of the 900 tokens that pi-1 holds."""
    fields: dict[str, Any] = {
        "request": instance(7),
        "client": "cli-1",
        "question": "Where is it?",
        "sources": ("pi-1",),
        "receiver": "rx-1",
    }
    return Ask(**{**fields, **changes})


def test_a_scenario_holds_every_source_in_the_order_of_the_request() -> None:
    scenario = build_scenario(
        fleet_of(*agents()), [ask("pi-3", "pi-2:log", "pi-1")], [CELL], {"cell": 0.5}, 1.0, caps=CAPS
    )
    assert [(link.sender, link.context, link.tokens, link.cached) for link in scenario.links] == [
        ("pi-3", "plan", 600, True),
        ("pi-2", "log", 300, False),
        ("pi-1", "report", 900, True),
    ]
    assert scenario.airtime_free == {"cell": 0.5}
    assert scenario.known
    assert [rung.name for rung in scenario.links[0].rungs] == ["int4", "int6", "int8"]


@settings(max_examples=25)
@given(st.permutations(range(5)))
def test_the_plan_does_not_depend_on_the_order_in_which_agents_appeared(order: list[int]) -> None:
    requests = [ask("pi-1", "pi-2:log", "pi-3"), ask("pi-2:map", "pi-1", receiver="rx-2")]
    known = agents()
    expected = build_scenario(fleet_of(*known), requests, [CELL])
    scenario = build_scenario(fleet_of(*(known[index] for index in order)), requests, [CELL])
    assert scenario == expected
    assert POLICIES["jmsra"].plan(scenario) == POLICIES["jmsra"].plan(expected)


def test_the_plan_does_not_depend_on_the_order_of_channels() -> None:
    site = Channel("site", ("pi-1", "rx-1"))
    fleet = fleet_of(*agents())
    one, other = (build_scenario(fleet, [ask("pi-1", "pi-3")], order) for order in ([CELL, site], [site, CELL]))
    assert one == other


def test_memory_pressure_of_either_end_counts() -> None:
    fleet = fleet_of(telemetry("pi-1", contexts=[context()]), telemetry("rx-1", pressure=0.93))
    link = build_scenario(fleet, [ask("pi-1")], caps=CAPS).links[0]
    assert [rung.name for rung in link.rungs] == ["int4"]
    assert (link.sender_pressure, link.receiver_pressure) == (0.3, 0.93)
    squeezed = build_scenario(fleet, [ask("pi-1", floor=0.005)], caps=CAPS).links[0]
    assert squeezed.note == "no rung keeps KL 0.005 under memory pressure 0.93: sent as text"


def test_a_tightened_cache_is_sent_at_what_it_can_be_sent_at_or_made_again() -> None:
    tight = context("report", 900, rung="int6", ready=("int6", "int3"))
    fleet = fleet_of(telemetry("pi-1", contexts=[tight]), telemetry("rx-1"))
    link = build_scenario(fleet, [ask("pi-1")]).links[0]
    assert (link.cached, [rung.name for rung in link.rungs]) == (True, ["int6"])
    better = build_scenario(fleet, [ask("pi-1", floor=0.005)]).links[0]
    assert (better.cached, [rung.name for rung in better.rungs]) == (False, ["int8", "fp16", "lossless"])
    named = build_scenario(fleet, [ask("pi-1", rung="int4")]).links[0]
    assert (named.cached, [rung.name for rung in named.rungs]) == (False, ["int4"])


def test_a_quality_floor_of_zero_leaves_only_the_lossless_rung() -> None:
    link = build_scenario(fleet_of(*agents()), [ask("pi-1", floor=0.0)]).links[0]
    assert [rung.name for rung in link.rungs] == ["lossless"]


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize(
    ("sender", "note"),
    [
        (telemetry("pi-1", link=LinkQuality(), contexts=[context()]), "link not measured yet: sent as text"),
        (telemetry("pi-1", link=LinkQuality(uplink_bps=0.0, downlink_bps=1.0), contexts=[context()]), "link not"),
        (telemetry("pi-1", speed=None, contexts=[context()]), "speed of pi-1 not measured yet: sent as text"),
    ],
)
def test_what_was_not_measured_goes_as_text_with_a_note_and_the_plan_says_unknown(
    policy: str, sender: Telemetry, note: str
) -> None:
    fleet = fleet_of(sender, telemetry("pi-2", contexts=[context("log")]), telemetry("rx-1"))
    plan = POLICIES[policy].plan(build_scenario(fleet, [ask("pi-1", "pi-2")]))
    assert plan.links[0].medium == "tokens"
    assert plan.links[0].note.startswith(note)
    assert [plan.known, plan.links[0].known, plan.links[1].known] == [False, False, True]


def test_a_receiver_without_speed_gets_text() -> None:
    fleet = fleet_of(telemetry("pi-1", contexts=[context()]), telemetry("rx-1", speed=None))
    plan = POLICIES["kv"].plan(build_scenario(fleet, [ask("pi-1")]))
    assert plan.links[0].note == "speed of rx-1 not measured yet: sent as text"
    assert plan.predicted_question_s == 0
    assert not plan.known


def test_caches_made_after_another_prompt_prefix_are_not_sent() -> None:
    other = msgspec.structs.replace(MODEL, prefix="e" * 32)
    fleet = fleet_of(*agents(), models={"pi-1": other})
    link = build_scenario(fleet, [ask("pi-1")]).links[0]
    assert (link.rungs, link.note) == ((), "prompt prefixes differ: sent as text")


def test_different_models_are_refused() -> None:
    fleet = fleet_of(*agents(), models={"pi-1": OTHER_MODEL})
    with pytest.raises(ModelsDiffer, match=r"pi-1 \(gemma-3-270m\) and rx-1 .* alignment is not built yet"):
        build_scenario(fleet, [ask("pi-1")])


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (ask(), "it names no source"),
        (ask("pi-1", "pi-1:report"), "it names pi-1:report twice"),
        (PlanRequest(request=instance(1), sources=("pi-1",), receiver="rx-1", question_tokens=8_000), "8900 tokens"),
    ],
)
def test_a_request_that_cannot_be_carried_out_is_refused_with_the_reason(request_: PlanRequest, why: str) -> None:
    with pytest.raises(RequestImpossible, match=why):
        build_scenario(fleet_of(*agents()), [request_])


def test_an_agent_without_a_model_cannot_take_part() -> None:
    with pytest.raises(RequestImpossible, match="rx-1 has not said which model it runs"):
        build_scenario(fleet_of(*agents(), models={"rx-1": None}), [ask("pi-1")])


def test_sources_and_receivers_that_are_not_there_are_refused() -> None:
    with pytest.raises(AgentOffline):
        build_scenario(fleet_of(*agents()), [ask("pi-1")], now_s=30.0)
    with pytest.raises(ContextAmbiguous, match="name one, such as pi-2:log"):
        build_scenario(fleet_of(*agents()), [ask("pi-2")])


def test_a_full_channel_is_planned_as_if_a_little_were_free() -> None:
    scenario = build_scenario(fleet_of(*agents()), [ask("pi-1")], [CELL], {"cell": -0.1, "other": 3.0})
    assert scenario.airtime_free == {"cell": LEAST_FREE, "other": 1.0}


def test_a_deadline_and_the_length_of_the_question_come_from_the_message() -> None:
    request = PlanRequest.of(message(deadline_s=9.0, quality_floor=0.01))
    assert (request.question_tokens, request.deadline_s, request.quality_floor) == (15, 9.0, 0.01)
    plan = POLICIES["jmsra"].plan(build_scenario(fleet_of(*agents()), [request]))
    assert plan.requests[0].deadline_s == 9.0


def test_a_named_rung_is_the_only_one_of_every_link_although_its_loss_is_above_the_floor() -> None:
    links = build_scenario(fleet_of(*agents()), [ask("pi-1", "pi-2:log", floor=0.0, rung="int3")]).links
    assert [link.rungs for link in links] == [(LADDER[5],), (LADDER[5],)]
    assert [link.note for link in links] == ["", ""]


@pytest.mark.parametrize("name", ["int5", "INT4", "int", "q6"])
def test_a_rung_that_the_ladder_lacks_is_refused_with_one_line_that_names_those_it_has(name: str) -> None:
    with pytest.raises(RequestImpossible) as raised:
        build_scenario(fleet_of(*agents()), [ask("pi-1", rung=name)])
    assert f"has no rung {name}; it has lossless, fp16, int8, int6, int4, int3" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_rung_that_the_ladder_lacks_is_refused_also_where_only_text_could_go() -> None:
    fleet = fleet_of(telemetry("pi-1", link=LinkQuality(), contexts=[context()]), telemetry("rx-1"))
    with pytest.raises(RequestImpossible, match="has no rung int5"):
        build_scenario(fleet, [ask("pi-1", rung="int5")])


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_named_rung_that_memory_pressure_forbids_goes_as_text_and_the_note_names_both(policy: str) -> None:
    scenario = build_scenario(fleet_of(*agents()), [ask("pi-3", "pi-1", rung="fp16")])
    squeezed, free = scenario.links
    assert (squeezed.rungs, free.rungs) == ((), (LADDER[1],))
    assert squeezed.note == "rung fp16 is too large under memory pressure 0.75: sent as text"
    plan = POLICIES[policy].plan(scenario)
    assert (plan.links[0].medium, plan.links[0].note) == ("tokens", squeezed.note)


def test_the_receivers_memory_counts_for_a_named_rung_too() -> None:
    fleet = fleet_of(telemetry("pi-1", contexts=[context()]), telemetry("rx-1", pressure=0.93))
    link = build_scenario(fleet, [ask("pi-1", rung="int4")], caps=CAPS).links[0]
    assert [rung.name for rung in link.rungs] == ["int4"]
    link = build_scenario(fleet, [ask("pi-1", rung="int6")], caps=CAPS).links[0]
    assert (link.rungs, link.note) == ((), "rung int6 is too large under memory pressure 0.93: sent as text")


TIGHT = Rung(name="klt5", bits_per_element=1.4, kl=0.01, agreement=0.95, transformed=True)
BASELINE = Rung(name="qkvcomm-6", bits_per_element=4.2, kl=0.3, agreement=0.7)
TRANSFORMED = msgspec.structs.replace(MODEL, transform="e" * 32, ladder=(*LADDER, TIGHT), baselines=(BASELINE,))


@pytest.mark.parametrize("theirs", ["f" * 32, None])
def test_a_rung_of_a_transform_is_used_only_where_the_receiver_has_the_same(theirs: str | None) -> None:
    for transform, names in ((TRANSFORMED.transform, {"klt5"}), (theirs, set())):
        other = msgspec.structs.replace(TRANSFORMED, transform=transform)
        fleet = fleet_of(*agents(), models={"pi-1": TRANSFORMED, "rx-1": other})
        link = build_scenario(fleet, [ask("pi-1")]).links[0]
        assert {rung.name for rung in link.rungs} & {"klt5"} == names
    with pytest.raises(RequestImpossible, match="has no rung klt5"):
        build_scenario(fleet, [ask("pi-1", rung="klt5")])


def test_a_baseline_is_used_only_if_it_is_named() -> None:
    fleet = fleet_of(*agents(), models={"pi-1": TRANSFORMED, "rx-1": TRANSFORMED})
    assert BASELINE not in build_scenario(fleet, [ask("pi-1", floor=1.0)]).links[0].rungs
    assert build_scenario(fleet, [ask("pi-1", rung="qkvcomm-6")]).links[0].rungs == (BASELINE,)


def test_a_named_rung_does_not_hide_what_was_not_measured() -> None:
    fleet = fleet_of(telemetry("pi-1", speed=None, contexts=[context()]), telemetry("rx-1"))
    link = build_scenario(fleet, [ask("pi-1", rung="int3")]).links[0]
    assert (link.rungs, link.note) == ((), "speed of pi-1 not measured yet: sent as text")


def test_a_named_rung_is_that_of_each_senders_own_ladder() -> None:
    own = msgspec.structs.replace(LADDER[4], bits_per_element=4.9, kl=0.5)
    shorter = msgspec.structs.replace(MODEL, ladder=(LADDER[0], own))
    fleet = fleet_of(*agents(), models={"pi-2": shorter})
    links = build_scenario(fleet, [ask("pi-1", "pi-2:log", rung="int4")]).links
    assert [link.rungs for link in links] == [(LADDER[4],), (own,)]
    with pytest.raises(RequestImpossible, match=r"has no rung int8; it has lossless, int4$"):
        build_scenario(fleet, [ask("pi-1", "pi-2:log", rung="int8")])


@pytest.mark.parametrize("tie_fraction", [0.0, 0.1, 100.0])
@pytest.mark.parametrize("deadline_s", [None, 0.5, 600.0])
def test_a_cache_goes_at_the_named_rung_however_much_time_is_left(
    deadline_s: float | None, tie_fraction: float
) -> None:
    fleet = fleet_of(*agents())
    requests = [ask("pi-1", "pi-2:log", deadline_s=deadline_s, rung="int3")]
    scenario = build_scenario(fleet, requests, tie_fraction=tie_fraction)
    plan = POLICIES["kv"].plan(scenario)
    assert [(link.medium, link.rung, link.kl) for link in plan.links] == [("cache", "int3", 0.09)] * 2
    best = POLICIES["jmsra"].plan(scenario)
    assert all((link.medium, link.rung) in {("cache", "int3"), ("tokens", "lossless")} for link in best.links)
    assert [link.medium for link in POLICIES["token"].plan(scenario).links] == ["tokens", "tokens"]


def test_the_named_rung_comes_from_the_message() -> None:
    assert PlanRequest.of(message()).rung is None
    assert PlanRequest.of(message(rung="int3")).rung == "int3"


@given(st.integers(0, 1_024), st.integers(1, 64))
def test_facts_lengthen_the_question_by_so_many_tokens_for_each_source(facts: int, sources: int) -> None:
    names = tuple(f"pi-{number}" for number in range(sources))
    bare, told = PlanRequest.of(message(sources=names)), PlanRequest.of(message(sources=names, facts_tokens=facts))
    assert bare.question_tokens == 15
    assert told.question_tokens == 15 + facts * sources


def test_facts_count_against_the_window() -> None:
    small = msgspec.structs.replace(MODEL, window_tokens=1_000)
    fleet = fleet_of(*agents(), models=dict.fromkeys(("pi-1", "rx-1"), small))
    at_most = 1_000 - 900 - 15 - 32
    build_scenario(fleet, [PlanRequest.of(message(facts_tokens=at_most))])
    with pytest.raises(RequestImpossible, match="1001 tokens of contexts, question and answer exceed the 1000"):
        build_scenario(fleet, [PlanRequest.of(message(facts_tokens=at_most + 1))])


def test_facts_are_predicted_to_take_their_time() -> None:
    fleet = fleet_of(*agents())
    bare, told = (
        POLICIES["kv"].plan(build_scenario(fleet, [PlanRequest.of(message(facts_tokens=tokens))]))
        for tokens in (0, 300)
    )
    assert told.predicted_question_s - bare.predicted_question_s == pytest.approx(300 / 150.0)
    assert told.predicted_e2e_s - bare.predicted_e2e_s == pytest.approx(300 / 150.0)
