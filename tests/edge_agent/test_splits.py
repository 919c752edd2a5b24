"""Agents that split a context: both ends go on until they meet, and the answer is that of plain text.

The tiny model computes far faster than these links bring anything. Where a receiver is to be slow, its model is held.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker_config.messages import (
    Abort,
    AnswerOrder,
    AnswerOutcome,
    CancelOrder,
    Chunk,
    PaceOrder,
    Part,
    RateStep,
    SendOrder,
    SendOutcome,
    TextRequest,
    new_id,
)
from broker_config.transfer import Inbox
from edge_agent.kv.header import Header
from edge_agent.kv.payload import encode
from edge_agent.kv.reader import PayloadReader
from edge_agent.kv.recipe import recipe
from edge_agent.memory import Held
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
    send_order,
)
from tests.edge_agent.test_parts import FORGER, forge

SENDER, RECEIVER = "pi-1", "jetson-1"
LONG, OTHER = " ".join([NORTH, SOUTH] * 3), " ".join([SOUTH, NORTH] * 2)
SLOW_BPS = 400_000.0
"""One slice takes a second."""
DECODING_S = 0.3
"""What has arrived is decoded by then."""


@pytest.fixture
async def site(tiny_bundle: Path) -> AsyncIterator[Site]:
    """pi-1 holds two texts of some slices each and their caches; jetson-1 asks. Nobody else has any text."""
    async with running_site() as started:
        await started.start(SENDER, tiny_bundle, LONG, OTHER)
        await started.start(RECEIVER, tiny_bundle)
        yield started


def held(site: Site, number: int = 0) -> Held:
    found = site.agents[SENDER].store.by_name(f"text-{number}")
    assert found is not None
    return found


def receiver(site: Site) -> MemoryAgent:
    return site.agents[RECEIVER]


def without_cache(site: Site, number: int = 0) -> Held:
    """A context that pi-1 holds as text alone."""
    store, before = site.agents[SENDER].store, held(site, number)
    store.remove(before.name)
    return store.add(before.name, before.context_id, before.ids)


def split(context: Held, own: int, **changes: object) -> Part:
    return part_of(context, SENDER, own_tokens=own, meet=True, text_holders=("coordinator", SENDER), **changes)


async def begun(site: Site, order: AnswerOrder, **changes: object) -> list[SendOrder]:
    """Order both ends; the senders' orders."""
    sends = [order_for(part, order, RECEIVER, meet=part.meet, **changes) for part in order.parts]
    await site.order(RECEIVER, order)
    await site.order(SENDER, *sends)
    return sends


async def ended(site: Site, order: AnswerOrder) -> AnswerOutcome:
    await site.until(lambda: site.answered(order.request))
    (outcome,) = site.answered(order.request)
    assert not any(isinstance(said, TextRequest) for said in site.said)
    return outcome


async def expected_answer(site: Site, *contexts: Held) -> str:
    """What the receiver answers from the texts alone."""
    order = answer_order(*(part_of(context, SENDER, own_tokens=len(context.ids)) for context in contexts))
    await begun(site, order)
    outcome = await ended(site, order)
    assert outcome.state == "answered", outcome.reason
    assert [part.own_tokens for part in outcome.parts] == [len(context.ids) for context in contexts]
    return outcome.answer


async def everything_ended(site: Site, *sends: SendOrder) -> list[SendOutcome]:
    """Each transfer's one outcome, with nothing left at the receiver."""
    outcomes = [await site.send_outcome(send) for send in sends]
    assert receiver(site).inbox_bytes == 0
    assert all(len(site.sent(send.transfer)) == 1 for send in sends)
    return outcomes


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.4, 0.99, 1.0])
async def test_wherever_it_was_planned_the_answer_is_that_of_plain_text(
    site: Site, share: float, *, cached: bool
) -> None:
    context = held(site)
    expected = await expected_answer(site, context)
    assert expected
    if not cached:
        context = without_cache(site)
    order = answer_order(split(context, int(share * len(context.ids))))
    sends = await begun(site, order)
    outcome = await ended(site, order)
    assert (outcome.state, outcome.answer) == ("answered", expected), outcome.reason
    (part,) = outcome.parts
    assert (part.state, part.fallback, part.reason) == ("delivered", "", "")
    assert 0 <= part.own_tokens <= len(context.ids) == outcome.context_tokens
    (sent,) = await everything_ended(site, *sends)
    assert sent.state == "delivered"


