"""The sending end of a transfer in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import pytest

from broker_config.errors import TransferRefused
from edge_agent.flow import Flow as Seen
from scripts.replay.clock import run_virtual
from scripts.replay.network import Network
from scripts.replay.virtual.broker import Access
from scripts.replay.virtual.transfer import ENVELOPE_BYTES, Outward, Piece, Slice, Transfer

MBIT = 1e6
CHUNK = 10_000
WIRE_BITS = 8 * (CHUNK + ENVELOPE_BYTES)
DELAY_S = 0.01


def play(story: Callable[[], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        return await story()

    return run_virtual(run(), limit_s=1e6)


def outward(transfer: Transfer, rates: Mapping[str, float], *, paced_bps: float | None = None) -> Outward:
    network = Network(rates)
    ends = [
        Access(network=network, up=(f"{name}/up",), down=(f"{name}/down",), delay_s=lambda: DELAY_S)
        for name in ("one", "other")
    ]
    return Outward(
        transfer,
        sender=ends[0],
        receiver=ends[1],
        chunk_bytes=CHUNK,
        window_bytes=100 * CHUNK,
        rate_bps=paced_bps,
        later_rates=(),
        began_s=asyncio.get_running_loop().time(),
        seen=Seen("t"),
    )


def rates(up: float, down: float) -> dict[str, float]:
    return {"one/up": up, "one/down": 1.0, "other/up": 1.0, "other/down": down}


async def pieces(count: int, every_s: float = 0.0) -> AsyncIterator[tuple[Piece, bool]]:
    for at in range(count):
        await asyncio.sleep(every_s)
        yield Piece(CHUNK, Slice(at, at + 1)), at == count - 1


@pytest.mark.parametrize(("up", "down"), [(2 * MBIT, 8 * MBIT), (8 * MBIT, 2 * MBIT), (4 * MBIT, 4 * MBIT)])
def test_the_slower_link_passes_all_chunks_and_the_faster_one_of_them_besides(up: float, down: float) -> None:
    async def story() -> float:
        transfer = Transfer("t")
        await outward(transfer, rates(up, down)).send(pieces(20))
        assert transfer.complete
        assert transfer.last_s is not None
        return transfer.last_s

    expected_s = 20 * WIRE_BITS / min(up, down) + 8 * CHUNK / max(up, down) + 2 * DELAY_S
    assert play(story) == pytest.approx(expected_s, rel=1e-6)


@pytest.mark.parametrize("ends", ["enough", "refused"])
def test_a_sender_that_is_told_waits_for_no_more_pieces(ends: str) -> None:
    async def story() -> None:
        transfer, loop = Transfer("t"), asyncio.get_running_loop()
        sending = asyncio.create_task(outward(transfer, rates(8 * MBIT, 8 * MBIT)).send(pieces(10, every_s=60)))
        await asyncio.sleep(70)
        assert transfer.received_bytes == CHUNK
        if ends == "enough":
            transfer.enough = True
        else:
            transfer.fail("refused", "no room")
        transfer.tell_sender()
        if ends == "enough":
            assert (await sending).payload_bytes == CHUNK
        else:
            with pytest.raises(TransferRefused, match="no room"):
                await sending
        assert loop.time() == pytest.approx(70)

    play(story)


@pytest.mark.parametrize("paced_bps", [None, 1 * MBIT])
def test_what_was_sent_of_a_transfer_that_ended_goes_its_way_unless_it_was_held_back(paced_bps: float | None) -> None:
    async def story() -> bool:
        transfer = Transfer("t")
        one = outward(transfer, rates(1 * MBIT, 8 * MBIT), paced_bps=paced_bps)
        sending = asyncio.create_task(one.send(pieces(50)))
        await asyncio.sleep(1)
        transfer.enough = True
        transfer.tell_sender()
        await sending
        channel = one._network.channels["one/up"]
        left = channel.busy
        await asyncio.sleep(50 * WIRE_BITS / MBIT - 1 + 0.01)
        assert not channel.flows
        return left

    assert play(story) == (paced_bps is None)


def test_what_pieces_raise_ends_the_transfer() -> None:
    async def broken() -> AsyncIterator[tuple[Piece, bool]]:
        yield Piece(CHUNK, Slice(0, 1)), False
        raise KeyError("a cache that is gone")

    async def story() -> None:
        one = outward(Transfer("t"), rates(8 * MBIT, 8 * MBIT))
        with pytest.raises(KeyError, match="a cache that is gone"):
            await one.send(broken())
        await asyncio.sleep(1)
        assert not one._network.channels["one/up"].flows

    play(story)


def test_one_who_is_cancelled_twice_still_lets_go_of_the_link_and_the_pieces() -> None:
    closed = list[str]()

    async def stubborn() -> AsyncGenerator[tuple[Piece, bool]]:
        try:
            yield Piece(CHUNK, Slice(0, 1)), False
            await asyncio.sleep(1e5)
        finally:
            await asyncio.sleep(3)
            closed.append("pieces")

    async def story() -> None:
        given = stubborn()
        one = outward(Transfer("t"), rates(8 * MBIT, 8 * MBIT), paced_bps=MBIT)
        sending = asyncio.create_task(one.send(given))
        for _ in range(2):
            await asyncio.sleep(1)
            sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert closed
        await given.aclose()
        assert not one._network.channels["one/up"].flows

    play(story)
