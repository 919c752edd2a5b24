"""Rates in steps, and rates that change while a transfer runs. Time is virtual."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.messages import RateStep
from broker_config.transfer import Inbox, Pacer, send
from scripts.replay.clock import run_virtual
from tests.memory_bus import MemoryBroker

PIECE_BYTES = 1_000
TRANSFER, REQUEST = "0123456789abcdef", "fedcba9876543210"

rates = st.floats(1e4, 1e7)
steps = st.lists(st.builds(lambda after_s, bps: RateStep(after_s=after_s, rate_bps=bps), st.floats(0, 20), rates))


def now_s() -> float:
    return asyncio.get_running_loop().time()


def allowed_bytes(rate_bps: float, later: list[RateStep], until_s: float) -> float:
    """What these rates let through up to a time, by definition."""
    edges = sorted((step.after_s, step.rate_bps) for step in later)
    total, at_s, bps = 0.0, 0.0, rate_bps
    for after_s, next_bps in [*edges, (until_s, 0.0)]:
        total += max(0.0, min(after_s, until_s) - at_s) * bps / 8
        at_s, bps = max(at_s, min(after_s, until_s)), next_bps
    return total


@given(rates, steps, st.lists(st.integers(1, 2 * PIECE_BYTES), min_size=1, max_size=80))
def test_a_busy_transfer_gets_what_the_steps_allow_and_no_more(
    rate_bps: float, later: list[RateStep], sizes: list[int]
) -> None:
    async def run() -> float:
        pacer = Pacer(rate_bps, PIECE_BYTES, later)
        for size in sizes:
            await asyncio.sleep(pacer.delay_s(size))
        return now_s()

    took_s, total = run_virtual(run()), sum(sizes)
    burst_bytes = max(PIECE_BYTES, 0.05 * max(rate_bps, *(step.rate_bps for step in later), 0) / 8)
    allowed = allowed_bytes(rate_bps, later, took_s)
    assert total <= allowed + burst_bytes + 0.1
    if took_s > 0:
        assert total >= allowed - 0.1


def test_a_step_counts_from_when_the_order_began() -> None:
    async def run() -> list[float]:
        await asyncio.sleep(5)
        pacer = Pacer(8_000, PIECE_BYTES, [RateStep(after_s=6, rate_bps=80_000)], began_s=now_s() - 4)
        pacer.delay_s(PIECE_BYTES)  # the burst
        return [pacer.delay_s(3_000), pacer.delay_s(3_000)]

    assert run_virtual(run()) == pytest.approx([2 + 0.1, 2 + 0.4])


def test_a_change_holds_from_now_on_and_voids_what_was_said_of_later() -> None:
    async def run() -> None:
        pacer = Pacer(8_000, PIECE_BYTES, [RateStep(after_s=1, rate_bps=8e6)])
        pacer.delay_s(PIECE_BYTES)
        assert pacer.delay_s(500) == pytest.approx(0.5)
        pacer.change(4_000)
        assert pacer.wait_s() == pytest.approx(1.0)
        await asyncio.sleep(1)
        assert pacer.wait_s() == pytest.approx(0)
        assert pacer.delay_s(500) == pytest.approx(1.0)
        pacer.change(None, [RateStep(after_s=10, rate_bps=8_000)])
        assert pacer.wait_s() == 0
        assert pacer.rate_bps() is None
        await asyncio.sleep(10)
        assert pacer.rate_bps() == 8_000
        pacer.delay_s(PIECE_BYTES)
        assert pacer.delay_s(PIECE_BYTES) == pytest.approx(2.0, abs=1.01)

    run_virtual(run())


def test_a_change_to_no_rate_at_all_is_refused_and_changes_nothing() -> None:
    async def run() -> None:
        pacer = Pacer(8_000, PIECE_BYTES)
        with pytest.raises(ValueError, match="rate_bps"):
            pacer.change(0.0)
        assert pacer.rate_bps() == 8_000
        assert not pacer.changed.is_set()

    run_virtual(run())


async def _sent_in(pacer: Pacer, total: int) -> float:
    broker = MemoryBroker()
    async with Inbox(bulk=broker.bus(), control=broker.bus(), agent="pi-2") as inbox:
        sending = send(
            bulk=broker.bus(),
            control=broker.bus(),
            sender="pi-1",
            receiver="pi-2",
            transfer=TRANSFER,
            request=REQUEST,
            pieces=[bytes(total)],
            total_bytes=total,
            expires_s=3_000,
            chunk_bytes=10_240,
            pacer=pacer,
        )
        _, sent = await asyncio.gather(inbox.expect(TRANSFER).payload(3_000), sending)
        assert sent.payload_bytes == total
        assert sent.resent == 0
        return now_s()


def test_a_transfer_follows_its_steps() -> None:
    async def run() -> None:
        pacer = Pacer(8_000.0, 10_240, [RateStep(after_s=20, rate_bps=800_000.0)])
        took_s = await _sent_in(pacer, 500_000)  # 20 s bring 20 kB and the burst, the rest comes at 100 kB/s
        assert took_s == pytest.approx(20 + 4.8, abs=0.4)

    run_virtual(run())


def test_a_change_is_felt_by_a_chunk_that_is_held_back_already() -> None:
    async def run() -> None:
        pacer = Pacer(800.0, 10_240)  # the second chunk would wait for 100 s
        asyncio.get_running_loop().call_later(3.0, pacer.change, 800_000.0)
        assert await _sent_in(pacer, 500_000) == pytest.approx(3 + 4.9, abs=0.2)

    run_virtual(run())
