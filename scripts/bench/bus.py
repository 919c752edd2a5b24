"""A transfer over a real broker on loopback, beside raw QoS 1 publishing of the same bytes in the same run."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from msgspec import Struct

from broker_config import topics
from broker_config.bus import MqttBus
from broker_config.messages import Bulk, Chunk, new_id
from broker_config.mosquitto import render
from broker_config.settings import BrokerSettings
from broker_config.transfer import Inbox, send
from scripts.bench.measure import Timed
from scripts.demo.processes import free_port, processes

PAYLOAD_BYTES = 16_000_000
CHUNK_BYTES = (65_536, 262_144)
IN_FLIGHT = 8


class BusRow(Struct, frozen=True, kw_only=True):
    """One broker and chunk size. Both directions: publisher to broker to subscriber."""

    broker: str
    chunk_bytes: int
    transfer: Timed
    raw: Timed

    @property
    def transfer_mb_per_s(self) -> float:
        return PAYLOAD_BYTES / self.transfer.median_s / 1e6

    @property
    def share_of_raw(self) -> float:
        """Transfer speed over raw publishing speed."""
        return self.raw.median_s / self.transfer.median_s


async def bus_bench(folder: Path, *, repeats: int) -> list[BusRow]:
    """Rows for the embedded broker, and for Mosquitto where it is installed."""
    rows = []
    for kind in ("amqtt", "mosquitto"):
        if kind == "mosquitto" and shutil.which("mosquitto") is None:
            continue
        async with _buses(kind, folder) as (one, other):
            for chunk_bytes in CHUNK_BYTES:
                seconds: dict[str, list[float]] = {"transfer": [], "raw": []}
                for counted in [False] + [True] * repeats:
                    for name, run in (("transfer", _transfer), ("raw", _raw)):
                        start = time.perf_counter()
                        await run(one, other, chunk_bytes)
                        if counted:
                            seconds[name].append(time.perf_counter() - start)
                rows.append(
                    BusRow(
                        broker=kind,
                        chunk_bytes=chunk_bytes,
                        transfer=Timed.of(seconds["transfer"]),
                        raw=Timed.of(seconds["raw"]),
                    )
                )
    return rows


@asynccontextmanager
async def _buses(kind: str, folder: Path) -> AsyncIterator[tuple[MqttBus, MqttBus]]:
    async with AsyncExitStack() as stack:
        programs = await stack.enter_async_context(processes(folder))
        port = free_port()
        if kind == "amqtt":
            await programs.start(kind, ["coordinator.cli", "broker", "--port", str(port)])
        else:
            configuration = folder / "mosquitto.conf"
            await asyncio.to_thread(configuration.write_text, render("127.0.0.1", port, None, None))
            await programs.start_program(kind, ["mosquitto", "-c", str(configuration)])
        settings = BrokerSettings(port=port, backoff_first_s=0.1, backoff_cap_s=0.3)
        one, other = (MqttBus(settings=settings, site="bench", client_id=new_id()) for _ in range(2))
        await stack.enter_async_context(one)
        await stack.enter_async_context(other)
        await one.connected(20)
        await other.connected(20)
        yield one, other


async def _transfer(one: MqttBus, other: MqttBus, chunk_bytes: int) -> None:
    async with Inbox(bulk=other, control=other, agent="b") as inbox:
        transfer = new_id()
        incoming = inbox.expect(transfer)
        sending = asyncio.create_task(
            send(
                bulk=one,
                control=one,
                sender="a",
                receiver="b",
                transfer=transfer,
                request=new_id(),
                pieces=[bytes(PAYLOAD_BYTES)],
                total_bytes=PAYLOAD_BYTES,
                chunk_bytes=chunk_bytes,
                expires_s=60,
                window_bytes=IN_FLIGHT * chunk_bytes,
            )
        )
        await incoming.payload(60)
        await sending


async def _raw(one: MqttBus, other: MqttBus, chunk_bytes: int) -> None:
    """The same chunks, IN_FLIGHT at once, without acknowledgement end to end."""
    count = -(-PAYLOAD_BYTES // chunk_bytes)
    seen, done = 0, asyncio.Event()

    def take(_message: Bulk, _parameters: Mapping[str, str]) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            done.set()

    subscription = await other.subscribe(topics.BULK, take, receiver="raw")
    slots = asyncio.Semaphore(IN_FLIGHT)
    chunk = Chunk(transfer=new_id(), index=0, crc32=0, data=bytes(chunk_bytes))

    async def publish() -> None:
        async with slots:
            await one.publish(topics.BULK, chunk, receiver="raw", sender="a")

    await asyncio.gather(*(publish() for _ in range(count)))
    await done.wait()
    await subscription.close()
