"""The bus and transfers over real brokers: the embedded one and Mosquitto."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from broker_config.broker import EmbeddedBroker
from broker_config.bus import BusState, MqttBus, Will
from broker_config.errors import BrokerRefusedToStart, BrokerUnreachable, PublishTimeout
from broker_config.messages import CancelOrder, Order, Presence, Probe, new_id
from broker_config.settings import BrokerSettings
from broker_config.topics import ORDERS, PRESENCE, PROBES
from broker_config.transfer import Inbox, send
from broker_config.users import add_user
from tests.broker_config.brokers import HOST, Amqtt, Mosquitto, RealBroker, free_port

pytestmark = [pytest.mark.integration, pytest.mark.timeout(40)]

INSTANCE = "0123456789abcdef"
SITE = "home"
PATIENCE_S = 10.0
SUBACK = 0x90


def _broker(kind: str, directory: Path, users: Path | None = None) -> Amqtt | Mosquitto:
    return Amqtt(users) if kind == "amqtt" else Mosquitto(directory, users)


@pytest.fixture(params=["amqtt", "mosquitto"])
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RealBroker]:
    """A broker without users."""
    async with _broker(request.param, tmp_path) as running:
        yield running


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    """What tests open and need not close."""
    async with AsyncExitStack() as opened:
        yield opened


def _bus(port: int, client_id: str, **options: Any) -> MqttBus:
    keys = ("username", "password_file", "publish_timeout_s", "backoff_first_s", "keepalive_s")
    given = {key: options.pop(key) for key in keys if key in options}
    settings = BrokerSettings(host=HOST, port=port, **{"backoff_first_s": 0.05, "backoff_cap_s": 0.2} | given)
    return MqttBus(settings=settings, site=SITE, client_id=client_id, **options)


async def _connected(stack: AsyncExitStack, port: int, client_id: str, **options: Any) -> MqttBus:
    bus = await stack.enter_async_context(_bus(port, client_id, **options))
    await bus.connected(PATIENCE_S)
    return bus


class Recorder:
    """A handler that can be waited on."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self._news = asyncio.Event()

    def __call__(self, message: Any, _: Mapping[str, str]) -> None:
        self.messages.append(message)
        self._news.set()

    async def until(self, last: Any) -> list[Any]:
        """All messages up to this one."""
        async with asyncio.timeout(PATIENCE_S):
            while last not in self.messages:
                self._news.clear()
                await self._news.wait()
        return self.messages


def _presence(agent: str, state: Any = "online") -> Presence:
    return Presence(agent=agent, instance=INSTANCE, state=state)


def _cancel(reason: str) -> Order:
    return CancelOrder(request=INSTANCE, reason=reason)


async def test_messages_arrive_with_their_parameters(broker: RealBroker, stack: AsyncExitStack) -> None:
    one, other = [await _connected(stack, broker.port, name) for name in ("one", "other")]
    got: list[tuple[Order, Mapping[str, str]]] = []
    arrived = asyncio.Event()

    def take(order: Order, parameters: Mapping[str, str]) -> None:
        got.append((order, parameters))
        arrived.set()

    subscription = await other.subscribe(ORDERS, take)
    await one.publish(ORDERS, _cancel("first"), agent="pi-7")
    await asyncio.wait_for(arrived.wait(), PATIENCE_S)
    assert got == [(_cancel("first"), {"agent": "pi-7"})]
    await subscription.close()
    await one.publish(ORDERS, _cancel("second"), agent="pi-7")
    recorder = Recorder()
    await other.subscribe(PROBES, recorder)
    await one.publish(PROBES, Probe(sequence=1), agent="pi-7")
    await recorder.until(Probe(sequence=1))
    assert len(got) == 1