async def test_the_last_slices_go_first_down_to_the_first_token(site: Site) -> None:
    context = held(site)
    order = send_order(context, "pi-7", own_tokens=130, meet=True, rung="fp16")
    async with Inbox(bulk=site.broker.bus(), control=site.broker.bus(), agent="pi-7") as inbox:
        incoming = inbox.expect(order.transfer)
        await site.order(SENDER, order)
        payload = await incoming.payload(20)
    reader = PayloadReader(receiver(site).engine.expectation(1 << 30))
    seen, at = [], 0
    while at < len(payload):
        reader.feed(payload[at : at + 100])
        at += 100
        seen += [start for start, _ in reader.take()]
    assert reader.complete
    assert reader.header is not None
    assert (reader.header.own_tokens, reader.header.slice_tokens) == (0, 64)
    assert seen == list(range(0, len(context.ids), 64))[::-1]
    assert (await site.send_outcome(order)).state == "delivered"


async def test_a_slow_link_makes_the_receiver_compute_more_than_planned_and_both_ends_are_done_at_once(
    site: Site,
) -> None:
    context = held(site)
    expected = await expected_answer(site, context)
    order = answer_order(split(context, 64))
    (send,) = await begun(site, order, rate_bps=SLOW_BPS)  # five seconds for all of it
    outcome = await ended(site, order)
    assert (outcome.state, outcome.answer) == ("answered", expected), outcome.reason
    (part,) = outcome.parts
    assert (part.state, part.fallback) == ("delivered", "")
    assert part.own_tokens > 64
    (sent,) = await everything_ended(site, send)
    assert sent.state == "delivered"
    whole = 768 * len(context.ids)
    assert sent.payload_bytes < whole / 2
    assert outcome.first_token_s < 3


async def test_a_fast_link_makes_the_receiver_compute_less_than_planned(site: Site) -> None:
    context = held(site)
    expected = await expected_answer(site, context)
    order = answer_order(split(context, 200))
    async with receiver(site).engine.turns.turn("holder"):
        (send,) = await begun(site, order)
        await site.send_outcome(send)
        await asyncio.sleep(DECODING_S)
    outcome = await ended(site, order)
    assert (outcome.state, outcome.answer) == ("answered", expected), outcome.reason
    assert outcome.parts[0].own_tokens == 0
    assert outcome.parts[0].prefill_s == 0
    (sent,) = await everything_ended(site, send)
    assert sent.payload_bytes > 768 * len(context.ids)


async def test_a_link_that_is_cut_in_the_middle_costs_no_more_than_the_rest_and_no_text_holder_is_asked(
    site: Site,
) -> None:
    context = held(site)
    expected = await expected_answer(site, context)
    order = answer_order(part_of(context, SENDER, own_tokens=64, text_holders=("coordinator",)), part_timeout_s=1.5)
    (send,) = await begun(site, order, rate_bps=SLOW_BPS)
    outcome = await ended(site, order)
    assert (outcome.state, outcome.answer) == ("answered", expected), outcome.reason
    (part,) = outcome.parts
    assert (part.state, part.fallback) == ("expired", "ids")
    assert part.reason.endswith("not complete within 1.5 s")
    assert 64 < part.own_tokens <= len(context.ids)
    assert part.waited_s > 0.5
    assert 1.5 <= outcome.first_token_s < 3
    (sent,) = await everything_ended(site, send)
    assert sent.state == "expired"


@pytest.mark.parametrize("meet", [True, False])
async def test_a_sender_that_gives_up_after_its_header_is_replaced_at_once(site: Site, *, meet: bool) -> None:
    context = held(site)
    expected = await expected_answer(site, context)
    order = answer_order(part_of(context, SENDER, meet=meet, text_holders=("coordinator",)))
    sends = [order_for(part, order, RECEIVER, meet=meet, rate_bps=SLOW_BPS) for part in order.parts]
    async with receiver(site).engine.turns.turn("holder"):
        await site.order(RECEIVER, order)
        await site.order(SENDER, *sends)
        await site.until(lambda: any(isinstance(message, Chunk) for message in site.bulk))
        await asyncio.sleep(DECODING_S)
        await site.order(SENDER, CancelOrder(request=order.request))
        await site.send_outcome(sends[0])
        await site.until(lambda: any(isinstance(message, Abort) for message in site.bulk))
    outcome = await ended(site, order)
    assert (outcome.state, outcome.answer) == ("answered", expected), outcome.reason
    (part,) = outcome.parts
    assert (part.state, part.fallback) == ("cancelled", "ids")
    assert outcome.first_token_s < 5


