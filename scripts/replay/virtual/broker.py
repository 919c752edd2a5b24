"""The bus in virtual time: messages take the time that their bits take on the links of those who speak and listen.

Everybody listens before anybody speaks, so nothing is retained. The connection of an agent outlives outages, as a TCP
connection does up to its keep-alive: what is said meanwhile comes late, in order.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

from broker_config import topics
from broker_config.bus import Handler, Subscription
from broker_config.errors import PublishTimeout
from broker_config.messages import Probe, Telemetry
from broker_config.settings import BrokerSettings
from broker_config.topics import Topic
from broker_config.wire import pack
from scripts.replay.network import Network

M = TypeVar("M")

PUBLISH_TIMEOUT_S = BrokerSettings().publish_timeout_s
ENVELOPE_BYTES = 100
"""Topic, MQTT's header and TCP's of one message."""

_Parameters = tuple[tuple[str, str], ...]


def after_last(last_s: float, due_s: float) -> float:
    """When something is due that may not overtake what is due at last_s: a timer set later may be
    called first if they have one time."""
    return max(math.nextafter(last_s, math.inf), due_s)


@dataclass(frozen=True, kw_only=True)
class Access:
    """An agent's link to the broker: the channels that its bits pass each way, and how long a signal takes one way."""

    network: Network
    up: tuple[str, ...]
    down: tuple[str, ...]
    delay_s: Callable[[], float]


