"""Answering: every question ends in exactly one outcome, in its turn, with all that it said before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import AsyncMock

import pytest

from broker_config import topics
from broker_config.messages import AnswerOrder, AnswerOutcome, AnswerPiece, CancelOrder
from edge_agent.context_facts import ContextFacts
from edge_agent.facts import Extractor, Fact, merged, summary, within
from edge_agent.facts.fact import MAX_FACTS
from edge_agent.kv.recipe import recipe
from edge_agent.memory import Held
from scripts import relay
from tests.edge_agent.agents import (
    NORTH,
    SOUTH,
    MemoryAgent,
    Site,
    answer_order,
    kept,
    order_for,
    part_of,
    queued,
    running_site,
)
from tests.memory_bus import Trouble

RECEIVER, SENDER = "jetson-1", "pi-1"


@pytest.fixture
async def site(tiny_bundle: Path) -> AsyncIterator[Site]:
    """pi-1 holds two texts, jetson-1 the first of them."""
    async with running_site() as started:
        await started.start(SENDER, tiny_bundle, NORTH, SOUTH)
        await started.start(RECEIVER, tiny_bundle, NORTH)
        yield started


def receiver(site: Site) -> MemoryAgent:
    return site.agents[RECEIVER]


def held(site: Site, number: int = 0) -> Held:
    found = site.agents[SENDER].store.by_name(f"text-{number}")
    assert found is not None
    return found


def of_its_own(site: Site, **changes: object) -> AnswerOrder:
    """A question whose only context the receiver holds: no bus is needed to answer it."""
    return answer_order(part_of(held(site), RECEIVER), **changes)


async def asked(site: Site, *numbers: int) -> AnswerOutcome:
    """A question about these texts of pi-1, in this order."""
    parts = [part_of(held(site, number), SENDER) for number in numbers]
    order = answer_order(*parts)
    await site.order(SENDER, *(order_for(part, order, RECEIVER) for part in parts))
    return await site.answer(RECEIVER, order)


async def the_one_end(site: Site, order: AnswerOrder, state: str) -> AnswerOutcome:
    """The question's only outcome, with all work ended."""
    await site.until(lambda: site.answered(order.request))
    await site.stop()
    outcomes = site.answered(order.request)
    assert [outcome.state for outcome in outcomes] == [state]
    assert "\n" not in outcomes[0].reason
    return outcomes[0]


async def test_an_answer_streams_and_then_ends_once(site: Site) -> None:
    order = of_its_own(site)
    await site.order(RECEIVER, order)
    outcome = await the_one_end(site, order, "answered")
    pieces = [piece for piece in site.pieces if piece.request == order.request]
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    assert "".join(piece.text for piece in pieces).strip() == outcome.answer
    assert 0 < outcome.answer_tokens <= order.max_new_tokens
    assert sum(len(piece.token_ids) for piece in pieces) in {outcome.answer_tokens, outcome.answer_tokens + 1}
    assert {piece.agent for piece in pieces} == {outcome.agent} == {RECEIVER}
    assert 0 < outcome.question_s < outcome.first_token_s <= outcome.total_s
    assert outcome.context_tokens == len(held(site).ids)


async def test_the_answer_is_the_one_of_the_model_alone(site: Site) -> None:
    engine = receiver(site).engine
    outcome = await site.answer(RECEIVER, order := of_its_own(site, max_new_tokens=12))
    live = engine.after_prefix()
    live.prefill(held(site).ids)
    logits = live.prefill(engine.text.question_ids(order.question))
    said = [so_far async for _, _, so_far in engine.generate(live, logits, max_new_tokens=12)]
    assert outcome.answer == said[-1].answer
    assert outcome.answer


