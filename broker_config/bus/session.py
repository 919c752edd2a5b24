"""One asyncio MQTT session that outlives its connections.

aiomqtt neither reconnects nor subscribes again and bounds nothing on the way in. So a background task here moves
through the states of BusState, subscribes again at every connect, and hands incoming messages to their handlers while
they are being read: nothing queues up, a flood is held back by TCP.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar, cast

import aiomqtt
from paho.mqtt.reasoncodes import ReasonCode

from broker_config import discovery
from broker_config.bus.contract import BusState, Handler, Subscription, Will
from broker_config.bus.link import ConnectionLost, Inbound, Link, enter, guard_writer, leave, until_lost, why
from broker_config.bus.routes import Route, Routes
from broker_config.discovery import MDNS
from broker_config.errors import BrokerUnreachable, ConfigurationError, MessageRejected, PublishTimeout
from broker_config.settings import BrokerSettings
from broker_config.topics import Topic
from broker_config.wire import pack

logger = logging.getLogger(__name__)
# what aiomqtt and paho log of a lost connection is said here, once and with its reason
_quiet = logging.getLogger(f"{__name__}.aiomqtt")
_quiet.setLevel(logging.CRITICAL)

M = TypeVar("M")

# A connection shorter than this does not reset the backoff: two clients with one id throw each other out forever, and
# would do so as fast as the broker can answer.
STABLE_S = 5.0
_FAILED_SUBSCRIPTION = 128  # SUBACK return code of MQTT 3.1.1


class MqttBus:
    """A Bus over MQTT 3.1.1, as an async context manager.

    Entering starts the session and returns at once, whether the broker is there or not; leaving says goodbye, so that
    the will is not published. Subscriptions may be made before entering: with persistent=True that is the only way
    not to miss what the broker kept for us. Retained messages come again at every connect.

    max_inflight: QoS 1 messages on their way at once; further ones wait. max_queued: bound of paho's own queue.
    on_state: called at every change of state. client_id must be unique in the site and stable if persistent.
    """

    def __init__(
        self,
        *,
        settings: BrokerSettings,
        site: str,
        client_id: str,
        persistent: bool = False,
        will: Will | None = None,
        max_inflight: int = 20,
        max_queued: int = 1000,
        on_state: Callable[[BusState], None] | None = None,
    ) -> None:
        self._settings, self._site, self._client_id, self._persistent = settings, site, client_id, persistent
        self._max_inflight, self._max_queued = max_inflight, max_queued
        self._on_state = on_state
        self._will = _wire_will(will, site) if will is not None else None
        self._routes = Routes()
        self._hooks: list[Callable[[], Awaitable[None]]] = []
        self._slots = asyncio.Semaphore(min(max_inflight, max_queued))
        self._in_turn = asyncio.Lock()
        """One is answered before the next is asked: a broker may take what is asked at once in any order."""
        self._state = BusState.STOPPED
        self._reason = "not started"
        self._connections = 0
        self._link: Link | None = None
        self._wake = asyncio.Event()  # set while connected, and when the bus has ended
        self._task: asyncio.Task[None] | None = None

    @property
    def site(self) -> str:
        """The site all topics are in."""
        return self._site

    @property
    def state(self) -> BusState:
        """Where the session stands."""
        return self._state

    @property
    def connections(self) -> int:
        """How many times the session has connected."""
        return self._connections

    def add_on_connect(self, hook: Callable[[], Awaitable[None]]) -> None:
        """Run this at every connect, after the subscriptions were made again; say, to publish presence."""
        self._hooks.append(hook)

    async def __aenter__(self) -> Self:
        self._wake.clear()
        self._task = asyncio.create_task(self._run(), name=f"kvbus session of {self._client_id}")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._reason = "the bus is closed"
        self._become(BusState.STOPPED)
        self._wake.set()

    async def connected(self, timeout_s: float | None = None) -> None:
        """Wait for a connection. Raises BrokerUnreachable, with the last reason, after timeout_s (None: no limit)."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._connection()
        except TimeoutError:
            raise BrokerUnreachable(self._settings.address, self._reason) from None

    async def publish(self, topic: Topic[M], message: M, **parameters: str) -> None:
        """See Bus.publish. A message cut off by a lost connection is sent again at the next: expect a duplicate."""
        address = topic.at(site=self._site, **parameters)
        payload = pack(cast("Any", message))
        if len(payload) > topic.max_bytes:
            raise MessageRejected(topic.pattern, f"{len(payload)} bytes, {topic.max_bytes} are allowed")
        handed_over = False
        try:
            async with asyncio.timeout(self._settings.publish_timeout_s), self._slots:
                while True:
                    link = await self._connection()
                    handed_over = True
                    with suppress(ConnectionLost):
                        publishing = link.client.publish(address, payload, topic.qos, topic.retain, timeout=math.inf)
                        await link.unless_lost(publishing, f"kvbus publish to {address}")
                        return
        except TimeoutError:
            if handed_over:
                raise PublishTimeout(address, self._settings.publish_timeout_s) from None
            raise BrokerUnreachable(self._settings.address, self._reason) from None

    async def subscribe(self, topic: Topic[M], handler: Handler[M], **parameters: str) -> Subscription:
        """See Bus.subscribe."""
        fixed = {"site": self._site, **parameters} if "site" in topic.names else parameters
        route = Route(topic, fixed, handler)
        # Asked for even if the filter is there already: the broker then sends the retained messages to this handler.
        wanted = {route.filter: max(topic.qos, self._routes.filters().get(route.filter, 0))}
        self._routes.add(route)
        try:
            async with self._in_turn:
                link = self._link
                refused = await self._subscribe(link, wanted) if link is not None else []
        except BaseException:
            self._routes.remove(route)
            raise
        if refused:
            self._routes.remove(route)
            raise BrokerUnreachable(self._settings.address, f"it refused the subscription to {refused[0]}")
        return _Subscription(self, route)

    async def unsubscribe(self, route: Route) -> None:
        """Used by Subscription.close."""
        if not self._routes.remove(route):
            return
        async with self._in_turn:
            link = self._link
            if link is None or route.filter in self._routes.filters():  # somebody listens again meanwhile
                return
            # If it fails, messages nobody listens to are dropped on arrival until the next connect.
            with suppress(aiomqtt.MqttError, ConnectionLost):
                leaving = link.client.unsubscribe(route.filter, timeout=self._settings.publish_timeout_s)
                await link.unless_lost(leaving, f"kvbus unsubscribe from {route.filter}")

    async def _connection(self) -> Link:
        """The current connection, waited for. Raises BrokerUnreachable if the bus is closed."""
        while True:
            if self._task is None:
                raise BrokerUnreachable(self._settings.address, self._reason)
            if self._link is not None:
                return self._link
            await self._wake.wait()

    async def _subscribe(self, link: Link, filters: dict[str, int]) -> list[str]:
        """Subscribe on a connection; returns the filters refused. Raises BrokerUnreachable if it can't be known."""
        if not filters:
            return []
        asking = link.client.subscribe(list(filters.items()), timeout=self._settings.publish_timeout_s)
        try:
            codes = await link.unless_lost(asking, "kvbus subscribe")
        except ConnectionLost:
            return []  # made at the next connect
        except aiomqtt.MqttError as error:
            raise BrokerUnreachable(self._settings.address, f"no answer to a subscription: {error}") from None
        values = [code.value if isinstance(code, ReasonCode) else code for code in codes]
        return [name for name, value in zip(filters, values, strict=False) if value >= _FAILED_SUBSCRIPTION]

    async def _run(self) -> None:
        """The session: connecting → connected → backoff → connecting, until cancelled."""
        clock = asyncio.get_running_loop().time
        failures = 0
        while True:
            self._become(BusState.CONNECTING)
            started_s = clock()
            before = self._connections
            reason = await self._one_connection()
            lasted = self._connections > before and clock() - started_s >= STABLE_S
            failures = 0 if lasted else failures + 1
            log = logger.warning if reason != self._reason or self._connections > before else logger.debug
            self._reason = reason
            log("no MQTT broker at %s: %s; trying again", self._settings.address, reason)
            self._become(BusState.BACKOFF)
            await asyncio.sleep(backoff_s(self._settings, failures))

    async def _one_connection(self) -> str:
        """Connect, serve until the connection ends, and return the reason why it ended."""
        try:
            client = self._client(*await self._place())
            await enter(client)
        except BrokerUnreachable as error:
            return error.why
        except (aiomqtt.MqttError, ConfigurationError) as error:
            return why(error)
        link = Link(client, asyncio.create_task(until_lost(client), name=f"kvbus connection of {self._client_id}"))
        try:
            for refused in await self._subscribe(link, self._routes.filters()):
                logger.warning("the broker at %s refused the subscription to %s", self._settings.address, refused)
            if link.lost.done():
                return link.lost.result()
            return await self._serve(link)
        except BrokerUnreachable as error:
            return error.why
        finally:
            link.lost.cancel()
            await leave(client)

    async def _serve(self, link: Link) -> str:
        self._link, self._connections = link, self._connections + 1
        self._wake.set()
        self._become(BusState.CONNECTED)
        logger.info("connected to the MQTT broker at %s", self._settings.address)
        hooks = asyncio.create_task(self._run_hooks(), name=f"kvbus on_connect of {self._client_id}")
        try:
            return await asyncio.shield(link.lost)
        finally:
            self._link = None
            self._wake.clear()
            hooks.cancel()
            await asyncio.wait({hooks})

    async def _run_hooks(self) -> None:
        for hook in self._hooks:
            try:
                await hook()
            except Exception:  # one hook's mistake must neither end the session nor keep the others from running
                logger.exception("something that runs at every connect failed")

    async def _place(self) -> tuple[str, int]:
        """Where the broker is now. Raises BrokerUnreachable, ConfigurationError."""
        if self._settings.host == MDNS:
            return await discovery.find(self._site)
        return self._settings.host, self._settings.port

    def _client(self, host: str, port: int) -> aiomqtt.Client:
        """A fresh client for one connection. Raises ConfigurationError if the password can't be read."""
        client = aiomqtt.Client(
            host,
            port,
            username=self._settings.username,
            password=self._settings.password(),
            logger=_quiet,
            identifier=self._client_id,
            queue_type=cast("Any", self._inbound),
            protocol=aiomqtt.ProtocolVersion.V311,
            will=self._will,
            clean_session=not self._persistent,
            timeout=self._settings.connect_timeout_s,
            keepalive=self._settings.keepalive_s,
            max_queued_outgoing_messages=self._max_queued,
            max_inflight_messages=self._max_inflight,
        )
        client.pending_calls_threshold = 1 << 16  # our own bound is the semaphore; its warning is noise
        client._client.connect_timeout = self._settings.connect_timeout_s  # aiomqtt has no way to it
        guard_writer(client)
        return client

    def _inbound(self, maxsize: int = 0) -> asyncio.Queue[aiomqtt.Message]:  # noqa: ARG002  (aiomqtt's signature)
        return Inbound(self._routes)

    def _become(self, state: BusState) -> None:
        if state is not self._state:
            self._state = state
            if self._on_state is not None:
                self._on_state(state)


@dataclass(frozen=True)
class _Subscription:
    bus: MqttBus
    route: Route

    async def close(self) -> None:
        """See Subscription.close."""
        await self.bus.unsubscribe(self.route)


def backoff_s(settings: BrokerSettings, failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubling up to the cap, less up to half of it at random."""
    longest_s = min(settings.backoff_cap_s, settings.backoff_first_s * 2.0 ** min(max(failures - 1, 0), 32))
    jitter: float = random.SystemRandom().uniform(0.5, 1.0)
    return longest_s * jitter


def _wire_will(will: Will, site: str) -> aiomqtt.Will:
    address = will.topic.at(site=site, **will.parameters)
    return aiomqtt.Will(address, pack(will.message), will.topic.qos, will.topic.retain)
