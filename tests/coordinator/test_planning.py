"""From a question and the fleet to a round: what is free, who holds texts, what is local, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.messages import Ask, ContextInfo, LinkQuality, RateStep, Telemetry
from coordinator.errors import (
    AgentOffline,
    AgentUnknown,
    ContextAmbiguous,
    ContextNotHeld,
    CoordinatorError,
    ModelsDiffer,
    PolicyUnknown,
    RequestImpossible,
)
from coordinator.fleet import Fleet, apply
from coordinator.learning import Learning
from coordinator.planning import HOLDERS, airtime_free, local_source, plan_round, text_holders
from coordinator.policy import LinkPlan
from coordinator.round import LocalSource, Round
from coordinator.settings import ChannelSettings, CoordinatorSettings, PlanningSettings
from coordinator.texts import Texts
from tests.coordinator.builders import MODEL, context, fleet_of, instance, presence, telemetry
from tests.coordinator.site import question, sent

REPORT, LOG, PLAN = context("report", 400), context("log", 300), context("plan", 200)
SETTINGS = CoordinatorSettings(planning=PlanningSettings(policy="kv"))
CELL = CoordinatorSettings(
    planning=PlanningSettings(policy="kv"),
    channels=(ChannelSettings(name="cell", members=("pi-1", "pi-2", "jetson-1")),),
)
OTHER_MODEL = msgspec.structs.replace(MODEL, name="gemma-3-270m", fingerprint="d" * 32)
EXPIRY_S = SETTINGS.planning.expiry_s


def reports() -> list[Telemetry]:
    return [
        telemetry("pi-1", contexts=[REPORT]),
        telemetry("pi-2", contexts=[LOG], pressure=0.5),
        telemetry("jetson-1", contexts=[PLAN], pressure=0.25),
        telemetry("alien", contexts=[context("x")]),
        telemetry("many", contexts=[context("a", 5_000), context("b", 5_000)]),
        telemetry("bare"),
    ]


def fleet() -> Fleet:
    known = fleet_of(*reports(), models={"alien": OTHER_MODEL, "mute": None})
    return apply(apply(known, presence("gone"), 0.0), presence("gone", 1, "offline"), 0.0)


def plan(ask: Ask, settings: CoordinatorSettings = SETTINGS, *running: Round, now_s: float = 1.0) -> Round:
    return plan_round(ask, fleet=fleet(), settings=settings, running=running, texts=Texts(), now_s=now_s)


def links(round_: Round) -> list[LinkPlan]:
    return [source for source in round_.sources if isinstance(source, LinkPlan)]


def test_a_round_knows_when_it_was_accepted_by_whom_it_is_answered_and_under_which_policy() -> None:
    round_ = plan(question(policy="token"))
    assert (round_.accepted_s, round_.receiver_instance, round_.policy) == (1.0, instance(1), "token")
    assert [(link.sender, link.medium) for link in links(round_)] == [("pi-1", "tokens"), ("pi-2", "tokens")]
    assert [link.medium for link in links(plan(question()))] == ["cache", "cache"]


def test_what_was_learned_scales_rates_and_what_others_occupy_and_adds_what_the_receiver_needs() -> None:
    class Taught(Learning):
        link_factors = {("pi-1", "jetson-1"): 0.5}  # noqa: RUF012
        overheads_s = {"jetson-1": 0.25}  # noqa: RUF012

    def planned(learning: Learning | None) -> Round:
        return plan_round(
            question(), fleet=fleet(), settings=SETTINGS, running=(), texts=Texts(), now_s=1.0, learning=learning
        )

    before, after = planned(Learning()), planned(Taught())
    assert before.plan is not None
    assert after.plan is not None
    assert [link.link_bps for link in links(after)] == [1e7, 2e7]
    assert [after.factor(link) for link in links(after)] == [0.5, 1.0]
    assert after.overhead_s == 0.25
    assert after.plan.predicted_e2e_s > before.plan.predicted_e2e_s + 0.25
    free = airtime_free(fleet(), SETTINGS, [after], Taught().link_factors)
    assert free["pi-1/up"] == pytest.approx(1 - links(after)[0].share_bps / 1e7)
    assert free["pi-2/up"] == pytest.approx(1 - links(after)[1].share_bps / 2e7)


def test_a_source_that_the_receiver_holds_itself_is_local_and_keeps_its_place() -> None:
    round_ = plan(question(sources=("pi-2", "jetson-1", "pi-1")))
    assert [type(source) for source in round_.sources] == [LinkPlan, LocalSource, LinkPlan]
    local = round_.sources[1]
    assert isinstance(local, LocalSource)
    assert (local.context, local.pressure) == (PLAN, 0.25)
    assert round_.agents == ("jetson-1", "pi-2", "pi-1")


@pytest.mark.parametrize(
    ("kept", "changes", "least", "used"),
    [
        ("lossless", {}, "int4", "lossless"),
        ("int4", {}, "int4", "int4"),
        ("int4", {"quality_floor": 0.01}, "int6", "lossless"),
        ("int3", {}, "int4", "lossless"),
        ("int3", {"rung": "int3"}, "int3", "int3"),
        (None, {}, "int4", "lossless"),
    ],
)
def test_a_local_source_is_used_as_it_is_kept_unless_that_loses_too_much(
    kept: str | None, changes: dict[str, Any], least: str, used: str
) -> None:
    ask = question(sources=("jetson-1",), **changes)
    local = local_source(ask, MODEL, context("plan", 200, rung=kept), 0.25)
    assert (local.least, local.rung) == (least, used)


def test_a_question_of_local_sources_only_needs_no_plan() -> None:
    round_ = plan(question(sources=("jetson-1:plan",)))
    assert round_.plan is None
    assert round_.links == ()
    assert round_.agents == ("jetson-1",)
    assert round_.report("planned").predicted_e2e_s == 0.0


def test_a_round_goes_at_the_rung_that_its_question_names() -> None:
    round_ = plan(question(rung="int3"))
    assert [(link.medium, link.rung) for link in links(round_)] == [("cache", "int3")] * 2
    assert [order.rung for _, order in round_.send_orders(60.0)] == ["int3"] * 2
    assert [part.rung for part in round_.answer_order(60.0).parts] == ["int3"] * 2


def test_facts_are_counted_of_the_sources_that_travel_only() -> None:
    alone, beside = (plan(question(sources=sources, facts_tokens=64)) for sources in (("pi-1",), ("pi-1", "jetson-1")))
    bare = plan(question(sources=("pi-1",)))
    assert alone.report("planned").predicted_question_s > bare.report("planned").predicted_question_s
    assert beside.report("planned").predicted_question_s == alone.report("planned").predicted_question_s


REFUSED: list[tuple[dict[str, Any], type[CoordinatorError], str]] = [
    ({"policy": "best"}, PolicyUnknown, "no policy is called best: choose one of jmsra, kv, optimum, token"),
    ({"receiver": "nobody"}, AgentUnknown, "no agent is called nobody: known are alien, bare, gone, jetson-1"),
    ({"sources": ("nobody",)}, AgentUnknown, "no agent is called nobody"),
    ({"receiver": "gone"}, AgentOffline, "gone is offline (never heard since this coordinator started)"),
    ({"sources": ("pi-1", "gone")}, AgentOffline, "gone is offline"),
    ({"sources": ("pi-1:map",)}, ContextNotHeld, "pi-1 holds no context called map: it holds report"),
    ({"sources": ("jetson-1:map",)}, ContextNotHeld, "jetson-1 holds no context called map: it holds plan"),
    ({"sources": ("bare",)}, ContextNotHeld, "bare holds no context: give it one first"),
    ({"sources": ("many",)}, ContextAmbiguous, "many holds 2 contexts (a, b); name one, such as many:a"),
    ({"sources": ("many",), "receiver": "many"}, ContextAmbiguous, "name one, such as many:a"),
    ({"sources": ("alien",)}, ModelsDiffer, "alien (gemma-3-270m) and jetson-1 (SmolLM2-135M-Instruct)"),
    ({"question": "\t "}, RequestImpossible, "the question is empty; ask something"),
    ({"sources": ("pi-1", "pi-1")}, RequestImpossible, "it names a source twice; name each context once"),
    ({"sources": ("pi-1", "pi-1:report")}, RequestImpossible, "it names pi-1:report twice"),
    ({"sources": ("jetson-1:plan", "jetson-1")}, RequestImpossible, "it names jetson-1:plan twice"),
    ({"sources": ("many:a", "many:b")}, RequestImpossible, "exceed the 8192 that SmolLM2-135M-Instruct on jetson-1"),
    ({"sources": ("many:a",), "rung": "q6"}, RequestImpossible, "has no rung q6; it has lossless, fp16, int8, int6"),
]


@pytest.mark.parametrize(("changes", "kind", "line"), REFUSED, ids=[line for _, _, line in REFUSED])
def test_each_refusal_is_one_line_that_says_what_to_change(
    changes: dict[str, Any], kind: type[CoordinatorError], line: str
) -> None:
    with pytest.raises(kind) as raised:
        plan(question(**changes))
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_agent_unheard_for_longer_than_the_expiry_is_offline() -> None:
    plan(question(), now_s=EXPIRY_S)
    with pytest.raises(AgentOffline, match=r"jetson-1 is offline \(last heard 6 s ago\)"):
        plan(question(), now_s=EXPIRY_S + 1)


def test_an_agent_that_runs_no_model_is_named() -> None:
    known = fleet_of(*reports(), telemetry("mute", contexts=[LOG]), models={"mute": None})
    both: list[dict[str, Any]] = [{"sources": ("mute",)}, {"receiver": "mute"}]
    for changes in both:
        with pytest.raises(RequestImpossible, match="mute has not said which model it runs"):
            plan_round(question(**changes), fleet=known, settings=SETTINGS, running=(), texts=Texts(), now_s=1.0)


def test_without_running_rounds_everything_is_free() -> None:
    assert airtime_free(fleet(), SETTINGS, []) == {}
    assert airtime_free(fleet(), SETTINGS, [plan(question(sources=("jetson-1",)))]) == {}


def test_what_running_transfers_use_of_each_channel_is_not_free_until_they_end() -> None:
    running = plan(question())
    shares = {link.sender: link.share_bps for link in links(running)}
    free = airtime_free(fleet(), SETTINGS, [running])
    assert free["pi-1/up"] == pytest.approx(1 - shares["pi-1"] / 2e7)
    assert free["jetson-1/down"] == pytest.approx(max(0.0, 1 - sum(shares.values()) / 3e7), abs=1e-9)
    (agent, order), _ = running.send_orders(60.0)
    running.take_send(sent(order, agent))
    assert airtime_free(fleet(), SETTINGS, [running]).keys() == {"pi-2/up", "jetson-1/down"}


def test_a_share_that_rises_later_is_not_free_now() -> None:
    """By the time that another round's transfers run it may have risen."""
    running = plan(question(sources=("pi-1",)))
    (link,) = links(running)
    rises = replace(link, share_bps=4e6, later_rates=(RateStep(after_s=1.0, rate_bps=1e7),))
    running.sources = (rises,)
    assert airtime_free(fleet(), SETTINGS, [running])["pi-1/up"] == pytest.approx(0.5)


