"""Sending: every order ends in exactly one outcome, and the receiver hears of it at once."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from broker_config.errors import TransferCancelled, TransferError, TransferExpired
from broker_config.messages import Abort, CancelOrder, Open, PaceOrder, SendOrder
from broker_config.transfer import Inbox
from edge_agent.facts import summary
from edge_agent.kv.cache import Cache
from edge_agent.kv.payload import encode
from edge_agent.kv.reader import PayloadReader, decode
from edge_agent.kv.recipe import recipe
from edge_agent.memory import Budget, Held
from edge_agent.model.exchange import expectation, to_send
from tests import tiny
from tests.edge_agent.agents import NORTH, SOUTH, Site, kept, queued, running_site, send_order
from tests.edge_agent.caches import equal

RECEIVER = "jetson-1"
SLOW_BPS = 40_000.0
"""At this rate a chunk takes three seconds, a whole cache a minute."""


@pytest.fixture
async def site(tiny_bundle: Path) -> AsyncIterator[Site]:
    async with running_site() as started:
        await started.start("pi-1", tiny_bundle, NORTH, SOUTH)
        yield started


@pytest.fixture
async def inbox(site: Site) -> AsyncIterator[Inbox]:
    """The receiver's end."""
    async with Inbox(bulk=site.broker.bus(), control=site.broker.bus(), agent=RECEIVER) as opened:
        yield opened


def held(site: Site, name: str = "text-0") -> Held:
    found = site.agents["pi-1"].store.by_name(name)
    assert found is not None
    return found


def cached(site: Site, name: str = "text-0") -> Cache:
    cache = kept(site.agents["pi-1"].store, held(site, name).context_id)
    assert cache is not None
    return cache


async def the_one_end(site: Site, order: SendOrder, state: str) -> str:
    """The order's only outcome, with all work ended; its reason."""
    await site.send_outcome(order)
    await site.stop()
    outcomes = site.sent(order.transfer)
    assert [outcome.state for outcome in outcomes] == [state]
    assert outcomes[0].request == order.request
    assert "\n" not in outcomes[0].reason
    return outcomes[0].reason


@pytest.mark.parametrize("rung", ["float32", "fp16", "q8", "q3", "klt4"])
@pytest.mark.parametrize("own", [0, 7, None])
async def test_what_is_ordered_arrives_and_ends_once(site: Site, inbox: Inbox, rung: str, own: int | None) -> None:
    context = held(site)
    own_tokens = len(context.ids) if own is None else own
    order = send_order(context, RECEIVER, rung=rung, own_tokens=own_tokens)
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order)
    payload = await incoming.payload(20)
    header, cache = decode(payload, site.agents["pi-1"].engine.expectation(1 << 30))
    assert header.context_id == context.context_id
    assert (tuple(header.ids()), header.own_tokens) == (context.ids, own_tokens)
    if own is None:
        assert cache is None
    else:
        assert cache is not None
        assert cache.entries == len(context.ids) - own
        assert equal(cache, cached(site).between(own, len(context.ids))) == (rung == "float32")
    outcome = await site.send_outcome(order)
    assert outcome.payload_bytes == len(payload) < outcome.wire_bytes
    assert await the_one_end(site, order, "delivered") == ""


async def test_telemetry_tells_how_far_a_transfer_is_and_the_speed_of_its_family_is_learned(
    site: Site, inbox: Inbox
) -> None:
    agent = site.agents["pi-1"]
    before = {each.codec: each for each in agent.engine.meter.speed.codecs} if agent.engine.meter.speed else {}
    order = send_order(held(site), RECEIVER, rung="float32", rate_bps=SLOW_BPS)
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order)
    await site.until(lambda: any(each.moved_bytes for each in agent.link.progress))
    (progress,) = agent.link.progress
    assert (progress.transfer, progress.goodput_bps) == (order.transfer, None)  # too early to tell
    (flow,) = agent.link._outward
    await site.until(lambda: flow.rate_bps is not None)
    agent._outgoing.pace(PaceOrder(request=order.request, transfer=order.transfer, rate_bps=None))
    assert flow.rate_bps is None
    await incoming.payload(20)
    await site.send_outcome(order)
    assert agent.link.progress == ()
    assert agent.engine.meter.speed is not None
    after = {each.codec: each for each in agent.engine.meter.speed.codecs}
    assert after["float"].encode_elements_per_s != before["float"].encode_elements_per_s
    assert after["klt"] == before["klt"]


