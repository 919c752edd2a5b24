"""A bus in memory, with the troubles of a network under a seed. It packs and unpacks as the real one does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from broker_config.bus import Handler, Route, Routes, Subscription
from broker_config.errors import BrokerUnreachable, MessageRejected
from broker_config.topics import Topic
from broker_config.wire import pack

M = TypeVar("M")

CHECKED_BYTES = 600


@dataclass(frozen=True)
class Trouble:
    """What happens to messages on the way to each subscriber. Shares are probabilities; messages of unequal delay_s
    overtake each other. Only long messages are broken: those are chunks, and have a checksum."""

    lost: float = 0.0
    twice: float = 0.0
    broken: float = 0.0
    delay_s: tuple[float, float] = (0.0, 0.0)


@dataclass
class MemoryBroker:
    """Connects MemoryBuses. `trouble` is by topic pattern; `down` makes every publish fail as an unreachable broker."""

    seed: int = 0
    trouble: Mapping[str, Trouble] = field(default_factory=dict)
    down: bool = False
    retained: dict[str, bytes] = field(default_factory=dict)
    delivered: dict[str, int] = field(default_factory=dict)
    buses: list[MemoryBus] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def bus(self, site: str = "home") -> MemoryBus:
        """A new client."""
        bus = MemoryBus(self, site)
        self.buses.append(bus)
        return bus

    def carry(self, topic: Topic[Any], address: str, payload: bytes) -> None:
        """From a publisher to everyone who listens."""
        if topic.retain:
            self.retained[address] = payload
        for bus in self.buses:
            if any(route.match(address) is not None for route in bus.routes):
                self._toward(bus, topic, address, payload)

    def _toward(self, bus: MemoryBus, topic: Topic[Any], address: str, payload: bytes) -> None:
        trouble, dice = self.trouble.get(topic.pattern, Trouble()), self._random
        for _ in range(2 if dice.random() < trouble.twice else 1):
            if dice.random() < trouble.lost:
                continue
            if len(payload) > CHECKED_BYTES and dice.random() < trouble.broken:
                broken = bytearray(payload)
                broken[dice.randrange(len(broken))] ^= 1 << dice.randrange(8)
                payload = bytes(broken)
            self.delivered[topic.pattern] = self.delivered.get(topic.pattern, 0) + 1
            delay_s = dice.uniform(*trouble.delay_s)
            asyncio.get_running_loop().call_later(delay_s, bus.routes.dispatch, address, payload)


class MemoryBus:
    """One client of a MemoryBroker; implements broker_config.bus.Bus."""

    def __init__(self, broker: MemoryBroker, site: str) -> None:
        self.broker, self._site, self.routes = broker, site, Routes()

    @property
    def site(self) -> str:
        return self._site

    async def publish(self, topic: Topic[M], message: M, **parameters: str) -> None:
        address = topic.at(site=self._site, **parameters)
        typed: Any = message
        payload = pack(typed)
        if len(payload) > topic.max_bytes:
            raise MessageRejected(topic.pattern, f"{len(payload)} bytes, {topic.max_bytes} are allowed")
        await asyncio.sleep(0)
        if self.broker.down:
            raise BrokerUnreachable("memory", "it is down")
        self.broker.carry(topic, address, payload)

    async def subscribe(self, topic: Topic[M], handler: Handler[M], **parameters: str) -> Subscription:
        route = Route(topic, {"site": self._site, **parameters}, handler)
        self.routes.add(route)
        await asyncio.sleep(0)
        for address, payload in tuple(self.broker.retained.items()):
            if route.match(address) is not None:
                self.routes.dispatch(address, payload)
        return _MemorySubscription(self, route)


@dataclass(frozen=True)
class _MemorySubscription:
    bus: MemoryBus
    route: Route

    async def close(self) -> None:
        self.bus.routes.remove(self.route)
