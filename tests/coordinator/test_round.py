"""One round as a value: orders from a plan, a report from outcomes. No bus, no clock."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config import topics
from broker_config.messages import (
    AnswerOrder,
    AnswerOutcome,
    AnswerPiece,
    PartOutcome,
    RateStep,
    RoundReport,
    SendOrder,
    SendOutcome,
    Stages,
)
from broker_config.wire import pack, unpack
from coordinator.fleet import Fleet, apply
from coordinator.policy import LinkPlan, RequestPlan
from coordinator.round import (
    LARGE_CHUNK_BYTES,
    LEAST_CHUNK_BYTES,
    LEAST_PART_TIMEOUT_S,
    PART_TIMEOUT_FACTOR,
    SLOW_LINK_BPS,
    SLOWEST_LINK_BPS,
    SMALL_CHUNK_BYTES,
    UNMEASURED_PART_TIMEOUT_S,
    LocalSource,
    Round,
)
from tests.coordinator.builders import context, digest, fleet_of, instance, presence, telemetry
from tests.coordinator.site import answered, question, sent

PLAN = LinkPlan(
    request=instance(1),
    sender="pi-1",
    receiver="jetson-1",
    context="report",
    context_id=digest(1),
    tokens=400,
    own_tokens=0,
    medium="cache",
    rung="int8",
    kl=0.001,
    link_bps=2e7,
    share_bps=1e7,
    sender_pressure=0.3,
    receiver_pressure=0.4,
    planned_bytes=5_000_000,
    fp16_bytes=9_216_000,
    text_bytes=800,
    predicted=Stages(transfer_s=4.0, decode_s=0.1),
    arrive_s=4.1,
    known=True,
)
OTHER = replace(PLAN, sender="pi-2", context="log", context_id=digest(2), arrive_s=2.0)
OWN = LocalSource(context=context("plan", 200), pressure=0.4, least="klt5", rung="float32")


def round_of(*sources: LinkPlan | LocalSource, **changes: Any) -> Round:
    """Accepted at 100 s."""
    links = tuple(source for source in sources if isinstance(source, LinkPlan))
    plan = RequestPlan(
        request=instance(1),
        receiver="jetson-1",
        predicted_e2e_s=5.0,
        predicted_question_s=0.2,
        deadline_s=None,
        late_s=0.0,
        known=True,
        links=links,
    )
    fields: dict[str, Any] = {
        "ask": question(),
        "policy": "kv",
        "accepted_s": 100.0,
        "receiver_instance": instance(1),
        "plan": plan if links else None,
        "sources": sources,
        "holders": {digest(1): ("coordinator", "pi-1")},
    }
    return Round(**{**fields, **changes})


def order_of(round_: Round) -> AnswerOrder:
    """The receiver's order, as it arrives there."""
    order = unpack(topics.ORDERS, pack(round_.answer_order(60.0)))
    assert isinstance(order, AnswerOrder)
    return order


def sends_of(round_: Round) -> list[tuple[str, SendOrder]]:
    return round_.send_orders(60.0)


def piece(index: int = 0, agent: str = "jetson-1") -> AnswerPiece:
    return AnswerPiece(request=instance(1), agent=agent, index=index, text="north")


def test_parts_stand_in_the_order_of_the_question_with_a_transfer_of_their_own_each() -> None:
    round_ = round_of(OTHER, OWN, PLAN)
    order = order_of(round_)
    assert [(part.sender, part.context_id, part.tokens) for part in order.parts] == [
        ("pi-2", digest(2), 400),
        ("jetson-1", OWN.context.context_id, 200),
        ("pi-1", digest(1), 400),
    ]
    assert [part.text_holders for part in order.parts] == [(), (), ("coordinator", "pi-1")]
    assert len({part.transfer for part in order.parts}) == 3
    assert (order.question, order.asker, order.expires_s) == (round_.ask.question, round_.ask.client, 60.0)
    sends = sends_of(round_)
    assert [agent for agent, _ in sends] == ["pi-2", "pi-1"]
    assert [send.transfer for _, send in sends] == [order.parts[0].transfer, order.parts[2].transfer]
    assert round_.agents == ("jetson-1", "pi-2", "pi-1")