def test_on_a_channel_that_holds_both_ends_a_transfer_counts_twice() -> None:
    running = plan(question(sources=("pi-1",)), CELL)
    (link,) = links(running)
    used = link.share_bps / 2e7 + link.share_bps / 3e7
    assert airtime_free(fleet(), CELL, [running]) == {"cell": pytest.approx(max(0.0, 1 - used), abs=1e-9)}


def test_a_round_beside_others_is_planned_with_what_they_leave() -> None:
    alone = plan(question(2, sources=("pi-1",)))
    beside = plan(question(2, sources=("pi-1",)), SETTINGS, plan(question(1)))
    assert links(beside)[0].share_bps < links(alone)[0].share_bps
    assert beside.report("planned").predicted_e2e_s > alone.report("planned").predicted_e2e_s


def test_agents_that_are_forgotten_or_not_measured_any_more_use_nothing() -> None:
    running = plan(question())
    assert airtime_free(Fleet(), SETTINGS, [running]) == {}
    unmeasured = fleet_of(*(msgspec.structs.replace(each, link=LinkQuality()) for each in reports()))
    assert airtime_free(unmeasured, SETTINGS, [running]) == {}


@given(st.integers(0, 12))
def test_what_is_free_is_always_a_share(count: int) -> None:
    free = airtime_free(fleet(), CELL, [plan(question(number), CELL) for number in range(count)])
    assert all(0.0 <= share <= 1.0 for share in free.values())