async def test_who_listens_while_another_stops_listening_hears(broker: RealBroker, stack: AsyncExitStack) -> None:
    """To the same topic, at the same moment, in either order: a question is asked while another one ends."""
    one, other = [await _connected(stack, broker.port, name) for name in ("one", "other")]
    before = await other.subscribe(ORDERS, Recorder(), agent="pi-7")
    for number in range(60):
        recorder = Recorder()
        both: list[Any] = [before.close(), other.subscribe(ORDERS, recorder, agent="pi-7")]
        done = await asyncio.gather(*(both if number % 2 else both[::-1]))
        before = next(each for each in done if each is not None)
        await one.publish(ORDERS, _cancel(str(number)), agent="pi-7")
        await recorder.until(_cancel(str(number)))


async def test_large_messages_at_once_all_arrive(broker: RealBroker, stack: AsyncExitStack) -> None:
    one, other = [await _connected(stack, broker.port, name) for name in ("one", "other")]
    recorder = Recorder()
    await other.subscribe(PROBES, recorder, agent="pi-1")
    probes = [Probe(sequence=number, padding=bytes(262_144)) for number in range(60)]
    await asyncio.gather(*(one.publish(PROBES, probe, agent="pi-1") for probe in probes))
    for probe in probes:
        await recorder.until(probe)


async def test_the_bus_outlives_the_broker_and_subscribes_again(broker: RealBroker, stack: AsyncExitStack) -> None:
    states: list[BusState] = []
    one = await _connected(stack, broker.port, "one", on_state=states.append)
    other = await _connected(stack, broker.port, "other")
    recorder, again = Recorder(), asyncio.Event()
    await other.subscribe(ORDERS, recorder, agent="pi-1")

    async def announce() -> None:
        again.set()
        await other.publish(PRESENCE, _presence("pi-1"), agent="pi-1")

    other.add_on_connect(announce)
    await broker.kill()
    publishing = asyncio.create_task(one.publish(ORDERS, _cancel("while it was away"), agent="pi-1"))
    await broker.restart()
    await asyncio.wait_for(again.wait(), PATIENCE_S)
    await publishing
    await one.publish(ORDERS, _cancel("after"), agent="pi-1")
    await recorder.until(_cancel("after"))
    presence = Recorder()
    await one.subscribe(PRESENCE, presence)
    await presence.until(_presence("pi-1"))
    assert one.connections == other.connections == 2
    assert states[:2] == [BusState.CONNECTING, BusState.CONNECTED]
    assert BusState.BACKOFF in states
    assert states[-1] is BusState.CONNECTED


async def test_a_broker_that_is_not_there_yet_is_waited_for(stack: AsyncExitStack, tmp_path: Path) -> None:
    late = Amqtt()
    bus = await stack.enter_async_context(_bus(late.port, "early", publish_timeout_s=0.3))
    recorder = Recorder()
    await bus.subscribe(ORDERS, recorder)
    with pytest.raises(BrokerUnreachable, match="connection refused"):
        await bus.connected(0.3)
    with pytest.raises(BrokerUnreachable, match=f"no MQTT broker at {HOST}:{late.port}: connection refused"):
        await bus.publish(ORDERS, _cancel("x"), agent="pi-1")
    await stack.enter_async_context(late)
    await bus.connected(PATIENCE_S)
    await bus.publish(ORDERS, _cancel("y"), agent="pi-1")
    await recorder.until(_cancel("y"))


async def _impostor(stack: AsyncExitStack, answer: bytes, *, hangs_up: bool = False) -> int:
    """A server that gives this answer to the first bytes and is silent then, or hangs up; returns its port."""
    serving: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        await reader.read(100)
        writer.write(answer)
        if not hangs_up:
            await reader.read()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, HOST, 0)

    async def stop() -> None:
        server.close()
        await asyncio.gather(*(task for task in serving if task is not None), return_exceptions=True)

    stack.push_async_callback(stop)
    return int(server.sockets[0].getsockname()[1])