def test_a_split_that_may_move_is_ordered_of_both_ends_with_its_rates() -> None:
    steps = (RateStep(after_s=2.0, rate_bps=4e6),)
    split = replace(PLAN, medium="split", own_tokens=150, meet=True, later_rates=steps)
    round_ = round_of(OTHER, split)
    (_, plain), (_, send) = sends_of(round_)
    assert (plain.meet, plain.own_tokens, plain.later_rates) == (False, 0, ())
    assert (send.meet, send.own_tokens, send.later_rates, send.rate_bps) == (True, 150, steps, 1e7)
    assert [(part.meet, part.own_tokens) for part in order_of(round_).parts] == [(False, 0), (True, 150)]
    alone = round_of(replace(split, share_bps=2e7))
    assert [order.rate_bps for _, order in sends_of(alone)] == [2e7]  # a rate that changes begins with one


def test_what_the_receiver_computed_is_reported_beside_what_was_planned() -> None:
    round_ = round_of(replace(PLAN, medium="split", own_tokens=150, meet=True))
    assert round_.report("planned").links[0].computed_tokens is None
    order = order_of(round_)
    part = PartOutcome(transfer=order.parts[0].transfer, sender="pi-1", state="delivered", own_tokens=190)
    round_.take_answer(answered(order, parts=(part,)), 105.0)
    (link,) = round_.report("answered").links
    assert (link.own_tokens, link.computed_tokens) == (150, 190)


def test_a_sender_of_two_contexts_gets_two_orders_and_is_named_once() -> None:
    round_ = round_of(PLAN, replace(PLAN, context="map", context_id=digest(3)))
    assert [(agent, send.context_id) for agent, send in sends_of(round_)] == [("pi-1", digest(1)), ("pi-1", digest(3))]
    assert round_.agents == ("jetson-1", "pi-1")
    assert round_.still_sending() == ("pi-1",)


@pytest.mark.parametrize("facts_tokens", [0, 48, 1_024])
def test_every_sender_is_told_how_many_tokens_of_facts_are_wanted(facts_tokens: int) -> None:
    asked = question(facts_tokens=facts_tokens)
    orders = [unpack(topics.ORDERS, pack(send)) for _, send in sends_of(round_of(PLAN, OWN, OTHER, ask=asked))]
    assert [order.facts_tokens for order in orders if isinstance(order, SendOrder)] == [facts_tokens] * 2


def test_no_facts_are_wanted_unless_the_question_says_so() -> None:
    assert [send.facts_tokens for _, send in sends_of(round_of(PLAN, OTHER))] == [0, 0]


def test_a_link_that_shares_is_paced_to_its_share_and_one_alone_is_not_slowed() -> None:
    alone = replace(PLAN, share_bps=PLAN.link_bps)
    assert [send.rate_bps for _, send in sends_of(round_of(alone))] == [None]
    assert [send.rate_bps for _, send in sends_of(round_of(alone, OWN))] == [None]
    beside_another_round = replace(PLAN, share_bps=PLAN.link_bps / 2)
    assert [send.rate_bps for _, send in sends_of(round_of(beside_another_round))] == [PLAN.link_bps / 2]
    unmeasured = replace(OTHER, share_bps=0.0, link_bps=0.0, known=False)
    assert [send.rate_bps for _, send in sends_of(round_of(PLAN, unmeasured))] == [1e7, None]


def test_chunks_are_small_on_a_slow_link() -> None:
    fast = replace(PLAN, link_bps=SLOW_LINK_BPS)
    slow = replace(PLAN, link_bps=0.9 * SLOWEST_LINK_BPS)
    chunks = [send.chunk_bytes for _, send in sends_of(round_of(fast, PLAN, slow))]
    assert chunks == [LARGE_CHUNK_BYTES, SMALL_CHUNK_BYTES, LEAST_CHUNK_BYTES]