def holders(known: Fleet, wanted: ContextInfo, texts: Texts | None = None, now_s: float = 1.0) -> tuple[str, ...]:
    holders = text_holders(
        [wanted.context_id], known, texts or Texts(), receiver="jetson-1", now_s=now_s, expiry_s=EXPIRY_S
    )
    return holders[wanted.context_id]


def test_the_coordinator_is_asked_for_a_text_first_then_agents_that_are_there_but_never_the_receiver() -> None:
    known = fleet_of(
        telemetry("pi-3", contexts=[REPORT]),
        telemetry("pi-1", contexts=[REPORT]),
        telemetry("pi-2", contexts=[LOG]),
        telemetry("jetson-1", contexts=[REPORT]),
    )
    texts = Texts()
    texts.keep("pi-1", "report", "the report")
    assert holders(known, REPORT) == ("pi-1", "pi-3")
    assert holders(known, REPORT, texts) == ("coordinator", "pi-1", "pi-3")
    assert holders(known, LOG, texts) == ("pi-2",)
    assert holders(known, PLAN, texts) == ()
    assert holders(apply(known, presence("pi-1", 1, "offline"), 1.0), REPORT, texts) == ("coordinator", "pi-3")
    assert holders(known, REPORT, texts, now_s=EXPIRY_S + 1) == ("coordinator",)


def test_an_order_names_no_more_holders_than_it_may() -> None:
    names = [f"pi-{number:03}" for number in range(100)]
    known = fleet_of(*(telemetry(name, contexts=[REPORT]) for name in names))
    texts = Texts()
    texts.keep("pi-000", "report", "the report")
    assert holders(known, REPORT, texts) == ("coordinator", *names[: HOLDERS - 1])


def test_a_round_names_the_holders_of_every_context_that_travels() -> None:
    round_ = plan(question(sources=("pi-1", "jetson-1", "pi-2")))
    order = round_.answer_order(60.0)
    assert [part.text_holders for part in order.parts] == [("pi-1",), (), ("pi-2",)]