class Pipe:
    """One way of a control connection: messages arrive in the order in which they were put."""

    def __init__(self, network: Network, passes: tuple[str, ...], delay_s: Callable[[], float]) -> None:
        self._network, self._passes, self._delay_s = network, passes, delay_s
        self._waiting: deque[tuple[float, Callable[[], None]]] = deque()
        self._carrying: asyncio.Task[None] | None = None
        self._last_s = 0.0

    def put(self, bits: float, deliver: Callable[[], None]) -> None:
        """To be delivered at the other end."""
        if self._carrying is None:
            soon_s = self._network.alone_s(self._passes, bits)
            if soon_s is not None:
                self._arrive(soon_s, deliver)
                return
            self._carrying = asyncio.create_task(self._carry(), name="control messages on a busy link")
        self._waiting.append((bits, deliver))

    async def _carry(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, deque()
            await self._network.carry(self._passes, sum(bits for bits, _ in batch))
            for _, deliver in batch:
                self._arrive(0.0, deliver)
        self._carrying = None

    def _arrive(self, after_s: float, deliver: Callable[[], None]) -> None:
        loop = self._network.loop
        self._last_s = after_last(self._last_s, loop.time() + after_s + self._delay_s())
        loop.call_at(self._last_s, deliver)


@dataclass(eq=False)
class VirtualBroker:
    """Connects buses. Belongs to one event loop."""

    site: str
    _listening: dict[tuple[str, _Parameters], list[_Listener]] = field(default_factory=dict)
    _telemetry_bits: dict[tuple[int, int], float] = field(default_factory=dict)

    @cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The one that it belongs to."""
        return asyncio.get_running_loop()

    def bus(self, access: Access | None = None) -> VirtualBus:
        """A client behind a link, or one beside the broker."""
        return VirtualBus(self, access)

    def listen(self, topic: Topic[Any], parameters: Mapping[str, str], listener: _Listener) -> None:
        self._listening.setdefault((topic.pattern, _sorted(parameters)), []).append(listener)

    def forget(self, topic: Topic[Any], parameters: Mapping[str, str], listener: _Listener) -> None:
        self._listening[topic.pattern, _sorted(parameters)].remove(listener)

    def carry(self, topic: Topic[Any], parameters: dict[str, str], message: Any, bits: float) -> None:
        """To all who listen to this topic with these parameters, or whatever they are; beside the broker at once."""
        for wanted in dict.fromkeys((_sorted(parameters), ())):
            for listener in tuple(self._listening.get((topic.pattern, wanted), ())):
                deliver = partial(listener.handler, message, parameters)
                if listener.down is None:
                    deliver()
                else:
                    listener.down.put(bits, deliver)

    def bits(self, message: Any) -> float:
        """Of a message on its way. Reports of as much say are taken to be as long as the first one was."""
        if isinstance(message, Telemetry):
            much = len(message.contexts), len(message.sending)
            if much not in self._telemetry_bits:
                self._telemetry_bits[much] = _bits(message)
            return self._telemetry_bits[much]
        return _bits(message)


class VirtualBus:
    """One client's control connection; implements broker_config.bus.Bus."""

    def __init__(self, broker: VirtualBroker, access: Access | None) -> None:
        self._broker = broker
        self._up = Pipe(access.network, access.up, access.delay_s) if access else None
        self._down = Pipe(access.network, access.down, access.delay_s) if access else None

    @property
    def site(self) -> str:
        return self._broker.site

    async def publish(self, topic: Topic[M], message: M, **parameters: str) -> None:
        """It is on its way; nobody waits for the broker's word."""
        self.post(topic, message, **parameters)

    def post(self, topic: Topic[M], message: M, **parameters: str) -> None:
        """The same at once."""
        bits = self._broker.bits(message)
        carry = partial(self._broker.carry, topic, parameters, message, bits)
        if self._up is None:
            self._broker.loop.call_soon(carry)  # not while who speaks is still at it
        else:
            self._up.put(bits, carry)

    async def subscribe(self, topic: Topic[M], handler: Handler[M], **parameters: str) -> Subscription:
        """From now on. All parameters, or none."""
        listener = _Listener(handler, self._down)
        self._broker.listen(topic, parameters, listener)
        return _Listening(self._broker, topic, parameters, listener)


class ProbeBus:
    """An agent's bulk connection as its link meter uses it; implements broker_config.bus.Bus for probes."""

    def __init__(self, access: Access, site: str) -> None:
        self._access, self._site = access, site
        self._handler: Handler[Any] | None = None
        self._returning: set[asyncio.Task[None]] = set()

    @property
    def site(self) -> str:
        return self._site

    async def publish(self, topic: Topic[M], message: M, **parameters: str) -> None:
        """Until the broker has acknowledged it; not if it comes back over a free link, where its coming says as much.

        Raises PublishTimeout.
        """
        assert isinstance(message, Probe)  # noqa: S101  nothing else goes here
        access, loop = self._access, self._access.network.loop
        bits, back = 8.0 * (len(message.padding) + ENVELOPE_BYTES), topic is topics.PROBES
        up_s = access.network.alone_s(access.up, bits)
        down_s = access.network.alone_s(access.down, bits) if back else None
        if up_s is None:
            try:
                async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                    await access.network.carry(access.up, bits)
            except TimeoutError:
                raise PublishTimeout(topic.at(site=self._site, **parameters), PUBLISH_TIMEOUT_S) from None
        elif back and down_s is not None:  # both ways are free: no need to look again on the way
            loop.call_later(up_s + down_s + 2 * access.delay_s(), self._came_back, message, parameters)
            return
        if back:
            task = asyncio.create_task(self._return(up_s or 0.0, bits, message, parameters), name="a probe coming back")
            self._returning.add(task)
            task.add_done_callback(self._returning.discard)
        await asyncio.sleep((up_s or 0.0) + 2 * access.delay_s())

    async def subscribe(self, topic: Topic[M], handler: Handler[M], **parameters: str) -> Subscription:  # noqa: ARG002
        """To what comes back."""
        self._handler = handler
        return _Deaf()

    async def _return(self, after_s: float, bits: float, message: Any, parameters: Mapping[str, str]) -> None:
        await asyncio.sleep(after_s + self._access.delay_s())
        await self._access.network.carry(self._access.down, bits)
        await asyncio.sleep(self._access.delay_s())
        self._came_back(message, parameters)

    def _came_back(self, message: Any, parameters: Mapping[str, str]) -> None:
        if self._handler is not None:
            self._handler(message, parameters)


@dataclass(frozen=True, eq=False)
class _Listener:
    handler: Handler[Any]
    down: Pipe | None


@dataclass(frozen=True)
class _Listening:
    broker: VirtualBroker
    topic: Topic[Any]
    parameters: Mapping[str, str]
    listener: _Listener

    async def close(self) -> None:
        self.broker.forget(self.topic, self.parameters, self.listener)


class _Deaf:
    async def close(self) -> None:
        """The meter never stops listening."""


def _bits(message: Any) -> float:
    return 8.0 * (len(pack(message)) + ENVELOPE_BYTES)


def _sorted(parameters: Mapping[str, str]) -> _Parameters:
    return tuple(sorted(parameters.items()) if len(parameters) > 1 else parameters.items())