@pytest.mark.parametrize(
    ("sources", "timeout_s"),
    [
        ((PLAN, OTHER), PART_TIMEOUT_FACTOR * 4.1),
        ((OTHER,), PART_TIMEOUT_FACTOR * 2.0),
        ((replace(OTHER, arrive_s=0.1),), LEAST_PART_TIMEOUT_S),
        ((PLAN, replace(OTHER, known=False)), UNMEASURED_PART_TIMEOUT_S),
        ((OWN,), LEAST_PART_TIMEOUT_S),
    ],
)
def test_a_part_may_take_a_multiple_of_what_is_predicted_of_the_slowest(
    sources: tuple[LinkPlan | LocalSource, ...], timeout_s: float
) -> None:
    assert round_of(*sources).answer_order(60.0).part_timeout_s == pytest.approx(timeout_s)


def test_a_part_may_not_take_longer_than_the_question() -> None:
    assert round_of(replace(PLAN, known=False)).answer_order(10.0).part_timeout_s == 10.0


def test_a_planned_report_holds_the_plan_and_nothing_measured() -> None:
    report = round_of(PLAN, OWN).report("planned")
    assert (report.state, report.predicted_e2e_s, report.predicted_question_s) == ("planned", 5.0, 0.2)
    assert (report.e2e_s, report.total_s, report.question_s, report.answer, report.fallbacks) == (
        None,
        None,
        None,
        "",
        0,
    )
    link, own = report.links
    assert (link.sender, link.rung, link.measured, link.wire_bytes) == ("pi-1", "int8", None, None)
    assert (own.sender, own.context, own.planned_bytes, own.predicted) == ("jetson-1", "plan", 0, Stages())
    assert "nothing travels" in own.note


def test_an_answered_report_sets_measured_beside_predicted_from_both_ends() -> None:
    round_ = round_of(PLAN, OTHER)
    order = order_of(round_)
    for agent, send in sends_of(round_):
        round_.take_send(sent(send, agent, prefill_s=0.5))
    round_.take_piece(piece(), 103.0)
    parts = tuple(
        PartOutcome(
            transfer=part.transfer,
            sender=part.sender,
            state="delivered",
            payload_bytes=1000,
            receive_s=9.0,
            decode_s=0.25,
            prefill_s=0.125,
        )
        for part in order.parts
    )
    round_.take_answer(answered(order, parts=parts), 104.0)
    report = round_.report("answered")
    assert (report.e2e_s, report.total_s, report.question_s, report.answer) == (3.0, 4.0, 0.125, "the north one")
    for link in report.links:
        assert link.predicted == PLAN.predicted
        assert link.measured == Stages(
            sender_prefill_s=0.5, encode_s=0.25, transfer_s=0.5, decode_s=0.25, receiver_prefill_s=0.125
        )
        assert (link.payload_bytes, link.wire_bytes) == (1000, 1200)


def test_without_its_senders_outcome_a_link_takes_the_seconds_that_the_receiver_measured() -> None:
    round_ = round_of(PLAN)
    (part,) = order_of(round_).parts
    outcome = PartOutcome(transfer=part.transfer, sender="pi-1", state="delivered", payload_bytes=7, receive_s=1.5)
    round_.take_answer(answered(order_of(round_), parts=(outcome,)), 104.0)
    (link,) = round_.report("answered").links
    assert link.measured == Stages(transfer_s=1.5)
    assert (link.payload_bytes, link.wire_bytes) == (7, None)