async def test_the_papers_recipe_sends_its_layers_at_its_widths(site: Site, inbox: Inbox) -> None:
    context, rung = held(site), recipe("qkvcomm-6")
    manifest = site.agents["pi-1"].engine.model.manifest
    layout = rung.layout(tiny.LAYERS, manifest.profile, cached(site))
    order = send_order(context, RECEIVER, rung=rung.name)
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order)
    header, cache = decode(await incoming.payload(20), expectation(manifest, 1 << 30))
    assert (header.shape.sent_layers, header.widths) == (layout.layers, layout.widths)
    assert len(layout.layers) == 2
    assert cache is not None
    for index, layer in enumerate(cache.layers):
        assert layer.entries == (len(context.ids) if index in layout.layers else 0)
    assert await the_one_end(site, order, "delivered") == ""


@pytest.mark.parametrize("own", [0, 7])
async def test_facts_go_beside_a_cache_within_their_budget(site: Site, inbox: Inbox, own: int) -> None:
    text = site.agents["pi-1"].engine.text
    order = send_order(held(site), RECEIVER, facts_tokens=40, own_tokens=own)
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order)
    payload = await incoming.payload(20)
    facts = decode(payload, site.agents["pi-1"].engine.expectation(1 << 30))[0].facts
    assert facts
    assert len(text.facts_ids(summary(facts))) <= 40
    assert all(" ".join(NORTH[fact.start : fact.end].split()) == fact.content for fact in facts)
    assert (await site.send_outcome(order)).payload_bytes == len(payload)


async def test_no_facts_go_beside_a_text(site: Site, inbox: Inbox) -> None:
    context = held(site)
    order = send_order(context, RECEIVER, facts_tokens=40, own_tokens=len(context.ids))
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order)
    payload = await incoming.payload(20)
    assert not decode(payload, site.agents["pi-1"].engine.expectation(1 << 30))[0].facts


async def test_a_cache_that_is_not_in_memory_is_made_again(site: Site, inbox: Inbox) -> None:
    context, before = held(site), cached(site)
    store = site.agents["pi-1"].store
    store.remove(context.name)
    again = store.add(context.name, context.context_id, context.ids)
    assert kept(store, again.context_id) is None
    order = send_order(again, RECEIVER)
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order)
    cache = decode(await incoming.payload(20), site.agents["pi-1"].engine.expectation(1 << 30))[1]
    assert cache is not None
    assert equal(cache, before)
    assert (await site.send_outcome(order)).prefill_s > 0
    await store.settled()
    assert kept(store, again.context_id) is not None


async def tightened(site: Site) -> str:
    """Have pi-1 keep its caches as tight as it may; the rung at which they then are."""
    store = site.agents["pi-1"].store
    budget, store._budget = store._budget, Budget(limit_bytes=int(0.3 * store.cache_bytes))
    await store.relieve()
    store._budget = budget
    rung = store.rung(held(site).context_id)
    assert rung == store.shelf.rungs[-1] != "float32"
    return rung


@pytest.mark.parametrize("coarser", [0, 2])
@pytest.mark.parametrize("own", [0, 7])
async def test_a_tightened_cache_is_sent_as_it_is_kept(site: Site, inbox: Inbox, coarser: int, own: int) -> None:
    context, before = held(site), cached(site)
    before_speed = site.agents["pi-1"].engine.meter.speed
    level = recipe(await tightened(site)).level
    assert level is not None
    order = send_order(context, RECEIVER, rung=f"klt{level + coarser}", own_tokens=own)
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order)
    payload = await incoming.payload(20)
    engine = site.agents["pi-1"].engine
    sent = to_send(
        engine.model.manifest, context.context_id, context.ids, before, own_tokens=own, rung=recipe(order.rung)
    )
    assert payload == b"".join(encode(*sent, engine.model.transform))  # the bytes that floats would have given
    assert (await site.send_outcome(order)).prefill_s == 0
    assert site.agents["pi-1"].engine.meter.speed == before_speed  # nothing was coded


