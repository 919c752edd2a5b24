"""Getting a part: by its transfer, or by its text when that fails; every failure is named, none is waited for longer
than it must be."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from broker_config.errors import TransferError
from broker_config.messages import AnswerOrder, AnswerOutcome, Part, SendOutcome, TextReply, TextRequest, new_id
from broker_config.transfer import send
from edge_agent.kv.cache import Cache
from edge_agent.kv.header import FORMAT_VERSION, Header, Shape
from edge_agent.kv.payload import encode
from edge_agent.kv.recipe import recipe
from edge_agent.memory import Held
from edge_agent.model.exchange import to_send
from tests.edge_agent.agents import (
    NORTH,
    SOUTH,
    Site,
    answer_order,
    kept,
    order_for,
    part_of,
    running_site,
)

RECEIVER = "jetson-1"
FORGER = "pi-9"
"""Nobody runs under this id: the tests send in its name."""

LONG_S = 15.0
"""So long a part may take in these tests; what is noticed at once takes a fraction of it."""


@pytest.fixture
async def site(tiny_bundle: Path) -> AsyncIterator[Site]:
    """pi-1 holds two texts, jetson-1 asks; the coordinator was given the first text."""
    async with running_site() as started:
        north, _ = await started.start("pi-1", tiny_bundle, NORTH, SOUTH)
        await started.start(RECEIVER, tiny_bundle)
        started.texts[north.context_id] = NORTH
        yield started


def held(site: Site, name: str = "text-0") -> Held:
    found = site.agents["pi-1"].store.by_name(name)
    assert found is not None
    return found


def cached(site: Site) -> Cache:
    cache = kept(site.agents["pi-1"].store, held(site).context_id)
    assert cache is not None
    return cache


def question(*parts: Part, **changes: object) -> AnswerOrder:
    return answer_order(*parts, part_timeout_s=LONG_S, **changes)


async def expected_answer(site: Site, *contexts: Held) -> str:
    """What the receiver answers when everything comes as it should."""
    parts = [part_of(context, "pi-1") for context in contexts]
    order = question(*parts)
    await site.order("pi-1", *(order_for(part, order, RECEIVER) for part in parts))
    outcome = await site.answer(RECEIVER, order)
    assert outcome.state == "answered", outcome.reason
    assert all(part.state == "delivered" and not part.fallback for part in outcome.parts)
    return outcome.answer


async def forge(site: Site, transfer: str, payload: bytes, rate_bps: float | None = None) -> str:
    """Send these bytes as a transfer; how it ended at the sender."""
    try:
        await send(
            bulk=site.broker.bus(),
            control=site.broker.bus(),
            sender=FORGER,
            receiver=RECEIVER,
            transfer=transfer,
            request=new_id(),
            pieces=[payload],
            total_bytes=len(payload),
            chunk_bytes=1_024,
            expires_s=LONG_S,
            rate_bps=rate_bps,
        )
    except TransferError as error:
        return f"{error.state}: {error.reason}"
    return "delivered"


async def forged(site: Site, payload: bytes, *holders: str, rate_bps: float | None = None) -> tuple[AnswerOutcome, str]:
    """A question whose only part is these bytes; its outcome, and the end of the transfer at its sender."""
    part = part_of(held(site), FORGER, text_holders=holders)
    order = question(part)
    await site.order(RECEIVER, order)
    end = await forge(site, part.transfer, payload, rate_bps)
    await site.until(lambda: site.answered(order.request))
    return site.answered(order.request)[0], end


def header(site: Site, rung: str = "float32", *, own: int = 0) -> Header:
    context, manifest = held(site), site.agents["pi-1"].engine.model.manifest
    return to_send(manifest, context.context_id, context.ids, cached(site), own_tokens=own, rung=recipe(rung))[0]


def payload(site: Site, **changes: object) -> bytes:
    """The right payload, but for what is changed in its header."""
    made = msgspec.structs.replace(header(site), **changes)
    return b"".join(encode(made, cached(site)))


def _flipped(site: Site) -> bytes:
    data = bytearray(payload(site))
    data[len(data) // 2] ^= 4
    return bytes(data)


def _cut(site: Site) -> bytes:
    return payload(site)[:-50]


def _noise(site: Site) -> bytes:
    return bytes(range(256)) * 20


def _other_version(site: Site) -> bytes:
    return payload(site, format_version=FORMAT_VERSION + 1)


def _other_context(site: Site) -> bytes:
    return payload(site, context_id=held(site, "text-1").context_id)


def _other_prefix(site: Site) -> bytes:
    return payload(site, prefix="e" * 32)


def _other_transform(site: Site) -> bytes:
    own = site.agents["pi-1"].engine.model.transform
    assert own is not None
    other = dataclasses.replace(own, mean=own.mean + 1)
    made = msgspec.structs.replace(header(site, "klt3"), transform=other.id)
    return b"".join(encode(made, cached(site), other))


def _no_layers(site: Site) -> bytes:
    shape = header(site).shape
    return payload(site, shape=msgspec.structs.replace(shape, sent_layers=()))


def _one_layer(site: Site) -> bytes:
    shape = header(site).shape
    return payload(site, shape=msgspec.structs.replace(shape, sent_layers=(0,)))


def _fewer_tokens(site: Site) -> bytes:
    fewer = header(site).token_ids[: -header(site).id_bytes]
    return payload(site, tokens=len(held(site).ids) - 1, token_ids=fewer)


def _nothing(site: Site) -> bytes:
    return payload(site, tokens=0, token_ids=b"")


def _huge(site: Site) -> bytes:
    return payload(site, shape=Shape(layers=3, kv_heads=2, head_dim=4_096, sent_layers=(0, 1, 2)), slice_tokens=1)[
        :4_000
    ]


def _other_text(site: Site) -> bytes:
    context, manifest = held(site), site.agents["pi-1"].engine.model.manifest
    ids = context.ids[::-1]
    rung = recipe("float32")
    return b"".join(encode(*to_send(manifest, context.context_id, ids, None, own_tokens=len(ids), rung=rung)))


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (_noise, "magic"),
        (_other_version, "format_version"),
        (_other_context, "context_id"),
        (_other_prefix, "prefix"),
        (_other_transform, "transform"),
        (_no_layers, "sent_layers"),
        (_fewer_tokens, "tokens"),
        (_nothing, "tokens"),
        (_other_text, "token_ids"),
    ],
)
async def test_a_payload_that_cannot_be_used_is_refused_by_name_and_the_text_fetched(
    site: Site, make: Callable[[Site], bytes], field: str
) -> None:
    expected = await expected_answer(site, held(site))
    outcome, _ = await forged(site, make(site), "coordinator")
    assert outcome.state == "answered", outcome.reason
    assert outcome.answer == expected
    (part,) = outcome.parts
    assert (part.state, part.fallback) == ("refused", "coordinator")
    assert part.reason.startswith(f"payload refused, {field}: ")
    assert "\n" not in part.reason
    assert outcome.first_token_s < LONG_S / 2


@pytest.mark.parametrize(("make", "field"), [(_flipped, "digest"), (_cut, "trailer")])
async def test_what_is_broken_behind_a_good_header_is_computed_from_the_ids_and_nobody_asked(
    site: Site, make: Callable[[Site], bytes], field: str
) -> None:
    expected = await expected_answer(site, held(site))
    outcome, end = await forged(site, make(site), "coordinator")
    assert outcome.state == "answered", outcome.reason
    assert outcome.answer == expected
    (part,) = outcome.parts
    assert (part.state, part.fallback) == ("refused", "ids")
    assert part.reason.startswith(f"payload refused, {field}: ")
    assert part.own_tokens == len(held(site).ids)
    assert end == "delivered" or end.startswith(f"refused: payload refused, {field}")
    assert not any(isinstance(said, TextRequest) for said in site.said)


async def test_a_sender_whose_payload_is_refused_hears_why_before_it_has_sent_all(site: Site) -> None:
    outcome, end = await forged(site, _noise(site) * 100, rate_bps=500_000.0)  # all of it would take eight seconds
    assert outcome.state == "failed"
    assert end.startswith("refused: payload refused, magic")


async def test_a_payload_with_one_layer_only_is_used(site: Site) -> None:
    outcome, _ = await forged(site, _one_layer(site))
    assert outcome.state == "answered", outcome.reason


async def test_a_payload_of_another_shape_fails_in_one_line(site: Site) -> None:
    outcome, _ = await forged(site, _huge(site))
    assert outcome.state == "failed"
    assert "\n" not in outcome.reason
    assert "fault" not in outcome.reason


async def test_another_models_payload_is_refused_with_both_names(site: Site, other_tiny_bundle: Path) -> None:
    (theirs,) = await site.start("pi-2", other_tiny_bundle, NORTH)
    part = part_of(held(site), "pi-2", text_holders=("coordinator",))
    order = question(part)
    sending = order_for(part, order, RECEIVER, context_id=theirs.context_id)
    await site.order(RECEIVER, order)
    await site.order("pi-2", sending)
    await site.until(lambda: site.answered(order.request))
    (outcome,) = site.answered(order.request)
    assert outcome.state == "answered", outcome.reason
    ours = site.agents["pi-1"].engine.model.manifest.fingerprint
    other = site.agents["pi-2"].engine.model.manifest.fingerprint
    assert outcome.parts[0].reason == f"payload refused, fingerprint: made by model {other}, this agent runs {ours}"
    assert outcome.parts[0].fallback == "coordinator"
    assert (await site.send_outcome(sending)).state in {"refused", "delivered"}


async def test_between_models_of_one_tokenizer_a_payload_of_ids_alone_is_refused_by_its_context(
    site: Site, other_tiny_bundle: Path
) -> None:
    (theirs,) = await site.start("pi-2", other_tiny_bundle, NORTH)
    part = part_of(held(site), "pi-2", text_holders=("coordinator",), own_tokens=len(theirs.ids))
    order = question(part)
    await site.order(RECEIVER, order)
    await site.order("pi-2", order_for(part, order, RECEIVER, context_id=theirs.context_id))
    await site.until(lambda: site.answered(order.request))
    assert "payload refused, context_id" in site.answered(order.request)[0].parts[0].reason


@pytest.mark.parametrize("own", [0, 7])
async def test_after_a_nan_at_the_sender_the_receiver_computes_the_text_at_once(site: Site, own: int) -> None:
    expected = await expected_answer(site, held(site))
    layers = list(cached(site).layers)
    values = layers[2].values.copy()
    values[1, -1, 3] = np.nan
    layers[2] = replace(layers[2], values=values)
    await site.agents["pi-1"].store.put(held(site).context_id, Cache(tuple(layers)))
    part = part_of(held(site), "pi-1", text_holders=("coordinator",), own_tokens=own)
    order = question(part)
    await site.order("pi-1", sending := order_for(part, order, RECEIVER))
    outcome = await site.answer(RECEIVER, order)
    assert outcome.state == "answered", outcome.reason
    assert outcome.answer == expected
    assert (outcome.parts[0].state, outcome.parts[0].fallback) == ("cancelled", "ids")
    assert outcome.parts[0].own_tokens == len(held(site).ids)
    assert outcome.first_token_s < LONG_S / 2
    sent = await site.send_outcome(sending)
    assert sent.state == "refused"
    assert "NaN" in sent.reason


async def test_the_medium_makes_no_difference_to_a_lossless_answer(site: Site) -> None:
    context = held(site)
    expected = await expected_answer(site, context)
    assert expected
    for own in (1, len(context.ids) // 2, len(context.ids)):
        part = part_of(context, "pi-1", own_tokens=own)
        order = question(part)
        await site.order("pi-1", order_for(part, order, RECEIVER))
        outcome = await site.answer(RECEIVER, order)
        assert outcome.answer == expected
        assert outcome.parts[0].prefill_s > 0
        assert outcome.context_tokens == len(context.ids)


async def test_the_next_holder_is_asked_when_one_has_no_text(site: Site, tiny_bundle: Path) -> None:
    expected = await expected_answer(site, held(site))
    await site.start("pi-2", tiny_bundle, SOUTH)
    site.texts[held(site).context_id] = None
    part = part_of(held(site), FORGER, text_holders=("coordinator", "pi-2", "pi-1"))
    order = answer_order(part, part_timeout_s=1.0)
    outcome = await site.answer(RECEIVER, order)
    assert outcome.state == "answered", outcome.reason
    assert outcome.answer == expected
    (had,) = outcome.parts
    assert (had.state, had.fallback) == ("expired", "pi-1")
    assert "not complete within 1 s" in had.reason
    assert "coordinator: the coordinator was not given this text" in had.reason
    assert f"pi-2: transfer {site.said_by('pi-2').transfer} cancelled: context " in had.reason
    assert 0 < had.payload_bytes < 2_000


async def test_a_question_whose_part_nobody_has_fails_with_all_reasons(site: Site, tiny_bundle: Path) -> None:
    await site.start("pi-2", tiny_bundle, SOUTH)
    site.texts[held(site).context_id] = SOUTH  # not the text that was ordered
    part = part_of(held(site), "pi-2", text_holders=("coordinator", "pi-2"))
    order = question(part)
    await site.order("pi-2", order_for(part, order, RECEIVER))
    outcome = await site.answer(RECEIVER, order)
    assert outcome.state == "failed"
    assert outcome.reason.startswith(f"context {held(site).context_id} of pi-2 could not be had: ")
    assert (
        "coordinator: payload refused, token_ids: are not the tokens of the context that was ordered" in outcome.reason
    )
    assert outcome.reason.count("is not held here") == 2  # its transfer, and its text
    assert "\n" not in outcome.reason
    assert outcome.parts[0].reason
    assert site.agents[RECEIVER].inbox_bytes == 0


async def test_a_coordinator_that_is_gone_is_not_waited_for_longer_than_a_part(site: Site) -> None:
    site.texts.clear()
    part = part_of(held(site), FORGER, text_holders=("coordinator",))
    outcome = await site.answer(RECEIVER, answer_order(part, part_timeout_s=0.2))
    assert outcome.state == "failed"
    assert "coordinator: no text within 0.2 s" in outcome.reason


async def test_a_context_of_its_own_needs_no_transfer(site: Site) -> None:
    context = await site.agents[RECEIVER].library.add("own", NORTH)
    expected = await expected_answer(site, held(site))
    outcome = await site.answer(RECEIVER, question(part_of(context, RECEIVER)))
    assert outcome.answer == expected
    assert outcome.parts[0].payload_bytes == 0
    gone = question(part_of(held(site, "text-1"), RECEIVER, text_holders=("pi-1",)))
    outcome = await site.answer(RECEIVER, gone)
    assert outcome.state == "answered", outcome.reason
    assert (outcome.parts[0].state, outcome.parts[0].fallback) == ("refused", "pi-1")


async def test_when_one_part_fails_the_others_are_given_up_and_their_senders_hear_of_it(site: Site) -> None:
    slow = part_of(held(site), "pi-1")
    lost = part_of(held(site, "text-1"), "pi-1")
    order = question(slow, lost)
    sending = order_for(slow, order, RECEIVER, rate_bps=60_000.0, chunk_bytes=4_096)  # about five seconds
    await site.order("pi-1", sending)
    await site.order(RECEIVER, order)
    await site.until(lambda: len(site.bulk) > 2)
    await site.order("pi-1", order_for(lost, order, RECEIVER, context_id="0" * 32))
    await site.until(lambda: site.answered(order.request))
    outcome = site.answered(order.request)[0]
    assert outcome.state == "failed"
    assert "is not held here" in outcome.reason
    assert (await site.send_outcome(sending)).state == "cancelled"
    assert site.agents[RECEIVER].inbox_bytes == 0


async def test_a_transfer_that_came_before_its_order_is_used(site: Site) -> None:
    part = part_of(held(site), "pi-1")
    order = question(part)
    sending = order_for(part, order, RECEIVER)
    await site.order("pi-1", sending)
    assert (await site.send_outcome(sending)).state == "delivered"
    outcome = await site.answer(RECEIVER, order)
    assert outcome.state == "answered", outcome.reason
    assert outcome.parts[0].fallback == ""


async def test_a_text_that_nobody_waits_for_is_ignored(site: Site) -> None:
    late = TextReply(request=new_id(), transfer=new_id(), context_id=held(site).context_id, text=NORTH)
    await site.order(RECEIVER, late)
    assert await expected_answer(site, held(site))


async def test_every_transfer_of_a_question_ends_once(site: Site) -> None:
    parts = [part_of(held(site), "pi-1", rung=rung) for rung in ("float32", "q8", "q4")]
    order = question(*parts)
    orders = [order_for(part, order, RECEIVER) for part in parts]
    await asyncio.gather(site.order("pi-1", *orders), site.order(RECEIVER, order))
    await site.until(lambda: site.answered(order.request))
    await site.until(lambda: all(site.sent(part.transfer) for part in parts))
    await site.stop()
    assert len(site.answered(order.request)) == 1
    ends = [each for each in site.said if isinstance(each, SendOutcome)]
    assert sorted(each.transfer for each in ends) == sorted(part.transfer for part in parts)
    assert {each.state for each in ends} == {"delivered"}