def test_fallbacks_are_counted_and_both_ends_say_what_went_wrong() -> None:
    round_ = round_of(replace(PLAN, note="a note of the plan"), OTHER)
    order = order_of(round_)
    (agent, send), _ = sends_of(round_)
    round_.take_send(sent(send, agent, state="expired", reason="no acknowledgement"))
    parts = (
        PartOutcome(
            transfer=send.transfer, sender="pi-1", state="expired", fallback="coordinator", reason="nothing came"
        ),
        PartOutcome(transfer=order.parts[1].transfer, sender="pi-2", state="delivered"),
    )
    round_.take_answer(answered(order, parts=parts), 104.0)
    report = round_.report("answered")
    assert report.fallbacks == 1
    assert [link.fallback for link in report.links] == ["coordinator", ""]
    assert (
        report.links[0].note == "a note of the plan; sender expired: no acknowledgement; receiver expired: nothing came"
    )


@pytest.mark.parametrize("state", ["failed", "cancelled", "expired"])
def test_a_report_without_an_answer_says_why_and_claims_nothing(state: Any) -> None:
    report = round_of(PLAN).report(state, "the reason")
    assert (report.state, report.reason, report.answer, report.e2e_s, report.total_s) == (
        state,
        "the reason",
        "",
        None,
        None,
    )
    round_ = round_of(PLAN)
    round_.take_answer(answered(order_of(round_), state=state, reason="its reason", question_s=0.5), 104.0)
    told = round_.report(state)
    assert (told.reason, told.question_s) == ("its reason", None)


def test_the_first_outcome_of_a_transfer_and_the_first_answer_count() -> None:
    round_ = round_of(PLAN)
    (_, send), order = sends_of(round_)[0], order_of(round_)
    round_.take_send(sent(send, "pi-1"))
    round_.take_send(sent(send, "pi-1", state="cancelled", wire_bytes=0))
    round_.take_answer(answered(order), 104.0)
    round_.take_answer(answered(order, answer="another"), 105.0)
    report = round_.report("answered")
    assert (report.answer, report.total_s, report.links[0].wire_bytes) == ("the north one", 4.0, 1200)


def test_outcomes_of_others_change_nothing() -> None:
    round_ = round_of(PLAN, OWN)
    (_, send), order = sends_of(round_)[0], order_of(round_)
    before = round_.report("planned")
    round_.take_send(sent(send, "pi-2"))
    round_.take_send(sent(send, "pi-1", transfer=instance(77)))
    round_.take_send(sent(send, "jetson-1", transfer=order.parts[1].transfer))
    round_.take_answer(answered(order, agent="pi-2"), 104.0)
    assert not round_.take_piece(piece(agent="pi-2"), 103.0)
    assert round_.report("planned") == before
    assert not round_.done.is_set()
    assert not round_.sent.is_set()


def test_a_piece_counts_once_and_the_first_one_makes_the_e2e() -> None:
    round_ = round_of(PLAN)
    news = [round_.take_piece(piece(index), 101.0 + at) for at, index in enumerate((0, 0, 1, 3, 2, 3, 4))]
    assert news == [True, False, True, True, False, False, True]
    assert round_.report("answered").e2e_s == 1.0


def test_links_run_until_their_transfer_has_ended_or_the_answer_is_there() -> None:
    round_ = round_of(PLAN, OWN, OTHER)
    sends = dict(sends_of(round_))
    assert round_.running_links() == (PLAN, OTHER)
    round_.take_send(sent(sends["pi-1"], "pi-1"))
    assert round_.running_links() == (OTHER,)
    assert round_.still_sending() == ("pi-2",)
    assert not round_.sent.is_set()
    round_.take_answer(answered(order_of(round_)), 104.0)
    assert round_.running_links() == ()
    round_.take_send(sent(sends["pi-2"], "pi-2"))
    assert round_.sent.is_set()


def test_what_comes_first_counts_a_stop_or_an_answer() -> None:
    first, second = round_of(PLAN), round_of(PLAN)
    first.stop("cancelled", "withdrawn")
    first.stop("failed", "gone")
    first.take_answer(answered(order_of(first)), 104.0)
    assert (first.stopped, first.answer) == (("cancelled", "withdrawn"), None)
    second.take_answer(answered(order_of(second)), 104.0)
    second.stop("cancelled", "withdrawn")
    assert second.stopped is None
    assert second.answer is not None