async def from_the_payload(site: Site, *numbers: int, rung: str, facts_tokens: int = 0) -> tuple[AnswerOutcome, str]:
    """The outcome of a question whose caches come at a rung, with facts; and what the model alone says to the same."""
    parts = [part_of(held(site, number), SENDER, rung=rung) for number in numbers]
    order = answer_order(*parts, max_new_tokens=12)
    await site.order(SENDER, *(order_for(part, order, RECEIVER, facts_tokens=facts_tokens) for part in parts))
    outcome = await site.answer(RECEIVER, order)
    engine, model = receiver(site).engine, receiver(site).engine.model
    live, told = engine.after_prefix(), []
    for number in numbers:
        cache = kept(site.agents[SENDER].store, held(site, number).context_id)
        assert cache is not None
        header, back = relay.received(model, relay.sent(model, cache, recipe(rung)))
        live.append(back, tokens=header.tokens)
        facts = Extractor(spacy_model=None).extract((NORTH, SOUTH)[number])
        told.append(within(facts, facts_tokens, lambda line: len(engine.text.facts_ids(line))))
    asked = [*engine.text.facts_ids(summary(merged(told))), *engine.text.question_ids(order.question)]
    logits = live.prefill(asked)
    said = [so_far async for _, _, so_far in engine.generate(live, logits, max_new_tokens=12)]
    return outcome, said[-1].answer


async def test_a_receiver_attends_to_nothing_in_layers_that_were_not_sent(site: Site) -> None:
    outcome, alone = await from_the_payload(site, 0, 1, rung="fp16-l50")
    assert outcome.state == "answered", outcome.reason
    assert outcome.answer == alone
    assert outcome.context_tokens == len(held(site, 0).ids) + len(held(site, 1).ids)
    assert [part.fallback for part in outcome.parts] == ["", ""]


async def test_facts_stand_between_the_contexts_and_the_question(site: Site) -> None:
    outcome, alone = await from_the_payload(site, 0, 1, rung="float32", facts_tokens=24)
    assert outcome.answer == alone
    without, _ = await from_the_payload(site, 0, 1, rung="float32")
    assert outcome.answer != without.answer


