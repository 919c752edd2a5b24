"""A receiver that needs no more before all is there: both ends are delivered, and nothing goes on. Time is virtual."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from broker_config.messages import Ack, Chunk
from broker_config.topics import ACKS, BULK
from broker_config.transfer import Inbox, Sent, send
from scripts.replay.clock import run_virtual
from tests.memory_bus import MemoryBroker, Trouble

TRANSFER, REQUEST = "0123456789abcdef", "fedcba9876543210"
CHUNK_BYTES = 1_024
PAYLOAD = bytes(range(256)) * 200
SLOW_BPS = 20_000.0
"""At this rate a chunk takes 0.4 s, the payload 20 s."""


def started(broker: MemoryBroker, pieces: Any = (PAYLOAD,), **options: Any) -> asyncio.Task[Sent]:
    defaults: dict[str, Any] = {"total_bytes": len(PAYLOAD), "rate_bps": SLOW_BPS, "chunk_bytes": CHUNK_BYTES}
    sending = send(
        bulk=broker.bus(),
        control=broker.bus(),
        sender="pi-1",
        receiver="pi-2",
        transfer=TRANSFER,
        request=REQUEST,
        pieces=pieces,
        expires_s=600,
        **defaults | options,
    )
    return asyncio.create_task(sending)


def inbox_of(broker: MemoryBroker) -> Inbox:
    return Inbox(bulk=broker.bus(), control=broker.bus(), agent="pi-2")


async def counted_chunks(broker: MemoryBroker) -> list[Chunk]:
    """Every chunk that is published from now on."""
    seen: list[Chunk] = []
    await broker.bus().subscribe(BULK, lambda message, _: seen.append(message) if isinstance(message, Chunk) else None)
    return seen


@pytest.mark.parametrize("after", [0, 1, 7])
def test_enough_ends_both_sides_delivered_with_what_was_really_sent(after: int) -> None:
    async def run() -> None:
        broker = MemoryBroker()
        chunks = await counted_chunks(broker)
        async with inbox_of(broker) as inbox:
            incoming = inbox.expect(TRANSFER)
            sending = started(broker)
            got = 0
            async for piece in incoming.pieces():
                got += len(piece)
                if got > after * CHUNK_BYTES:
                    await incoming.has_enough()
            sent = await sending
            assert (incoming.state, incoming.enough) == ("delivered", True)
            assert inbox.buffered_bytes == 0
            assert sent.chunks == len(chunks) <= after + 3  # one may have gone while the word was on its way
            assert sent.payload_bytes == sum(len(chunk.data) for chunk in chunks) < len(PAYLOAD)
            before = len(chunks)
            await asyncio.sleep(60)
            assert len(chunks) == before

    run_virtual(run())


def test_what_was_made_ahead_does_not_count_as_sent_and_nothing_more_is_made() -> None:
    made: list[int] = []

    async def pieces() -> AsyncIterator[bytes]:
        try:
            for index in range(40):
                made.append(index)
                yield bytes(CHUNK_BYTES)
        finally:
            made.append(-1)

    async def run() -> None:
        broker = MemoryBroker()
        async with inbox_of(broker) as inbox:
            incoming = inbox.expect(TRANSFER)
            sending = started(broker, pieces(), total_bytes=None, window_bytes=2 * CHUNK_BYTES)
            async for _ in incoming.pieces():
                await incoming.has_enough()
            sent = await sending
            assert sent.payload_bytes == sent.chunks * CHUNK_BYTES <= 2 * CHUNK_BYTES
            assert len(made) < 10
            assert made[-1] == -1

    run_virtual(run())


def test_a_lost_word_is_said_again_when_the_sender_repeats_itself() -> None:
    async def run() -> None:
        broker = MemoryBroker(3, {ACKS.pattern: Trouble(lost=0.8)})
        async with inbox_of(broker) as inbox:
            incoming = inbox.expect(TRANSFER)
            sending = started(broker)
            async for _ in incoming.pieces():
                await incoming.has_enough()
            await sending
            assert inbox.expect(TRANSFER).state == "expired"  # it is gone, whoever asks

    run_virtual(run())


def test_enough_after_the_end_changes_nothing() -> None:
    async def run() -> None:
        broker = MemoryBroker()
        acks: list[Ack] = []
        await broker.bus().subscribe(ACKS, lambda ack, _: acks.append(ack))
        async with inbox_of(broker) as inbox:
            incoming = inbox.expect(TRANSFER)
            sending = started(broker, rate_bps=None)
            await incoming.payload(10)
            await incoming.has_enough()
            assert (await sending).payload_bytes == len(PAYLOAD)
            assert not incoming.enough
            await incoming.refuse("too late")
            assert incoming.state == "delivered"
            assert not any(ack.enough for ack in acks)

    run_virtual(run())


def test_enough_of_a_transfer_that_never_began_is_told_when_it_does() -> None:
    async def run() -> None:
        broker = MemoryBroker()
        async with inbox_of(broker) as inbox:
            incoming = inbox.expect(TRANSFER)
            await incoming.has_enough()
            sent = await started(broker)
            assert sent.payload_bytes <= 3 * CHUNK_BYTES

    run_virtual(run())