@pytest.mark.parametrize(
    ("fleet", "now_s", "since_s", "gone"),
    [
        (fleet_of(telemetry("jetson-1")), 5.0, 0.0, ""),
        (fleet_of(telemetry("jetson-1")), 5.1, 0.0, "jetson-1 went offline"),
        (fleet_of(telemetry("jetson-1")), 9.0, 4.0, ""),  # nobody could be heard before
        (fleet_of(telemetry("jetson-1")), 9.1, 4.0, "jetson-1 went offline"),
        (apply(fleet_of(telemetry("jetson-1")), presence("jetson-1", 1, "offline"), 1.0), 4.0, 0.0, ""),
        (apply(fleet_of(telemetry("jetson-1")), presence("jetson-1", 2), 1.0), 1.5, 0.0, "jetson-1 was restarted"),
        (Fleet(), 4.0, 0.0, ""),
        (Fleet(), 6.0, 0.0, "jetson-1 went offline"),
    ],
)
def test_a_receiver_is_gone_when_it_was_restarted_or_could_have_been_heard_and_was_not(
    fleet: Fleet, now_s: float, since_s: float, gone: str
) -> None:
    why = round_of(PLAN).receiver_gone(fleet, now_s, listening_since_s=since_s, expiry_s=5.0)
    assert why.startswith(gone)
    assert bool(why) == bool(gone)


SOURCES = st.lists(st.sampled_from([PLAN, OTHER, OWN]), min_size=1, max_size=3, unique_by=id)
NOTES = st.text(max_size=1_024)


@given(st.data(), SOURCES)
def test_every_report_is_one_that_the_wire_accepts_and_its_links_are_those_of_the_question(
    data: st.DataObject, sources: list[LinkPlan | LocalSource]
) -> None:
    round_ = round_of(*sources)
    order = order_of(round_)
    for agent, send in data.draw(st.permutations(sends_of(round_))):
        if data.draw(st.booleans()):
            state = data.draw(st.sampled_from(["delivered", "refused", "cancelled", "expired"]))
            round_.take_send(sent(send, agent, state=state, reason=data.draw(NOTES)))
    if data.draw(st.booleans()):
        round_.take_piece(piece(), 101.0)
    if data.draw(st.booleans()):
        parts = tuple(
            PartOutcome(
                transfer=part.transfer,
                sender=part.sender,
                state=data.draw(st.sampled_from(["delivered", "expired"])),
                fallback=data.draw(st.sampled_from(["", "coordinator", "pi-2"])),
                reason=data.draw(NOTES),
            )
            for part in order.parts
            if data.draw(st.booleans())
        )
        state = data.draw(st.sampled_from(["answered", "failed", "cancelled", "expired"]))
        round_.take_answer(answered(order, state=state, parts=parts, reason=data.draw(NOTES)), 102.0)
    reason = data.draw(NOTES) * 3
    report = round_.report(data.draw(st.sampled_from(["planned", "answered", "failed", "expired"])), reason)
    assert msgspec.convert(msgspec.to_builtins(report), RoundReport) == report
    assert [link.context_id for link in report.links] == [part.context_id for part in order.parts]
    assert report.fallbacks == sum(bool(link.fallback) for link in report.links)


def test_outcomes_are_told_apart_by_type_on_one_topic() -> None:
    round_ = round_of(PLAN)
    (_, send), order = sends_of(round_)[0], order_of(round_)
    for outcome in (sent(send, "pi-1"), answered(order)):
        assert unpack(topics.OUTCOMES, pack(outcome)) == outcome
    assert isinstance(sent(send, "pi-1"), SendOutcome)
    assert isinstance(answered(order), AnswerOutcome)
    assert isinstance(round_.done, asyncio.Event)