async def test_an_uncached_senders_first_slice_leaves_before_its_prefill_ends(site: Site) -> None:
    context = without_cache(site)
    sender = site.agents[SENDER]
    order = send_order(context, "pi-7", meet=True)
    reader = PayloadReader(receiver(site).engine.expectation(1 << 30))
    async with Inbox(bulk=site.broker.bus(), control=site.broker.bus(), agent="pi-7") as inbox:
        incoming = inbox.expect(order.transfer)
        pieces = incoming.pieces()
        async with sender.engine.turns.turn("holder"):
            await site.order(SENDER, order)
            reader.feed(await anext(pieces))  # while nothing is computed
            assert reader.header is not None
            assert tuple(reader.header.ids()) == context.ids
            await queued(sender.engine, 1)
            blocked = asyncio.create_task(_held_from_second_chunk(sender))
            await queued(sender.engine, 2)
        while not reader.slices:
            reader.feed(await anext(pieces))
        assert kept(sender.store, context.context_id) is None
        assert min(reader.slices) <= 64
        blocked.cancel()
        async for piece in pieces:
            reader.feed(piece)
    assert reader.complete
    outcome = await site.send_outcome(order)
    assert (outcome.state, outcome.prefill_s > 0) == ("delivered", True)


async def _held_from_second_chunk(agent: MemoryAgent) -> None:
    """Hold the model, once the first chunk of the one that waits is computed."""
    async with agent.engine.turns.turn("holder"):
        await asyncio.Event().wait()


async def test_what_a_sender_has_begun_to_compute_it_keeps_although_the_receiver_had_enough(site: Site) -> None:
    context = without_cache(site)
    sender = site.agents[SENDER]
    order = send_order(context, "pi-7", meet=True)
    async with Inbox(bulk=site.broker.bus(), control=site.broker.bus(), agent="pi-7") as inbox:
        incoming = inbox.expect(order.transfer)
        async with sender.engine.turns.turn("holder"):
            await site.order(SENDER, order)
            async for _ in incoming.pieces():
                await queued(sender.engine, 1)
                await incoming.has_enough()
            outcome = await site.send_outcome(order)
            assert outcome.state == "delivered"
            assert outcome.payload_bytes < 3_000
    async with asyncio.timeout(10):
        while kept(sender.store, context.context_id) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await site.stop()
    assert len(site.sent(order.transfer)) == 1


@pytest.mark.parametrize("number", [1, 3])
async def test_a_slice_that_is_broken_ends_the_transfer_and_the_rest_is_computed(site: Site, number: int) -> None:
    context = held(site)
    expected = await expected_answer(site, context)
    sender = site.agents[SENDER]
    cache = kept(sender.store, context.context_id)
    shelf = sender.store.shelf
    header: Header = shelf.header(recipe("float32"), context.context_id, context.ids, own_tokens=0, slice_tokens=64)
    pieces = list(encode(header, cache, last_first=True))
    pieces[number] = pieces[number][:-20] + bytes([pieces[number][-20] ^ 1]) + pieces[number][-19:]
    part = part_of(context, FORGER, own_tokens=64, meet=True, text_holders=("coordinator",))
    order = answer_order(part)
    async with receiver(site).engine.turns.turn("holder"):
        await site.order(RECEIVER, order)
        end = await forge(site, part.transfer, b"".join(pieces))
        await asyncio.sleep(DECODING_S)
    outcome = await ended(site, order)
    assert end in {"refused: payload refused, digest: a record is corrupt", "delivered"}  # it may be all there already
    assert (outcome.state, outcome.answer) == ("answered", expected), outcome.reason
    (part_outcome,) = outcome.parts
    assert (part_outcome.state, part_outcome.fallback) == ("refused", "ids")
    last = len(context.ids) % 64 or 64
    assert part_outcome.own_tokens == len(context.ids) - (0 if number == 1 else last + 64)


async def test_a_pace_order_changes_a_transfer_that_runs(site: Site) -> None:
    context = held(site)
    order = answer_order(part_of(context, SENDER))
    (send,) = await begun(site, order, rate_bps=1_000.0)  # minutes for one chunk
    await site.until(lambda: any(isinstance(message, Chunk) for message in site.bulk))
    pace = PaceOrder(request=order.request, transfer=send.transfer, rate_bps=2_000.0, later_rates=())
    await site.order(SENDER, pace)
    await asyncio.sleep(0.2)
    assert not site.answered(order.request)
    steps = (RateStep(after_s=0.2, rate_bps=1e9),)
    await site.order(
        SENDER, PaceOrder(request=order.request, transfer=send.transfer, rate_bps=2_000.0, later_rates=steps)
    )
    outcome = await ended(site, order)
    assert outcome.state == "answered"
    assert outcome.parts[0].own_tokens == 0
    assert (await everything_ended(site, send))[0].state == "delivered"


