"""Transfers end to end over a bus in memory that loses, doubles, breaks, delays and reorders. Time is virtual."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_config.errors import TransferCancelled, TransferError, TransferExpired, TransferRefused
from broker_config.messages import Ack, Chunk, Open
from broker_config.topics import ACKS, BULK, Topic
from broker_config.transfer import Inbox, Sent, send
from broker_config.wire import unpack
from scripts.replay.clock import run_virtual
from tests.memory_bus import MemoryBroker, Trouble

TRANSFER, OTHER = "0123456789abcdef", "fedcba9876543210"
PAYLOAD = bytes(range(256)) * 100


@dataclass
class Pair:
    """A sender and a receiver."""

    broker: MemoryBroker

    def inbox(self, **options: Any) -> Inbox:
        return Inbox(bulk=self.broker.bus(), control=self.broker.bus(), agent="pi-2", **options)

    async def send(self, payload: Any = PAYLOAD, **options: Any) -> Sent:
        announced = len(payload) if isinstance(payload, bytes) else None
        defaults: dict[str, Any] = {
            "bulk": self.broker.bus(),
            "control": self.broker.bus(),
            "sender": "pi-1",
            "receiver": "pi-2",
            "transfer": TRANSFER,
            "request": OTHER,
            "pieces": [payload] if isinstance(payload, bytes) else payload,
            "total_bytes": announced,
            "chunk_bytes": 1_024,
            "expires_s": 60.0,
        }
        return await send(**defaults | options)


def _pair(seed: int = 0, **trouble: Trouble) -> Pair:
    patterns = {"bulk": BULK.pattern, "acks": ACKS.pattern}
    return Pair(MemoryBroker(seed, {patterns[name]: what for name, what in trouble.items()}))


async def _outcome(work: Any) -> tuple[str, Any]:
    try:
        return "delivered", await work
    except TransferError as error:
        return error.state, error


TROUBLES = st.builds(
    Trouble,
    lost=st.floats(0, 0.3),
    twice=st.floats(0, 0.3),
    broken=st.floats(0, 0.05),
    delay_s=st.floats(0, 0.5).map(lambda most: (0.0, most)),
)


@given(st.integers(0, 2**32), TROUBLES, TROUBLES, st.integers(0, 40_000), st.booleans())
@settings(deadline=None, max_examples=40)
def test_a_payload_arrives_intact_whatever_the_network_does(
    seed: int, bulk: Trouble, acks: Trouble, size: int, announced: bool
) -> None:
    async def run() -> None:
        pair = _pair(seed, bulk=bulk, acks=acks)
        payload = (PAYLOAD * 2)[:size]
        async with pair.inbox() as inbox:
            incoming = inbox.expect(TRANSFER)
            sending = asyncio.create_task(
                pair.send([payload], total_bytes=size if announced else None, expires_s=3_000, window_bytes=8_192)
            )
            assert await incoming.payload(3_000) == payload
            sent = await sending
            assert sent.payload_bytes == size
            assert sent.wire_bytes > size
            assert inbox.buffered_bytes == 0

    run_virtual(run())


@given(st.integers(0, 2**32), st.floats(0.2, 1.0), st.floats(0.05, 8.0))
@settings(deadline=None, max_examples=40)
def test_a_transfer_ends_in_exactly_one_state_on_both_sides(seed: int, lost: float, expires_s: float) -> None:
    async def run() -> None:
        trouble = Trouble(lost=lost, delay_s=(0.0, 0.3))
        pair = _pair(seed, bulk=trouble, acks=trouble)
        async with pair.inbox() as inbox:
            incoming = inbox.expect(TRANSFER)
            (sent_state, sent), (got_state, got) = await asyncio.gather(
                _outcome(pair.send(expires_s=expires_s)), _outcome(incoming.payload(expires_s + 1))
            )
            assert sent_state in ("delivered", "expired")
            assert got_state in ("delivered", "expired")
            assert got_state == "delivered" or sent_state == "expired"
            assert (got == PAYLOAD) == (got_state == "delivered")
            assert isinstance(sent, Sent) == (sent_state == "delivered")
            assert incoming.state == got_state
            assert inbox.buffered_bytes == 0

    run_virtual(run())


def test_while_chunk_0_is_missing_it_is_not_announced_with_every_round_trip() -> None:
    """Of a millisecond here."""
    announced, to_lose = 0, [0]

    def listen(message: Any, _: Mapping[str, str]) -> None:
        nonlocal announced
        announced += isinstance(message, Open)

    class Losing(MemoryBroker):
        def carry(self, topic: Topic[Any], address: str, payload: bytes) -> None:
            message = unpack(topic, payload) if topic is BULK else None
            if isinstance(message, Chunk) and message.index in to_lose:
                to_lose.remove(message.index)
            else:
                super().carry(topic, address, payload)

    async def run() -> None:
        delay = Trouble(delay_s=(0.001, 0.001))
        pair = Pair(Losing(0, {BULK.pattern: delay, ACKS.pattern: delay}))
        await pair.broker.bus().subscribe(BULK, listen, receiver="pi-2", sender="pi-1")
        async with pair.inbox() as inbox:
            sent, payload = await asyncio.gather(pair.send(), inbox.expect(TRANSFER).payload(10))
        assert payload == PAYLOAD
        assert sent.transfer_s < 0.2
        assert not to_lose
        assert announced <= 3

    run_virtual(run())


def test_without_trouble_nothing_is_sent_twice() -> None:
    async def run() -> None:
        pair = _pair(bulk=Trouble(delay_s=(0.02, 0.02)), acks=Trouble(delay_s=(0.02, 0.02)))
        async with pair.inbox() as inbox:
            sent, payload = await asyncio.gather(pair.send(), inbox.expect(TRANSFER).payload(10))
            assert payload == PAYLOAD
            assert sent.resent == 0
            assert sent.chunks == 25
            assert sent.payload_bytes < sent.wire_bytes < len(PAYLOAD) + 25 * 200
            assert pair.broker.delivered[ACKS.pattern] < 25

    run_virtual(run())


@pytest.mark.parametrize("rate_bps", [100_000.0, 5_000_000.0])
def test_pacing_keeps_the_rate(rate_bps: float) -> None:
    async def run() -> None:
        pair = _pair()
        async with pair.inbox() as inbox:
            sent, _ = await asyncio.gather(
                pair.send(PAYLOAD * 10, rate_bps=rate_bps), inbox.expect(TRANSFER).payload(60)
            )
            assert sent.resent == 0
            assert sent.wire_bytes * 8 / sent.transfer_s == pytest.approx(rate_bps, rel=0.15)

    run_virtual(run())


def test_a_payload_is_sent_and_read_while_it_is_being_made() -> None:
    async def run() -> None:
        read: list[int] = []

        async def made() -> AsyncIterator[bytes]:
            for index in range(10):
                await asyncio.sleep(10)
                assert index == 0 or read, "the first pieces were read before the last was made"
                yield bytes([index]) * 1_500

        pair = _pair()
        async with pair.inbox() as inbox:
            incoming = inbox.expect(TRANSFER)
            sending = asyncio.create_task(pair.send(made(), expires_s=300))
            got = b""
            async for piece in incoming.pieces():
                got += piece
                read.append(len(piece))
            assert got == b"".join(bytes([index]) * 1_500 for index in range(10))
            sent = await sending
            assert sent.resent == 0
            assert incoming.first_chunk_s == pytest.approx(10, abs=0.1)
            assert incoming.last_chunk_s == pytest.approx(100, abs=0.1)
            assert inbox.buffered_bytes == 0

    run_virtual(run())


def test_a_transfer_that_came_before_anybody_expected_it_is_held() -> None:
    async def run() -> None:
        pair = _pair()
        async with pair.inbox() as inbox:
            await pair.send()
            assert inbox.buffered_bytes == len(PAYLOAD)
            assert await inbox.expect(TRANSFER).payload(1) == PAYLOAD
            assert inbox.buffered_bytes == 0

    run_virtual(run())


def test_a_transfer_that_nobody_ever_expects_is_let_go() -> None:
    async def run() -> None:
        pair = _pair()
        async with pair.inbox(unexpected_s=30) as inbox:
            await pair.send()
            await asyncio.sleep(31)
            assert inbox.buffered_bytes == 0
            with pytest.raises(TransferExpired, match="it is gone"):
                await inbox.expect(TRANSFER).payload(1)

    run_virtual(run())


def test_a_refusal_reaches_the_sender_with_its_reason() -> None:
    async def run() -> None:
        pair = _pair()
        async with pair.inbox() as inbox:
            incoming = inbox.expect(TRANSFER)
            sending = asyncio.create_task(_outcome(pair.send(rate_bps=20_000)))
            async for _ in incoming.pieces():
                break
            await incoming.refuse("wrong model")
            state, error = await sending
            assert (state, error.reason) == ("refused", "wrong model")
            with pytest.raises(TransferRefused, match="wrong model"):
                await incoming.payload(1)
            await incoming.cancel("too late to matter")
            assert incoming.state == "refused"

    run_virtual(run())


def test_a_refusal_that_was_lost_is_told_again() -> None:
    async def run() -> None:
        pair = _pair()
        async with pair.inbox() as inbox:
            incoming = inbox.expect(TRANSFER)
            sending = asyncio.create_task(_outcome(pair.send(rate_bps=20_000)))
            async for _ in incoming.pieces():
                break
            pair.broker.trouble = {ACKS.pattern: Trouble(lost=1)}
            await incoming.refuse("wrong model")
            await asyncio.sleep(2)
            assert not sending.done()
            pair.broker.trouble = {}
            assert (await sending)[0] == "refused"

    run_virtual(run())


def test_cancelling_the_sender_tells_the_receiver() -> None:
    async def run() -> None:
        pair = _pair()
        async with pair.inbox() as inbox:
            incoming = inbox.expect(TRANSFER)
            sending = asyncio.create_task(pair.send(rate_bps=20_000))
            async for _ in incoming.pieces():
                break
            sending.cancel()
            with pytest.raises(TransferCancelled, match="the sender cancelled it"):
                await incoming.payload(60)
            with pytest.raises(asyncio.CancelledError):
                await sending
            assert inbox.buffered_bytes == 0

    run_virtual(run())


def test_cancelling_the_receiver_tells_the_sender() -> None:
    async def run() -> None:
        pair = _pair()
        async with pair.inbox() as inbox:
            incoming = inbox.expect(TRANSFER)
            sending = asyncio.create_task(_outcome(pair.send(rate_bps=20_000)))
            await asyncio.sleep(1)
            await incoming.cancel("not needed any more")
            assert (await sending)[0] == "cancelled"

    run_virtual(run())


def test_a_receiver_that_goes_offline_cancels() -> None:
    async def run() -> None:
        pair = _pair()
        async with pair.inbox() as inbox:
            inbox.expect(TRANSFER)
            sending = asyncio.create_task(_outcome(pair.send(rate_bps=20_000)))
            await asyncio.sleep(1)
        state, error = await sending
        assert (state, error.reason) == ("cancelled", "the receiver is going offline")

    run_virtual(run())


def test_a_failure_to_make_the_payload_reaches_both() -> None:
    async def made() -> AsyncIterator[bytes]:
        yield bytes(3_000)
        raise ZeroDivisionError("encoder")

    async def run() -> None:
        pair = _pair()
        async with pair.inbox() as inbox:
            incoming = inbox.expect(TRANSFER)
            sending = asyncio.create_task(pair.send(made()))
            with pytest.raises(TransferCancelled, match="could not make the payload: ZeroDivisionError"):
                await incoming.payload(60)
            with pytest.raises(ZeroDivisionError):
                await sending

    run_virtual(run())


def test_nobody_there_expires_and_says_so() -> None:
    async def run() -> None:
        with pytest.raises(TransferExpired, match="not delivered within 5 s, 0 chunks arrived"):
            await _pair().send(expires_s=5)
        assert asyncio.get_running_loop().time() == pytest.approx(5, abs=1.1)

    run_virtual(run())


def test_a_receiver_that_waits_in_vain_expires_and_a_late_sender_learns_of_it() -> None:
    async def run() -> None:
        pair = _pair()
        async with pair.inbox() as inbox:
            with pytest.raises(TransferExpired, match="not complete within 3 s"):
                await inbox.expect(TRANSFER).payload(3)
            state, error = await _outcome(pair.send())
            assert (state, error.reason) == ("expired", "not complete within 3 s")

    run_virtual(run())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"limit_bytes": 10_000}, "25600 bytes are announced, the limit is 10000"),
        ({"limit_transfers": 0}, "0 transfers are under way"),
    ],
)
def test_what_is_too_much_is_refused_before_a_byte_of_it_is_kept(options: dict[str, int], says: str) -> None:
    async def run() -> None:
        pair = _pair()
        async with pair.inbox(**options) as inbox:
            incoming = inbox.expect(TRANSFER)
            state, error = await _outcome(pair.send())
            assert state == "refused"
            assert says in error.reason
            assert inbox.buffered_bytes == incoming.received_bytes == 0

    run_virtual(run())


def test_a_payload_of_unknown_length_is_refused_when_it_passes_the_limit() -> None:
    async def run() -> None:
        pair = _pair()
        async with pair.inbox(limit_bytes=10_000) as inbox:
            state, error = await _outcome(pair.send([PAYLOAD], total_bytes=None))
            assert (state, error.reason) == ("refused", "it is longer than the 10000 bytes there is room for")
            assert inbox.buffered_bytes == 0

    run_virtual(run())


def test_an_announced_payload_keeps_its_room() -> None:
    async def run() -> None:
        pair = _pair()
        async with pair.inbox(limit_bytes=40_000) as inbox:
            first = asyncio.create_task(pair.send(rate_bps=50_000))
            await asyncio.sleep(0.1)
            state, error = await _outcome(pair.send(transfer=OTHER))
            assert state == "refused"
            assert "no room for 25600 bytes" in error.reason
            assert await inbox.expect(TRANSFER).payload(60) == PAYLOAD
            await first

    run_virtual(run())


def test_a_broker_that_is_down_for_a_while_only_delays() -> None:
    async def run() -> None:
        pair = _pair()
        async with pair.inbox() as inbox:
            sending = asyncio.create_task(pair.send(rate_bps=50_000))
            await asyncio.sleep(1)
            pair.broker.down = True
            await asyncio.sleep(10)
            pair.broker.down = False
            assert await inbox.expect(TRANSFER).payload(60) == PAYLOAD
            assert (await sending).chunks == 25

    run_virtual(run())


def test_a_receiver_that_was_restarted_refuses_what_it_can_not_complete() -> None:
    async def run() -> None:
        pair = _pair()
        async with pair.inbox():
            sending = asyncio.create_task(_outcome(pair.send(rate_bps=20_000, expires_s=600)))
            await asyncio.sleep(3)
            pair.broker.trouble = {ACKS.pattern: Trouble(lost=1)}
        pair.broker.trouble = {}
        async with pair.inbox():
            state, error = await sending
            assert state == "refused"
            assert "was it restarted?" in error.reason
            assert asyncio.get_running_loop().time() < 120

    run_virtual(run())


def test_a_lost_last_word_is_told_again_long_after() -> None:
    async def run() -> None:
        pair = _pair(acks=Trouble(lost=1.0))
        async with pair.inbox() as inbox:
            sending = asyncio.create_task(pair.send())
            assert await inbox.expect(TRANSFER).payload(10) == PAYLOAD
            await asyncio.sleep(5)
            pair.broker.trouble = {}
            await sending

    run_virtual(run())


def test_transfers_at_once_do_not_mix() -> None:
    async def run() -> None:
        trouble = Trouble(lost=0.1, twice=0.1, delay_s=(0, 0.1))
        pair = _pair(7, bulk=trouble, acks=trouble)
        async with pair.inbox() as inbox:
            ids = [f"{number:016x}" for number in range(8)]
            payloads = [bytes([number]) * 9_000 for number in range(8)]
            sending = asyncio.gather(
                *(pair.send(payload, transfer=name, expires_s=600) for name, payload in zip(ids, payloads, strict=True))
            )
            assert await asyncio.gather(*(inbox.expect(name).payload(600) for name in ids)) == payloads
            await sending

    run_virtual(run())


def test_a_stranger_can_not_interfere_with_a_transfer() -> None:
    async def run() -> None:
        pair = _pair()
        stranger = pair.broker.bus()
        async with pair.inbox() as inbox:
            sending = asyncio.create_task(pair.send(rate_bps=50_000))
            await asyncio.sleep(1)
            forged = Chunk(transfer=TRANSFER, index=3, crc32=0, data=b"", last=True)
            await stranger.publish(BULK, forged, receiver="pi-2", sender="pi-3")
            opening = Open(transfer=OTHER, request=OTHER, sender="pi-1", chunk_bytes=1_024, expires_s=9)
            await stranger.publish(BULK, opening, receiver="pi-2", sender="pi-3")
            ack = Ack(transfer=TRANSFER, receiver="pi-2", next_index=0, state="delivered")
            await stranger.publish(ACKS, ack, sender="pi-1", receiver="pi-2")
            assert await inbox.expect(TRANSFER).payload(60) == PAYLOAD
            await sending
            assert inbox.buffered_bytes == 0

    run_virtual(run())


@pytest.mark.parametrize("chunk_bytes", [1_023, 262_145])
def test_a_chunk_size_that_no_message_has_is_a_mistake(chunk_bytes: int) -> None:
    with pytest.raises(ValueError, match="chunk_bytes"):
        run_virtual(_pair().send(chunk_bytes=chunk_bytes))