async def test_facts_that_do_not_fit_the_window_are_left_out(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    fact = Fact(type="keyword", content="x " * 127 + "x", confidence=1, start=0, end=1)
    expected = (await from_the_payload(site, 0, rung="float32"))[0].answer
    monkeypatch.setattr(ContextFacts, "of", AsyncMock(return_value=(fact,) * MAX_FACTS))
    part = part_of(held(site), SENDER)
    order = answer_order(part, max_new_tokens=12)
    await site.order(SENDER, order_for(part, order, RECEIVER, facts_tokens=1))
    monkeypatch.setattr("edge_agent.answering.merged", lambda parts: [fact for each in parts for fact in each])
    outcome = await site.answer(RECEIVER, order)
    assert (outcome.state, outcome.answer) == ("answered", expected)


async def test_contexts_stand_in_the_order_of_the_request(site: Site) -> None:
    forward, backward, again = await asked(site, 0, 1), await asked(site, 1, 0), await asked(site, 0, 1)
    assert forward.state == backward.state == "answered"
    assert forward.answer == again.answer != backward.answer
    assert forward.context_tokens == backward.context_tokens == len(held(site, 0).ids) + len(held(site, 1).ids)
    assert [part.state for part in forward.parts] == ["delivered"] * 2


async def test_parts_may_come_in_any_order(site: Site) -> None:
    expected = (await asked(site, 0, 1)).answer
    parts = [part_of(held(site, number), SENDER) for number in (0, 1)]
    order = answer_order(*parts)
    await site.order(RECEIVER, order)
    late, early = (order_for(part, order, RECEIVER) for part in parts)
    await site.order(SENDER, early)
    await site.send_outcome(early)
    await site.order(SENDER, late)
    await site.until(lambda: site.answered(order.request))
    assert site.answered(order.request)[0].answer == expected


async def test_one_context_twice_is_allowed(site: Site) -> None:
    outcome = await site.answer(RECEIVER, answer_order(part_of(held(site), RECEIVER), part_of(held(site), RECEIVER)))
    assert outcome.state == "answered", outcome.reason
    assert outcome.context_tokens == 2 * len(held(site).ids)


async def test_an_order_that_comes_twice_is_answered_once(site: Site) -> None:
    order = of_its_own(site)
    await site.order(RECEIVER, order, order)
    await site.until(lambda: site.answered(order.request))
    await site.order(RECEIVER, order)
    await the_one_end(site, order, "answered")
    assert [piece.index for piece in site.pieces] == list(range(len(site.pieces)))


@pytest.mark.parametrize(
    ("question", "line"),
    [
        (" \t ", "the question is empty"),
        ("Which valve? " * 300, "tokens do not fit the model's window of 1024; shorten or split the context"),
    ],
)
async def test_a_question_that_cannot_be_read_fails_in_one_line(site: Site, question: str, line: str) -> None:
    order = of_its_own(site, question=question)
    await site.order(RECEIVER, order)
    assert line in (await the_one_end(site, order, "failed")).reason


async def test_contexts_that_do_not_fit_together_are_refused_before_anything_is_sent(site: Site) -> None:
    parts = [part_of(held(site), SENDER, tokens=400) for _ in range(3)]
    order = answer_order(*parts)
    await site.order(RECEIVER, order)
    assert "do not fit the model's window" in (await the_one_end(site, order, "failed")).reason


async def test_more_tokens_than_were_announced_do_not_break_the_window(site: Site) -> None:
    parts = [part_of(held(site), RECEIVER, tokens=1) for _ in range(20)]
    order = answer_order(*parts)
    await site.order(RECEIVER, order)
    assert "do not fit the model's window" in (await the_one_end(site, order, "failed")).reason


async def test_a_question_that_waits_for_its_part_can_be_cancelled(site: Site) -> None:
    order = answer_order(part_of(held(site), SENDER))  # nobody is told to send it
    await site.order(RECEIVER, order, CancelOrder(request=order.request))
    assert (await the_one_end(site, order, "cancelled")).reason == "cancelled by order"


async def test_a_question_that_waits_for_its_turn_can_be_cancelled_and_the_next_goes_on(site: Site) -> None:
    doomed, heir = of_its_own(site), of_its_own(site)
    agent = receiver(site)
    async with agent.engine.turns.turn("holder"):
        await site.order(RECEIVER, doomed, heir)
        await queued(agent.engine, 2)
        await site.order(RECEIVER, CancelOrder(request=doomed.request))
        await site.until(lambda: site.answered(doomed.request))
    assert site.answered(doomed.request)[0].state == "cancelled"
    await the_one_end(site, heir, "answered")


async def test_a_question_can_be_cancelled_while_it_is_answered(site: Site) -> None:
    order = of_its_own(site, question="Where?", max_new_tokens=500)
    agent = receiver(site)
    talking = asyncio.Event()
    real = agent.engine.generate

    async def endless(*arguments: object, **more: object) -> AsyncIterator[object]:
        async for each in real(*arguments, **more):  # type: ignore[arg-type]
            yield each
        talking.set()
        await asyncio.Event().wait()

    agent.engine.generate = endless  # type: ignore[method-assign, assignment]
    await site.order(RECEIVER, order)
    await talking.wait()
    await site.order(RECEIVER, CancelOrder(request=order.request))
    await site.until(lambda: site.answered(order.request))
    agent.engine.generate = real  # type: ignore[method-assign]
    assert (await site.answer(RECEIVER, of_its_own(site))).state == "answered"  # the turn came back
    outcome = await the_one_end(site, order, "cancelled")
    assert outcome.answer_tokens > 0


async def test_a_cancel_in_the_same_breath_as_its_order_still_gives_an_outcome(site: Site) -> None:
    order = of_its_own(site)
    agent = receiver(site)
    agent._order(order, {})
    agent._order(CancelOrder(request=order.request), {})
    await the_one_end(site, order, "cancelled")


async def test_cancelling_one_question_leaves_the_others(site: Site) -> None:
    orders = [of_its_own(site) for _ in range(3)]
    agent = receiver(site)
    async with agent.engine.turns.turn("holder"):
        await site.order(RECEIVER, *orders)
        await queued(agent.engine, 3)
        await site.order(RECEIVER, CancelOrder(request=orders[1].request), CancelOrder(request="0" * 16))
        await site.until(lambda: site.answered(orders[1].request))
    await site.until(lambda: all(site.answered(order.request) for order in orders))
    assert [site.answered(order.request)[0].state for order in orders] == ["answered", "cancelled", "answered"]


@pytest.mark.parametrize("expires_s", [0.0, 0.2])
async def test_a_question_that_takes_too_long_expires(site: Site, expires_s: float) -> None:
    order = answer_order(part_of(held(site), SENDER), expires_s=expires_s)
    await site.order(RECEIVER, order)
    assert (await the_one_end(site, order, "expired")).reason == f"not answered within {expires_s:g} s"


async def test_a_question_that_waits_too_long_for_its_turn_expires(site: Site) -> None:
    order = of_its_own(site, expires_s=0.2)
    async with receiver(site).engine.turns.turn("holder"):
        await site.order(RECEIVER, order)
        await site.until(lambda: site.answered(order.request))
    await the_one_end(site, order, "expired")


async def test_an_agent_that_stops_ends_its_questions_cancelled(site: Site) -> None:
    order = answer_order(part_of(held(site), SENDER))
    await site.order(RECEIVER, order)
    await site.until(lambda: site.broker.delivered.get(topics.ORDERS.pattern, 0) > 0)
    await site.stop(RECEIVER)
    assert [outcome.state for outcome in site.answered(order.request)] == ["cancelled"]


async def test_one_asker_with_many_questions_delays_another_by_one(site: Site) -> None:
    many = [of_its_own(site, asker="greedy") for _ in range(4)]
    one = of_its_own(site, asker="modest")
    agent = receiver(site)
    async with agent.engine.turns.turn("holder"):
        await site.order(RECEIVER, *many)
        await queued(agent.engine, 4)
        await site.order(RECEIVER, one)
        await queued(agent.engine, 5)
    orders = [*many, one]
    await site.until(lambda: all(site.answered(order.request) for order in orders))
    ended = [each for each in site.said if isinstance(each, AnswerOutcome)]
    assert [each.request for each in ended] == [order.request for order in (many[0], one, *many[1:])]
    assert {each.state for each in ended} == {"answered"}
    assert len({each.answer for each in ended}) == 1


async def test_the_model_is_free_again_while_the_last_pieces_are_published(site: Site) -> None:
    first, second = of_its_own(site), of_its_own(site)
    agent = receiver(site)
    release = asyncio.Event()
    held_back = _HeldBack(agent._answering._control, first.request, release)
    agent._answering._control = held_back  # type: ignore[assignment]
    await site.order(RECEIVER, first)
    await held_back.reached.wait()
    await site.order(RECEIVER, second)
    await site.until(lambda: site.answered(second.request))
    assert not site.answered(first.request)
    release.set()
    await site.until(lambda: site.answered(first.request))
    assert site.answered(first.request)[0].state == "answered"


class _HeldBack:
    """A bus that holds one question's pieces back until it is released, as a slow link would."""

    def __init__(self, bus: object, request: str, release: asyncio.Event) -> None:
        self._bus, self._request, self._release = bus, request, release
        self.reached = asyncio.Event()

    async def publish(self, topic: object, message: object, **parameters: str) -> None:
        if isinstance(message, AnswerPiece) and message.request == self._request:
            self.reached.set()
            await self._release.wait()
        await self._bus.publish(topic, message, **parameters)  # type: ignore[attr-defined]


async def test_pieces_that_cannot_be_published_do_not_lose_the_answer(site: Site) -> None:
    site.broker.trouble = {topics.ANSWERS.pattern: Trouble(lost=1.0)}
    order = of_its_own(site)
    await site.order(RECEIVER, order)
    assert (await the_one_end(site, order, "answered")).answer
    assert site.pieces == []
