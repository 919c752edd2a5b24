"""amqtt's broker with what is missing in it (0.12.1), each fix beside its reason. Imported by broker.py only.

- A client that falls silent is never noticed: handle_read_timeout does nothing, so no will is ever published for a
  device that lost its power. Here a watchdog cuts connections by their keep-alive.
- A client is stored under its id, and the old session of that id deleted, before its password is checked. Here the
  password comes first.
- A second connection of a clean session leaves the first one open; one of a persistent session is marked
  disconnected, and so deaf, when the first one ends. Here the first one is cut and its end is waited for.
- On connecting, a client is sent every retained message anybody has subscribed to, in a loop that another
  subscription breaks. Here it gets its own, and the loop goes over a copy.
- A persistent client that comes back is heard only once all that was under way for it is acknowledged, up to 10 s and
  even if it is gone again: two clients with one id then never get an answer. Here it is heard at once.
- What waits for a slow subscriber has no limit, and delivered messages stay in memory behind a stuck one.
  Here both are bounded; like Mosquitto, it then drops for that subscriber.
- A packet may announce 256 MiB, which would be read. Here connections that exceed the largest message are cut.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker
from amqtt.contexts import BrokerConfig, ListenerConfig, ListenerType
from amqtt.errors import MQTTError
from amqtt.mqtt.connack import NOT_AUTHORIZED, ConnackPacket
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.plugins.base import BaseAuthPlugin
from amqtt.session import OutgoingApplicationMessage
from amqtt.utils import gen_client_id

from broker_config.topics import TOPICS
from broker_config.users import verify

logger = logging.getLogger(__name__)

MAX_PACKET_BYTES = max(topic.max_bytes for topic in TOPICS) + 4_096
MAX_QUEUED_BYTES = 32 << 20  # for one subscriber; 32 transfers with a full window
MAX_OFFLINE_MESSAGES = 256  # for one persistent session that is away
SESSION_EXPIRY_S = 86_400
HANDSHAKE_S = 10.0  # from the TCP connection to CONNECT
WATCH_S = 1.0
KEEP_ALIVES = 1.5  # MQTT 3.1.1, 3.1.2.10
READ_BUFFER_BYTES = 1 << 18
CUT_S = 2.0  # less than the patience of a client that waits to come in


@dataclass
class UsersConfig:
    """Configuration of UsersPlugin. users: path of the file, None for an open broker."""

    users: str | None = None


class UsersPlugin(BaseAuthPlugin):  # type: ignore[misc]
    """amqtt's question whether a client may come in, answered from a file of broker_config.users."""

    Config = UsersConfig

    async def authenticate(self, *, session: Any) -> bool:
        """True for everybody on an open broker, otherwise for the right password."""
        if self.config.users is None:
            return True
        if not session.username or not session.password:
            return False
        # In a thread: the hash takes some 10 ms, in which a broker moves a megabyte
        return await asyncio.to_thread(verify, Path(self.config.users), session.username, session.password)


class _TimedReader(asyncio.StreamReader):
    """Knows when bytes last arrived, also in the middle of a packet that takes a minute on a slow link."""

    heard_s = 0.0

    def feed_data(self, data: Any) -> None:
        self.heard_s = asyncio.get_running_loop().time()
        super().feed_data(data)


@dataclass(eq=False)
class _Connection:
    reader: _TimedReader
    transport: asyncio.Transport
    patience_s: float = HANDSHAKE_S
    client_id: str | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class _CappedReader(StreamReaderAdapter):  # type: ignore[misc]
    """Cuts a connection that announces more than any message of ours has."""

    def __init__(self, connection: _Connection) -> None:
        super().__init__(connection.reader)
        self.connection = connection

    async def read(self, n: int = -1) -> bytes:
        if n > MAX_PACKET_BYTES:
            logger.warning("client %s sent a packet of %d bytes and was cut off", self.connection.client_id, n)
            self.connection.transport.abort()
            raise ConnectionResetError
        data: bytes = await super().read(n)
        return data


class _BoundedHandler(BrokerProtocolHandler):  # type: ignore[misc]
    """Bounds what waits for its client, and keeps nothing of what was delivered."""

    queued_bytes = 0
    dropping = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._late: set[asyncio.Task[None]] = set()

    def later(self, delivery: Coroutine[Any, Any, None]) -> None:
        """Deliver while the client is served, and only as long as it is."""
        task = asyncio.create_task(delivery, name="kvbus embedded broker: late delivery")
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    async def stop(self) -> None:
        for task in self._late:
            task.cancel()
        await super().stop()

    async def _retry_deliveries(self) -> None:
        self.later(super()._retry_deliveries())

    async def mqtt_publish(self, topic: str, data: bytes, qos: int, retain: bool, ack_timeout: Any = None) -> Any:
        overfull = self.queued_bytes + len(data) > MAX_QUEUED_BYTES
        if overfull and not self.dropping:
            logger.warning("a subscriber is too slow for %s: messages to it are dropped", topic)
        self.dropping = overfull
        if not overfull and self.session is not None:
            self.queued_bytes += len(data)
            try:
                # It gives up waiting for PUBACK after 5 s, which a slow link needs; the bytes are on their way
                with suppress(TimeoutError):
                    await super().mqtt_publish(topic, data, qos, retain, ack_timeout)
            finally:
                self.queued_bytes -= len(data)
        return OutgoingApplicationMessage(None, topic, 0, b"", retain)


class _StableDict(dict[str, Any]):
    """Can change while somebody iterates over its keys."""

    def __iter__(self) -> Any:
        return iter(tuple(super().keys()))