async def test_a_broker_that_does_not_answer_is_named(stack: AsyncExitStack) -> None:
    port = await _impostor(stack, b"")
    settings = BrokerSettings(port=port, connect_timeout_s=0.1, backoff_first_s=0.05)
    async with MqttBus(settings=settings, site=SITE, client_id="one") as bus:
        with pytest.raises(BrokerUnreachable, match="accepted the connection but did not answer"):
            await bus.connected(0.5)


async def test_a_connection_that_ends_with_its_welcome_is_made_again(stack: AsyncExitStack) -> None:
    port = await _impostor(stack, b"\x20\x02\x00\x00", hangs_up=True)
    states: list[BusState] = []
    tried_again = asyncio.Event()

    def note(state: BusState) -> None:
        states.append(state)
        if states.count(BusState.CONNECTING) == 5:
            tried_again.set()

    await stack.enter_async_context(_bus(port, "one", on_state=note))
    await asyncio.wait_for(tried_again.wait(), PATIENCE_S)


@pytest.mark.parametrize("kind", ["amqtt", "mosquitto"])
async def test_one_users_file_serves_both_brokers(kind: str, stack: AsyncExitStack, tmp_path: Path) -> None:
    users, right, wrong = tmp_path / "users", tmp_path / "right", tmp_path / "wrong"
    add_user(users, "pi-1", "s3cret")
    right.write_text("s3cret\n", encoding="utf-8")
    wrong.write_text("secret\n", encoding="utf-8")
    broker: RealBroker = await stack.enter_async_context(_broker(kind, tmp_path, users))
    bus = await _connected(stack, broker.port, "good", username="pi-1", password_file=str(right))
    known = {"username": "pi-1", "password_file": str(wrong)}
    for credentials in (known, {}):
        # the id of the good one: whoever does not know the password must not disturb it
        stranger = await stack.enter_async_context(_bus(broker.port, "good", **credentials))
        with pytest.raises(BrokerUnreachable, match="not authorized; check username and password_file"):
            await stranger.connected(0.4)
        await stranger.__aexit__()
    recorder = Recorder()
    await bus.subscribe(ORDERS, recorder)
    await bus.publish(ORDERS, _cancel("still here"), agent="pi-1")
    await recorder.until(_cancel("still here"))
    assert bus.connections == 1


async def test_a_password_file_that_is_not_there_is_named(broker: RealBroker, stack: AsyncExitStack) -> None:
    bus = await stack.enter_async_context(_bus(broker.port, "one", username="pi-1", password_file=str(Path("absent"))))
    with pytest.raises(BrokerUnreachable, match="can't read password_file absent: No such file"):
        await bus.connected(0.3)


async def test_the_will_is_published_when_a_connection_is_cut_and_not_after_a_goodbye(
    broker: RealBroker, stack: AsyncExitStack
) -> None:
    watcher = await _connected(stack, broker.port, "watcher")
    recorder = Recorder()
    await watcher.subscribe(PRESENCE, recorder)
    for agent in ("pi-1", "pi-2"):
        will = Will(topic=PRESENCE, message=_presence(agent, "offline"), parameters={"agent": agent})
        bus = await _connected(stack, broker.port, agent, will=will, persistent=True)
        await bus.publish(PRESENCE, _presence(agent), agent=agent)
        if agent == "pi-1":
            await bus.__aexit__()
        else:
            _cut(bus)
    await recorder.until(_presence("pi-2", "offline"))
    assert _presence("pi-1", "offline") not in recorder.messages
    late = Recorder()
    await (await _connected(stack, broker.port, "late")).subscribe(PRESENCE, late)
    await late.until(_presence("pi-2", "offline"))
    assert sorted(each.agent for each in late.messages) == ["pi-1", "pi-2"]


def _cut(bus: MqttBus) -> None:
    """As if the network had: no goodbye."""
    assert bus._link is not None
    sock: Any = bus._link.client._client.socket()
    sock.shutdown(socket.SHUT_RDWR)