@pytest.mark.parametrize("coarser", [0, 2])
async def test_for_a_meeting_a_tightened_cache_goes_last_slice_first(site: Site, inbox: Inbox, coarser: int) -> None:
    context, before = held(site), cached(site)
    level = recipe(await tightened(site)).level
    assert level is not None
    order = send_order(context, RECEIVER, rung=f"klt{level + coarser}", own_tokens=7, meet=True)
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order)
    payload = await incoming.payload(20)
    engine = site.agents["pi-1"].engine
    header, sent = to_send(
        engine.model.manifest, context.context_id, context.ids, before, own_tokens=0, rung=recipe(order.rung)
    )
    as_kept = coarser == 0  # then its slices are those of the shelf
    header = msgspec.structs.replace(header, slice_tokens=header.slice_tokens if as_kept else 64)
    assert payload == b"".join(encode(header, sent, engine.model.transform, last_first=True))
    assert (await site.send_outcome(order)).prefill_s == 0


async def test_the_header_goes_before_anything_is_computed(site: Site, inbox: Inbox) -> None:
    context, agent = held(site), site.agents["pi-1"]
    agent.store.remove(context.name)
    agent.store.add(context.name, context.context_id, context.ids)
    order = send_order(context, RECEIVER, own_tokens=7)
    incoming = inbox.expect(order.transfer)
    reader = PayloadReader(agent.engine.expectation(1 << 30))
    async with agent.engine.turns.turn("holder"):
        await site.order("pi-1", order)
        reader.feed(await anext(incoming.pieces()))
        assert reader.header is not None
        assert (tuple(reader.header.ids()), reader.header.own_tokens) == (context.ids, 7)
    assert (await site.send_outcome(order)).state == "delivered"


@pytest.mark.parametrize("rung", ["float32", "q8", "klt1", "qkvcomm-6"])
async def test_a_better_rung_than_a_cache_is_kept_at_is_computed_from_the_text(
    site: Site, inbox: Inbox, rung: str
) -> None:
    before = cached(site)
    await tightened(site)
    order = send_order(held(site), RECEIVER, rung=rung)
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order)
    cache = decode(await incoming.payload(20), site.agents["pi-1"].engine.expectation(1 << 30))[1]
    assert cache is not None
    assert (await site.send_outcome(order)).prefill_s > 0
    assert equal(cache, before) == (rung == "float32")
    await site.agents["pi-1"].store.settled()
    assert site.agents["pi-1"].store.rung(held(site).context_id) == "float32"


async def test_tokens_are_sent_without_making_a_cache(site: Site, inbox: Inbox) -> None:
    context = held(site)
    store = site.agents["pi-1"].store
    store.remove(context.name)
    store.add(context.name, context.context_id, context.ids)
    order = send_order(context, RECEIVER, own_tokens=len(context.ids))
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order)
    await incoming.payload(20)
    assert (await site.send_outcome(order)).prefill_s == 0
    assert kept(store, context.context_id) is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"context_id": "0" * 32}, f"context {'0' * 32} is not held here"),
        ({"rung": "q9"}, "9 bits"),
        ({"rung": "best"}, "unknown rung 'best'"),
        ({"own_tokens": 5_000}, "5000 leading tokens of a context of"),
    ],
)
async def test_an_order_that_cannot_be_carried_out_is_refused_and_the_receiver_hears_why(
    site: Site, inbox: Inbox, changes: dict[str, object], line: str
) -> None:
    order = send_order(held(site), RECEIVER, **changes)
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order)
    with pytest.raises(TransferCancelled, match=line):
        await incoming.payload(20)
    assert line in await the_one_end(site, order, "refused")


@pytest.mark.parametrize("rung", ["float32", "fp16", "q8", "klt4"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
async def test_a_cache_with_a_nan_is_refused_by_name_and_the_receiver_hears_at_once(
    site: Site, inbox: Inbox, rung: str, poison: float
) -> None:
    store, context = site.agents["pi-1"].store, held(site)
    layers = list(cached(site).layers)
    keys = layers[1].keys.copy()
    keys[0, -1, 0] = poison
    layers[1] = replace(layers[1], keys=keys)
    await store.put(context.context_id, Cache(tuple(layers)))
    order = send_order(context, RECEIVER, rung=rung)
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order)
    with pytest.raises(TransferCancelled):
        await incoming.payload(20)
    assert "NaN or an infinity" in await the_one_end(site, order, "refused")


async def test_a_receiver_that_refuses_ends_it_with_its_reason(site: Site, inbox: Inbox) -> None:
    order = send_order(held(site), RECEIVER, rate_bps=SLOW_BPS)
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order)
    await site.until(lambda: incoming.opened)
    await incoming.refuse("I have no use for it")
    assert await the_one_end(site, order, "refused") == "I have no use for it"