class HardenedBroker(Broker):  # type: ignore[misc]
    """amqtt's broker on one TCP listener, with the fixes above."""

    def __init__(self, host: str, port: int, users: Path | None) -> None:
        plugin = f"{UsersPlugin.__module__}.{UsersPlugin.__qualname__}"
        listener = ListenerConfig(type=ListenerType.TCP, bind=f"{host}:{port}")
        super().__init__(
            BrokerConfig(
                listeners={"default": listener},
                session_expiry_interval=SESSION_EXPIRY_S,
                plugins={plugin: {"users": str(users) if users is not None else None}},
            )
        )
        self._host, self._port = host.strip("[]"), port
        self._subscriptions = _StableDict()
        self._open: set[_Connection] = set()
        self._watchdog: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def bound_port(self) -> int:
        """The port it listens on."""
        return int(self._servers["default"].instance.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Listen. Raises amqtt's BrokerError, caused by what went wrong."""
        await super().start()
        self._watchdog = asyncio.create_task(self._watch(), name="kvbus embedded broker: watchdog")

    async def close(self) -> None:
        """Cut all connections and stop."""
        self._closing = True
        if self._watchdog is not None:
            self._watchdog.cancel()
        for server in self._servers.values():
            server.instance.close()
        await self._cut(set(self._open))
        await self.shutdown()

    async def stream_connected(self, reader: _TimedReader, writer: asyncio.StreamWriter, listener_name: str) -> None:
        """One connection from its first byte to its last."""
        reader.heard_s = asyncio.get_running_loop().time()
        connection = _Connection(reader, writer.transport)  # type: ignore[arg-type]
        self._open.add(connection)
        try:
            await self._client_connected(listener_name, _CappedReader(connection), StreamWriterAdapter(writer))
        except Exception as error:  # noqa: BLE001  (nothing a client sends may reach the loop's exception handler)
            logger.debug("connection of %s failed: %r", connection.client_id, error)
        finally:
            self._open.discard(connection)
            connection.ended.set()
            writer.close()

    async def _create_server_instance(self, listener_name: str, *_: Any) -> asyncio.Server:
        loop = asyncio.get_running_loop()

        def protocol() -> asyncio.StreamReaderProtocol:
            serve = partial(self.stream_connected, listener_name=listener_name)
            return asyncio.StreamReaderProtocol(_TimedReader(limit=READ_BUFFER_BYTES, loop=loop), serve, loop=loop)

        return await loop.create_server(protocol, self._host or None, self._port, reuse_address=True)

    async def _initialize_client_session(self, reader: Any, writer: Any, *_: Any) -> tuple[_BoundedHandler, Any]:
        handler, arrived = await _BoundedHandler.init_from_connect(reader, writer, self.plugins_manager)
        if not await super()._authenticate(arrived, None):
            await ConnackPacket.build(0, NOT_AUTHORIZED).to_stream(writer)
            raise MQTTError(f"client {arrived.client_id} has a wrong user name or password")
        arrived.client_id = arrived.client_id or gen_client_id()
        await self._cut({each for each in self._open if each.client_id == arrived.client_id})
        connection: _Connection = reader.connection
        connection.client_id = arrived.client_id
        connection.patience_s = KEEP_ALIVES * arrived.keep_alive if arrived.keep_alive else float("inf")
        arrived.keep_alive = 0  # amqtt's own timer: costs a task for every packet and does nothing
        return handler, await self._session_for(arrived)

    async def _session_for(self, arrived: Any) -> Any:
        """The session a client goes on with: the kept one with the new will, or a new one."""
        kept, _ = self._sessions.get(arrived.client_id, (None, None))
        if kept is None or kept.clean_session or arrived.clean_session:
            await self._delete_session(arrived.client_id)
            arrived.parent = 0
            return arrived
        for name in ("will_flag", "will_topic", "will_message", "will_qos", "will_retain", "username", "keep_alive"):
            setattr(kept, name, getattr(arrived, name))
        kept.parent = 1
        return kept

    async def _authenticate(self, *_: Any) -> bool:
        return True  # done in _initialize_client_session, before the client's id counts for anything

    async def _publish_retained_messages_for_subscription(self, subscription: tuple[str, int], session: Any) -> None:
        topic_filter, _ = subscription
        handler = self._get_handler(session)
        own = any(subscriber is session for subscriber, _ in self._subscriptions.get(topic_filter, ()))
        if own and handler is not None:
            handler.later(super()._publish_retained_messages_for_subscription(subscription, session))

    async def _publish_session_retained_messages(self, session: Any) -> None:
        handler = self._get_handler(session)
        if handler is not None:
            handler.later(super()._publish_session_retained_messages(session))

    async def _retain_broadcast_message(self, broadcast: dict[str, Any], qos: int, target_session: Any) -> None:
        while target_session.retained_messages.qsize() >= MAX_OFFLINE_MESSAGES:
            target_session.retained_messages.get_nowait()
        await super()._retain_broadcast_message(broadcast, qos, target_session)

    async def _cleanup_session(self, client_id: str) -> None:
        # The list of sessions to clean up may be older than a client's return
        if self._closing or all(each.client_id != client_id for each in self._open):
            await super()._cleanup_session(client_id)

    async def _watch(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(WATCH_S)
            for connection in tuple(self._open):
                if clock() - connection.reader.heard_s > connection.patience_s:
                    connection.transport.abort()

    async def _cut(self, connections: set[_Connection]) -> None:
        """End connections as if the network had, and wait until their wills are on their way."""
        for connection in connections:
            connection.transport.abort()
        with suppress(TimeoutError):
            async with asyncio.timeout(CUT_S):
                for connection in connections:
                    await connection.ended.wait()