async def test_an_orders_later_rates_are_kept(site: Site) -> None:
    order = answer_order(part_of(held(site), SENDER))
    (send,) = await begun(site, order, rate_bps=1_000.0, later_rates=(RateStep(after_s=0.5, rate_bps=1e9),))
    outcome = await ended(site, order)
    assert outcome.state == "answered"
    assert 0.4 < (await site.send_outcome(send)).transfer_s < 5


async def test_the_pace_of_what_is_not_under_way_is_nobodys(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    await site.order(SENDER, PaceOrder(request=new_id(), transfer=new_id(), rate_bps=1e6))
    order = answer_order(part_of(held(site), SENDER))
    (send,) = await begun(site, order)
    await ended(site, order)
    await site.send_outcome(send)
    await site.order(SENDER, PaceOrder(request=order.request, transfer=send.transfer, rate_bps=1e6))
    async with asyncio.timeout(5):
        while caplog.text.count("is not under way") < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("cached", [True, False])
async def test_two_parts_with_planned_prefixes_answer_like_their_texts(site: Site, *, cached: bool) -> None:
    contexts = [held(site, 0), held(site, 1)]
    expected = await expected_answer(site, *contexts)
    if not cached:
        contexts = [without_cache(site, 0), without_cache(site, 1)]
    order = answer_order(*(split(context, own) for context, own in zip(contexts, (130, 40), strict=True)))
    sends = await begun(site, order, rate_bps=4 * SLOW_BPS)
    outcome = await ended(site, order)
    assert (outcome.state, outcome.answer) == ("answered", expected), outcome.reason
    assert all((part.state, part.fallback) == ("delivered", "") for part in outcome.parts)
    assert {sent.state for sent in await everything_ended(site, *sends)} == {"delivered"}


@pytest.mark.parametrize("cached", [True, False])
async def test_a_cancel_in_the_middle_leaves_nothing_behind(site: Site, *, cached: bool) -> None:
    context = held(site) if cached else without_cache(site)
    order = answer_order(split(context, 64), part_of(held(site, 1), SENDER, own_tokens=0))
    async with receiver(site).engine.turns.turn("holder"):
        sends = await begun(site, order, rate_bps=SLOW_BPS / 4)
        await site.until(lambda: sum(isinstance(message, Chunk) for message in site.bulk) > 2)
        for agent in (RECEIVER, SENDER):
            await site.order(agent, CancelOrder(request=order.request))
        assert (await ended(site, order)).state == "cancelled"
    assert {sent.state for sent in await everything_ended(site, *sends)} == {"cancelled"}
    assert receiver(site).engine.turns.waiting == 0
    assert site.agents[SENDER].engine.turns.waiting == 0
    assert await expected_answer(site, held(site, 1))


@pytest.mark.parametrize("rung", ["fp16-e50", "q8-l70", "q8-k70", "q8-whole"])
async def test_rungs_whose_slices_need_the_whole_cache_go_as_ever_when_a_meeting_is_ordered(
    site: Site, rung: str
) -> None:
    context = without_cache(site)
    order = answer_order(split(context, 64, rung=rung))
    (send,) = await begun(site, order)
    outcome = await ended(site, order)
    assert outcome.state == "answered", outcome.reason
    (part,) = outcome.parts
    assert (part.state, part.fallback) == ("delivered", "")
    assert part.own_tokens == 64 or rung == "q8-whole"
    assert (await everything_ended(site, send))[0].state == "delivered"


async def test_a_rung_that_needs_the_whole_cache_and_is_cut_is_computed_from_the_ids(site: Site) -> None:
    context = held(site)
    expected = await expected_answer(site, context)
    order = answer_order(part_of(context, SENDER, own_tokens=64, rung="fp16-e50"), part_timeout_s=0.5)
    await begun(site, order, rate_bps=SLOW_BPS / 4)
    outcome = await ended(site, order)
    assert (outcome.state, outcome.answer) == ("answered", expected), outcome.reason
    (part,) = outcome.parts
    assert (part.state, part.fallback, part.own_tokens) == ("expired", "ids", len(context.ids))