async def test_a_cancelled_order_ends_cancelled_at_both_ends(site: Site, inbox: Inbox) -> None:
    order = send_order(held(site), RECEIVER, rate_bps=SLOW_BPS)
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order)
    await site.until(lambda: incoming.opened)
    await site.order("pi-1", CancelOrder(request=order.request))
    with pytest.raises(TransferCancelled):
        await incoming.payload(20)
    assert await the_one_end(site, order, "cancelled") == "cancelled by order"


async def test_a_cancel_in_the_same_breath_as_its_order_still_gives_an_outcome(site: Site) -> None:
    order = send_order(held(site), RECEIVER)
    agent = site.agents["pi-1"]
    agent._order(order, {})
    agent._order(CancelOrder(request=order.request), {})
    await the_one_end(site, order, "cancelled")


async def test_a_cancel_before_the_first_chunk_is_heard_by_the_receiver(site: Site, inbox: Inbox) -> None:
    context = held(site)
    agent = site.agents["pi-1"]
    agent.store.remove(context.name)
    agent.store.add(context.name, context.context_id, context.ids)
    order = send_order(context, RECEIVER)
    incoming = inbox.expect(order.transfer)
    async with agent.engine.turns.turn("holder"):  # its prefill waits
        await site.order("pi-1", order)
        await queued(agent.engine, 1)
        await site.order("pi-1", CancelOrder(request=order.request))
        with pytest.raises(TransferCancelled):
            await incoming.payload(5)
    await the_one_end(site, order, "cancelled")


async def test_a_transfer_that_takes_too_long_ends_expired_at_both_ends(site: Site, inbox: Inbox) -> None:
    order = send_order(held(site), RECEIVER, rate_bps=SLOW_BPS, expires_s=0.3)
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order)
    with pytest.raises(TransferExpired):
        await incoming.payload(20)
    assert re.search(r"within 0\.\d+ s", await the_one_end(site, order, "expired"))


async def test_an_order_that_waits_too_long_for_its_turn_expires_at_both_ends(site: Site, inbox: Inbox) -> None:
    context = held(site)
    agent = site.agents["pi-1"]
    agent.store.remove(context.name)
    agent.store.add(context.name, context.context_id, context.ids)
    order = send_order(context, RECEIVER, expires_s=0.3)
    incoming = inbox.expect(order.transfer)
    async with agent.engine.turns.turn("holder"):
        await site.order("pi-1", order)
        with pytest.raises(TransferError) as caught:
            await incoming.payload(20)
    assert isinstance(caught.value, TransferExpired)
    assert re.search(r"within 0\.\d+ s", await the_one_end(site, order, "expired"))


async def test_a_receiver_that_is_not_there_ends_it_expired(site: Site) -> None:
    order = send_order(held(site), "nobody", expires_s=0.3)
    await site.order("pi-1", order)
    await the_one_end(site, order, "expired")
    assert [message.state for message in site.bulk if isinstance(message, Abort)][-1] == "expired"


async def test_an_order_that_comes_twice_is_carried_out_once(site: Site, inbox: Inbox) -> None:
    order = send_order(held(site), RECEIVER)
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order, order)
    await incoming.payload(20)
    await site.send_outcome(order)
    await site.order("pi-1", order)
    await the_one_end(site, order, "delivered")
    assert sum(isinstance(message, Open) for message in site.bulk) == 1


async def test_several_orders_at_once_all_arrive(site: Site, inbox: Inbox) -> None:
    orders = [
        send_order(held(site, name), RECEIVER, rung=rung) for name in ("text-0", "text-1") for rung in ("q8", "q4")
    ]
    incoming = [inbox.expect(order.transfer) for order in orders]
    await site.order("pi-1", *orders)
    payloads = await asyncio.gather(*(each.payload(20) for each in incoming))
    for order, payload in zip(orders, payloads, strict=True):
        header, _ = decode(payload, site.agents["pi-1"].engine.expectation(1 << 30))
        assert (header.context_id, header.rung) == (order.context_id, order.rung)
        assert (await site.send_outcome(order)).state == "delivered"


async def test_an_agent_that_stops_ends_what_it_was_sending(site: Site, inbox: Inbox) -> None:
    order = send_order(held(site), RECEIVER, rate_bps=SLOW_BPS)
    incoming = inbox.expect(order.transfer)
    await site.order("pi-1", order)
    await site.until(lambda: incoming.opened)
    await site.stop("pi-1")
    with pytest.raises(TransferCancelled):
        await incoming.payload(20)
    assert [outcome.state for outcome in site.sent(order.transfer)] == ["cancelled"]