def _connect_packet(client_id: bytes, keepalive_s: int, will: tuple[str, bytes] | None, *, clean: bool = True) -> bytes:
    """A CONNECT of MQTT 3.1.1 by hand, for a client that then does nothing."""

    def field(value: bytes) -> bytes:
        return len(value).to_bytes(2, "big") + value

    flags = (0x02 if clean else 0) | (0x04 | 0x20 if will else 0)
    body = field(b"MQTT") + bytes([4, flags]) + keepalive_s.to_bytes(2, "big") + field(client_id)
    if will:
        body += field(will[0].encode()) + field(will[1])
    length, encoded = len(body), b""
    while True:
        length, digit = divmod(length, 128)
        encoded += bytes([digit | (0x80 if length else 0)])
        if not length:
            return b"\x10" + encoded + body


async def _packet(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The first byte of the next MQTT packet, and its body."""
    first, length, shift = (await reader.readexactly(1))[0], 0, 0
    while True:
        digit = (await reader.readexactly(1))[0]
        length |= (digit & 0x7F) << shift
        shift += 7
        if not digit & 0x80:
            return first, await reader.readexactly(length)


async def test_a_client_that_falls_silent_is_taken_for_gone(broker: RealBroker, stack: AsyncExitStack) -> None:
    from broker_config.wire import pack  # noqa: PLC0415

    watcher, recorder = await _connected(stack, broker.port, "watcher"), Recorder()
    await watcher.subscribe(PRESENCE, recorder)
    _, writer = await asyncio.open_connection(HOST, broker.port)
    stack.callback(writer.close)
    address = PRESENCE.at(site=SITE, agent="silent")
    writer.write(_connect_packet(b"silent", 1, (address, pack(_presence("silent", "offline")))))
    await recorder.until(_presence("silent", "offline"))


async def test_two_clients_of_one_id_take_turns_slowly(broker: RealBroker, stack: AsyncExitStack) -> None:
    options = {"persistent": True, "backoff_first_s": 0.2}
    one, two = [await stack.enter_async_context(_bus(broker.port, "same", **options)) for _ in range(2)]
    sleeping = asyncio.create_task(asyncio.sleep(2))
    await sleeping
    assert 2 <= one.connections + two.connections <= 30


async def test_two_clients_of_one_id_never_lock_each_other_out(broker: RealBroker, stack: AsyncExitStack) -> None:
    turns = [asyncio.Semaphore(0) for _ in range(2)]
    for turn in turns:
        will = Will(topic=PRESENCE, message=_presence("same", "offline"), parameters={"agent": "same"})
        bus = _bus(broker.port, "same", persistent=True, will=will, backoff_first_s=0.02)
        await bus.subscribe(PRESENCE, Recorder(), agent="same")

        async def announce(bus: MqttBus = bus, turn: asyncio.Semaphore = turn) -> None:
            turn.release()
            await bus.publish(PRESENCE, _presence("same"), agent="same")

        bus.add_on_connect(announce)
        await stack.enter_async_context(bus)
    for _ in range(8):
        for turn in turns:
            # Less than the 5 s after which a publish or a connect gives up, and so hides that nobody answers
            await asyncio.wait_for(turn.acquire(), 4)


async def test_a_client_is_heard_before_it_acknowledges(broker: RealBroker, stack: AsyncExitStack) -> None:
    sender = await _connected(stack, broker.port, "sender")
    await sender.publish(PRESENCE, _presence("pi-1"), agent="pi-1")
    reader, writer = await asyncio.open_connection(HOST, broker.port)
    stack.callback(writer.close)
    writer.write(_connect_packet(b"pi-1", 60, None))
    for topic in (PRESENCE, ORDERS):  # the first has a retained message, which is never acknowledged
        address = topic.at(site=SITE, agent="pi-1").encode()
        body = b"\x00\x01" + len(address).to_bytes(2, "big") + address + b"\x01"
        writer.write(b"\x82" + bytes([len(body)]) + body)
        async with asyncio.timeout(2):
            while (await _packet(reader))[0] != SUBACK:
                pass


async def test_who_takes_a_persistent_session_over_is_not_deaf(broker: RealBroker, stack: AsyncExitStack) -> None:
    recorder = Recorder()
    first = await _connected(stack, broker.port, "same", persistent=True, backoff_first_s=10)
    await first.subscribe(ORDERS, Recorder(), agent="pi-1")
    second = _bus(broker.port, "same", persistent=True)
    await second.subscribe(ORDERS, recorder, agent="pi-1")
    await stack.enter_async_context(second)
    await second.connected(PATIENCE_S)
    other = await _connected(stack, broker.port, "other")
    await other.publish(ORDERS, _cancel("to whom?"), agent="pi-1")
    await recorder.until(_cancel("to whom?"))


async def test_orders_wait_for_a_persistent_session(broker: RealBroker, stack: AsyncExitStack) -> None:
    async with _bus(broker.port, "pi-1", persistent=True) as bus:
        await bus.connected(PATIENCE_S)
        await bus.subscribe(ORDERS, Recorder(), agent="pi-1")
    other = await _connected(stack, broker.port, "other")
    await other.publish(ORDERS, _cancel("while you slept"), agent="pi-1")
    back, recorder = _bus(broker.port, "pi-1", persistent=True), Recorder()
    await back.subscribe(ORDERS, recorder, agent="pi-1")
    await stack.enter_async_context(back)
    await recorder.until(_cancel("while you slept"))


async def test_a_newcomer_gets_the_retained_messages_it_asked_for_only(
    broker: RealBroker, stack: AsyncExitStack
) -> None:
    old = await _connected(stack, broker.port, "old")
    await old.subscribe(PRESENCE, Recorder())
    await asyncio.gather(*(old.publish(PRESENCE, _presence(f"pi-{n}"), agent=f"pi-{n}") for n in range(30)))
    newcomers = [_bus(broker.port, f"new-{number}") for number in range(10)]
    recorders = [Recorder() for _ in newcomers]
    for bus, recorder in zip(newcomers, recorders, strict=True):
        await bus.subscribe(PRESENCE, recorder, agent="pi-3")
    await asyncio.gather(*(stack.enter_async_context(bus) for bus in newcomers))
    for recorder in recorders:
        assert await recorder.until(_presence("pi-3")) == [_presence("pi-3")]


async def test_one_subscriber_that_does_not_read_holds_up_nobody(broker: RealBroker, stack: AsyncExitStack) -> None:
    reader, writer = await asyncio.open_connection(HOST, broker.port, limit=1)
    stack.callback(writer.close)
    address = PROBES.at(site=SITE, agent="pi-1").encode()
    subscribe = b"\x00\x01" + len(address).to_bytes(2, "big") + address + b"\x01"
    writer.write(_connect_packet(b"stuck", 60, None) + b"\x82" + bytes([len(subscribe)]) + subscribe)
    await reader.readexactly(4 + 5)  # CONNACK and SUBACK; then never again
    one, other = [await _connected(stack, broker.port, name) for name in ("one", "other")]
    recorder = Recorder()
    await other.subscribe(PROBES, recorder, agent="pi-1")
    for start in range(0, 240, 20):
        probes = [Probe(sequence=start + number, padding=bytes(262_144)) for number in range(20)]
        await asyncio.gather(*(one.publish(PROBES, probe, agent="pi-1") for probe in probes))
        for probe in probes:
            await recorder.until(probe)
        recorder.messages.clear()


async def _pair(stack: AsyncExitStack, port: int) -> tuple[MqttBus, MqttBus, Inbox]:
    sender = [await _connected(stack, port, name) for name in ("s-bulk", "s")]
    receiver = [await _connected(stack, port, name) for name in ("r-bulk", "r")]
    inbox = await stack.enter_async_context(Inbox(bulk=receiver[0], control=receiver[1], agent="pi-2"))
    return sender[0], sender[1], inbox


async def test_twenty_megabytes_arrive_in_seconds(broker: RealBroker, stack: AsyncExitStack) -> None:
    bulk, control, inbox = await _pair(stack, broker.port)
    payload, name = os.urandom(20_000_000), new_id()
    sending = send(
        bulk=bulk,
        control=control,
        sender="pi-1",
        receiver="pi-2",
        transfer=name,
        request=new_id(),
        pieces=[payload],
        total_bytes=len(payload),
        chunk_bytes=262_144,
        expires_s=30,
    )
    sent, got = await asyncio.gather(sending, inbox.expect(name).payload(30))
    assert got == payload
    assert sent.wire_bytes < 1.01 * len(payload)
    assert sent.payload_bytes / sent.transfer_s > 2e6


async def test_a_transfer_goes_on_when_the_broker_was_killed(broker: RealBroker, stack: AsyncExitStack) -> None:
    bulk, control, inbox = await _pair(stack, broker.port)
    payload, name = os.urandom(3_000_000), new_id()
    sending = asyncio.create_task(
        send(
            bulk=bulk,
            control=control,
            sender="pi-1",
            receiver="pi-2",
            transfer=name,
            request=new_id(),
            pieces=[payload],
            total_bytes=None,
            rate_bps=24e6,
            expires_s=30,
        )
    )
    incoming = inbox.expect(name)
    got = b""
    async for piece in incoming.pieces():
        if not got:
            await broker.kill()
            await broker.restart()
        got += piece
    assert got == payload
    assert (await sending).payload_bytes == len(payload)
    assert inbox.buffered_bytes == 0


async def test_a_publish_without_an_answer_times_out(stack: AsyncExitStack) -> None:
    port = await _impostor(stack, b"\x20\x02\x00\x00")
    bus = await _connected(stack, port, "one", publish_timeout_s=0.2)
    with pytest.raises(PublishTimeout, match=r"a message on kvbus/home/agents/pi-1/orders within 0\.2 s"):
        await bus.publish(ORDERS, _cancel("x"), agent="pi-1")


async def test_a_port_in_use_is_named() -> None:
    port = free_port()
    async with EmbeddedBroker(HOST, port):
        with pytest.raises(BrokerRefusedToStart, match=f"port {port} on {HOST} is in use"):
            async with EmbeddedBroker(HOST, port):
                pass


async def test_port_0_takes_a_free_one() -> None:
    async with EmbeddedBroker(port=0) as broker:
        assert broker.port > 0


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x10\xff\xff\xff\x7f", b"\x30\x00", b"\x10\x02\x00\x04"]
)
async def test_garbage_does_not_disturb_the_embedded_broker(garbage: bytes, stack: AsyncExitStack) -> None:
    broker = await stack.enter_async_context(EmbeddedBroker(port=0))
    reader, writer = await asyncio.open_connection(HOST, broker.port)
    writer.write(garbage)
    writer.write_eof()
    async with asyncio.timeout(PATIENCE_S):
        await reader.read()
    writer.close()
    await _connected(stack, broker.port, "one")


async def test_a_packet_that_is_too_large_for_any_message_ends_its_connection(stack: AsyncExitStack) -> None:
    broker = await stack.enter_async_context(EmbeddedBroker(port=0))
    reader, writer = await asyncio.open_connection(HOST, broker.port)
    stack.callback(writer.close)
    writer.write(_connect_packet(b"large", 60, None))
    assert await reader.readexactly(4) == b"\x20\x02\x00\x00"
    writer.write(b"\x30\xff\xff\xff\x7f" + b"\x00\x01a" + bytes(1_000))
    async with asyncio.timeout(PATIENCE_S):
        assert await reader.read() == b""
