"""The link emulator must give the rate, the delay and the fairness that it was set to, and end connections cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from scripts.link import Bucket, EmulatedLink, ListenRefused
from scripts.link.bucket import BURST_S, SMALLEST_QUANTUM_BYTES

pytestmark = pytest.mark.timeout(30)

MBIT = 1e6
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Broker:
    """The other end. The first byte of a connection says what it does: u take, d give, e echo."""

    def __init__(self) -> None:
        self.port = 0
        self.taken_bytes: dict[int, int] = {}
        self.ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(len(self.taken_bytes), reader, writer))
        self.taken_bytes[len(self.taken_bytes)] = 0
        self._tasks.add(task)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            kind = await reader.read(1)
            while kind == b"d":
                writer.write(bytes(65_536))
                await writer.drain()
            while data := await reader.read(65_536):
                self.taken_bytes[number] += len(data)
                if kind == b"e":
                    writer.write(data)
        except ConnectionError:
            pass
        finally:
            self.ended.set()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def rate_bps(self, seconds: float, number: int = 0) -> float:
        """Measured at the receiving end of connection `number`."""
        begin_s, begin_bytes = time.monotonic(), self.taken_bytes[number]
        await asyncio.sleep(seconds)
        return (self.taken_bytes[number] - begin_bytes) * 8 / (time.monotonic() - begin_s)


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    broker = Broker()
    server = await asyncio.start_server(broker.accept, "127.0.0.1", 0)
    broker.port = server.sockets[0].getsockname()[1]
    async with server:
        yield broker
        server.close()
        await broker.stop()


def link_to(broker: Broker, rate_bps: float, *, delay_s: float = 0.0, uplink: Bucket | None = None) -> EmulatedLink:
    return EmulatedLink(
        broker_host="127.0.0.1",
        broker_port=broker.port,
        uplink=uplink if uplink is not None else Bucket(rate_bps),
        downlink=Bucket(rate_bps),
        uplink_delay_s=delay_s,
        downlink_delay_s=delay_s,
    )


@asynccontextmanager
async def connected(link: EmulatedLink, kind: bytes) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection(link.host, link.port)
    writer.write(kind)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@asynccontextmanager
async def saturated(link: EmulatedLink) -> AsyncIterator[None]:
    """An agent's connection that sends without end."""

    async def send(writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(bytes(65_536))
                await writer.drain()

    async with connected(link, b"u") as (_, writer):
        task = asyncio.create_task(send(writer))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            writer.transport.abort()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - counters have no event
            await asyncio.sleep(0.01)


async def round_trip_s(streams: Streams) -> float:
    begin_s = time.monotonic()
    streams[1].write(bytes(100))
    await streams[0].readexactly(100)
    return time.monotonic() - begin_s


@pytest.mark.parametrize(("rate_bps", "delay_s"), [(1 * MBIT, 0.0), (20 * MBIT, 0.0), (20 * MBIT, 0.1)])
async def test_an_uplink_has_its_rate_whatever_its_delay(broker: Broker, rate_bps: float, delay_s: float) -> None:
    async with link_to(broker, rate_bps, delay_s=delay_s) as link, saturated(link):
        await until(lambda: link.uplink_bytes > rate_bps / 8 * 0.1)
        assert await broker.rate_bps(2.0) == pytest.approx(rate_bps, rel=0.15)


async def test_a_downlink_has_its_own_rate(broker: Broker) -> None:
    async with link_to(broker, 20 * MBIT) as link, connected(link, b"d") as (reader, _):
        link.set_rate(downlink_bps=5 * MBIT)
        assert (link.uplink.rate_bps, link.downlink.rate_bps) == (20 * MBIT, 5 * MBIT)
        received = len(await reader.readexactly(100_000))
        begin_s = time.monotonic()
        while time.monotonic() < begin_s + 2:
            received += len(await reader.read(65_536))
        assert (received - 100_000) * 8 / (time.monotonic() - begin_s) == pytest.approx(5 * MBIT, rel=0.15)


async def test_a_change_of_rate_is_in_force_at_once(broker: Broker) -> None:
    async with link_to(broker, 20 * MBIT) as link, saturated(link):
        await until(lambda: link.uplink_bytes > 200_000)
        link.set_rate(2 * MBIT)
        await asyncio.sleep(0.1)
        assert await broker.rate_bps(1.5) == pytest.approx(2 * MBIT, rel=0.15)
        link.set_rate(20 * MBIT)
        assert await broker.rate_bps(1.5) == pytest.approx(20 * MBIT, rel=0.15)


async def test_nothing_passes_during_an_outage_and_the_connection_outlives_it(broker: Broker) -> None:
    async with link_to(broker, 4 * MBIT) as link, saturated(link):
        await until(lambda: link.uplink_bytes > 50_000)
        link.set_rate(0)
        await asyncio.sleep(0.1)
        assert await broker.rate_bps(0.5) == 0
        link.set_rate(4 * MBIT)
        assert await broker.rate_bps(1.5) == pytest.approx(4 * MBIT, rel=0.15)


async def test_two_connections_get_equal_shares(broker: Broker) -> None:
    async with link_to(broker, 8 * MBIT) as link, saturated(link), saturated(link):
        await until(lambda: len(broker.taken_bytes) == 2 and min(broker.taken_bytes.values()) > 50_000)
        first, second = await asyncio.gather(broker.rate_bps(1.5, 0), broker.rate_bps(1.5, 1))
        assert first + second == pytest.approx(8 * MBIT, rel=0.15)
        assert first == pytest.approx(second, rel=0.3)


async def test_links_that_share_a_bucket_share_its_rate(broker: Broker) -> None:
    channel = Bucket(8 * MBIT)
    async with link_to(broker, 0, uplink=channel) as one, link_to(broker, 0, uplink=channel) as other:
        async with saturated(one), saturated(other):
            await until(lambda: min(one.uplink_bytes, other.uplink_bytes) > 50_000)
            first, second = await asyncio.gather(broker.rate_bps(1.5, 0), broker.rate_bps(1.5, 1))
        assert first + second == pytest.approx(8 * MBIT, rel=0.15)
        assert first == pytest.approx(second, rel=0.3)


async def test_a_small_message_passes_a_bulk_transfer_that_fills_the_link(broker: Broker) -> None:
    async with link_to(broker, 4 * MBIT) as link, saturated(link), connected(link, b"e") as control:
        await until(lambda: link.uplink_bytes > 100_000)
        trips_s = sorted([await round_trip_s(control) for _ in range(11)])
        assert trips_s[5] < 0.1


async def test_an_idle_link_delays_by_what_it_was_set_to(broker: Broker) -> None:
    async with link_to(broker, 20 * MBIT, delay_s=0.05) as link, connected(link, b"e") as control:
        trips_s = [await round_trip_s(control) for _ in range(5)]
        assert 0.1 <= min(trips_s) < 0.13
        link.set_delay(0.0, 0.02)
        assert link.delay_s == (0.0, 0.02)
        trips_s = [await round_trip_s(control) for _ in range(5)]
        assert 0.02 <= min(trips_s) < 0.04


async def test_the_sender_meets_backpressure_before_the_kernel_swallows_much(broker: Broker) -> None:
    async with link_to(broker, 0) as link:
        with socket.create_connection((link.host, link.port)) as agent:
            agent.setblocking(False)
            accepted = 0
            for _ in range(20):
                with contextlib.suppress(BlockingIOError):
                    while True:
                        accepted += agent.send(bytes(65_536))
                await asyncio.sleep(0.01)
            assert accepted < 400_000


async def test_a_finished_connection_is_delivered_whole_counted_and_closed_on_both_sides(broker: Broker) -> None:
    async with link_to(broker, 20 * MBIT, delay_s=0.02) as link, connected(link, b"e") as (reader, writer):
        sent = bytes(range(256)) * 400
        writer.write(sent)
        writer.write_eof()
        assert await reader.read(-1) == sent
        await until(lambda: link.connections == 0)
        assert broker.ended.is_set()
        assert (link.uplink_bytes, link.downlink_bytes) == (len(sent) + 1, len(sent))


async def test_a_cut_drops_connections_and_refuses_new_ones_until_restored(broker: Broker) -> None:
    async with link_to(broker, 20 * MBIT) as link, connected(link, b"e") as control:
        await round_trip_s(control)
        port = link.port
        await link.cut()
        await link.cut()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await round_trip_s(control)
        await asyncio.wait_for(broker.ended.wait(), 5)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(link.host, port)
        await link.restore()
        await link.restore()
        assert link.port == port
        async with connected(link, b"e") as again:
            await round_trip_s(again)


async def test_a_broker_that_breaks_off_is_noticed_by_the_agent(broker: Broker) -> None:
    async with link_to(broker, 20 * MBIT) as link, connected(link, b"e") as control:
        await round_trip_s(control)
        await broker.stop()
        assert await asyncio.wait_for(control[0].read(), 5) == b""


async def test_an_unreachable_broker_is_one_line_in_the_log_and_the_connection_is_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    lines: list[str] = []
    link = EmulatedLink(
        broker_host="127.0.0.1", broker_port=port, uplink=Bucket(MBIT), downlink=Bucket(MBIT), log=lines.append
    )
    async with link:
        reader, writer = await asyncio.open_connection(link.host, link.port)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
    assert lines == [f"the broker at 127.0.0.1:{port} can't be reached: connection refused; connection closed"]


async def test_a_port_in_use_is_refused_with_one_line(broker: Broker) -> None:
    link = EmulatedLink(
        broker_host="127.0.0.1", broker_port=1, uplink=Bucket(MBIT), downlink=Bucket(MBIT), port=broker.port
    )
    with pytest.raises(
        ListenRefused, match=rf"^can't listen on 127\.0\.0\.1:{broker.port}: address already in use; .*$"
    ):
        await link.restore()


async def test_a_bucket_never_grants_more_than_its_rate_and_its_burst() -> None:
    bucket, granted, begin_s = Bucket(10 * MBIT), 0, time.monotonic()
    while time.monotonic() < begin_s + 0.3:
        granted += await bucket.take(1_000_000)
        most = (time.monotonic() - begin_s) * 10 * MBIT / 8 + BURST_S * 10 * MBIT / 8 + 8
        assert granted <= most
    await asyncio.sleep(0.2)
    idle = 0
    begin_s = time.monotonic()
    while time.monotonic() < begin_s + 0.02:
        idle += await bucket.take(1_000)
    assert idle * 8 <= (time.monotonic() - begin_s + BURST_S) * 10 * MBIT + 64


async def test_a_cancelled_turn_does_not_hold_up_the_next() -> None:
    bucket = Bucket(0)
    first, second = asyncio.create_task(bucket.take(10_000)), asyncio.create_task(bucket.take(100))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert not second.done()
    bucket.set_rate(MBIT)
    assert await asyncio.wait_for(second, 5) == 100


def test_rates_turns_and_delays_that_make_no_sense_are_refused() -> None:
    for rate_bps in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rate"):
            Bucket(rate_bps)
        with pytest.raises(ValueError, match="rate"):
            Bucket(1).set_rate(rate_bps)
    with pytest.raises(ValueError, match="at least 1 byte"):
        asyncio.run(Bucket(1).take(0))
    with pytest.raises(ValueError, match="delay"):
        EmulatedLink(broker_host="", broker_port=1, uplink=Bucket(1), downlink=Bucket(1), uplink_delay_s=-1)
    assert Bucket(1).quantum_bytes == SMALLEST_QUANTUM_BYTES
