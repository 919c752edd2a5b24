"""Whole agents on a bus in memory, and the test in the coordinator's place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self, cast

from broker_config import topics
from broker_config.bus import MqttBus
from broker_config.messages import (
    AnswerOrder,
    AnswerOutcome,
    AnswerPiece,
    Bulk,
    Order,
    Outcome,
    Part,
    SendOrder,
    SendOutcome,
    TextReply,
    TextRequest,
    new_id,
)
from edge_agent.agent import Agent
from edge_agent.engine import Engine
from edge_agent.kv.cache import Cache
from edge_agent.library import Library
from edge_agent.link_quality import LinkMeter
from edge_agent.memory import ContextStore, Held
from edge_agent.settings import AgentSettings, MemorySettings, TelemetrySettings
from tests.memory_bus import MemoryBroker, MemoryBus

PATIENCE_S = 20.0
QUESTION = "Which valve?"

NORTH = "The pump of the north tank stopped at noon because its filter was full of sand. The crew came at four."
SOUTH = "Valve 3 in the south was closed before the storm. Relay 7 failed, and the panel showed a wrong depth."


class ConnectedBus(MemoryBus):
    """A MemoryBus that is connected from the start, as an agent needs it."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker, "home")
        broker.buses.append(self)
        self._hooks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    def add_on_connect(self, hook: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            await hook()

        self._hooks.append(asyncio.create_task(run()))


class MemoryAgent(Agent):
    """An agent whose two connections are to a broker in memory."""

    def __init__(self, settings: AgentSettings, broker: MemoryBroker) -> None:
        super().__init__(settings)
        self._broker = broker

    def _buses(self) -> tuple[MqttBus, MqttBus]:
        return cast("MqttBus", ConnectedBus(self._broker)), cast("MqttBus", ConnectedBus(self._broker))

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def store(self) -> ContextStore:
        return self._store

    @property
    def link(self) -> LinkMeter:
        return self._link

    @property
    def inbox_bytes(self) -> int:
        """What the inbox holds, or has promised to hold."""
        return self._parts._inbox.buffered_bytes

    @property
    def library(self) -> Library:
        return self._library


def kept(store: ContextStore, context_id: str) -> Cache | None:
    """A context's cache, if it is in memory; it counts as no use."""
    form = store._forms.get(context_id)
    return None if form is None else store.shelf.take(form)


class Site:
    """Agents, and all that they say to the coordinator. `texts` are the texts that the coordinator holds."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.agents: dict[str, MemoryAgent] = {}
        self.said: list[Outcome] = []
        self.pieces: list[AnswerPiece] = []
        self.bulk: list[Bulk] = []
        self.texts: dict[str, str | None] = {}
        self.bus = self.broker.bus()
        self._online: set[str] = set()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._replies: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()

    async def open(self) -> None:
        for topic, handler in (
            (topics.PRESENCE, self._presence),
            (topics.OUTCOMES, self._outcome),
            (topics.ANSWERS, self._collect(self.pieces)),
            (topics.BULK, self._collect(self.bulk)),
            (topics.TELEMETRY, self._collect([])),
        ):
            await self.bus.subscribe(cast("topics.Topic[Any]", topic), handler)

    async def start(
        self, name: str, bundle: Path, *texts: str, budget_mb: float = 64.0, spill: Path | None = None
    ) -> list[Held]:
        """An agent that holds these texts and has made their caches."""
        settings = AgentSettings(
            agent=name,
            bundle=str(bundle),
            memory=MemorySettings(cache_budget_mb=budget_mb, spill_folder=str(spill) if spill else None),
            telemetry=TelemetrySettings(interval_s=0.1, probe_interval_s=3_600),
        )
        agent = self.agents[name] = MemoryAgent(settings, self.broker)
        self._running[name] = asyncio.create_task(agent.run(), name=name)
        await self.until(lambda: name in self._online)
        held = [await agent.library.add(f"text-{number}", text) for number, text in enumerate(texts)]
        await self.until(lambda: all(info.cached for info in agent.store.infos()))
        return held

    async def stop(self, *names: str) -> None:
        """Stop these agents (all without names), in good order."""
        for name in names or tuple(self._running):
            running = self._running.pop(name)
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            self._online.discard(name)

    async def order(self, agent: str, *orders: Order) -> None:
        for each in orders:
            await self.bus.publish(topics.ORDERS, each, agent=agent)

    async def until(self, holds: Callable[[], Any]) -> None:
        """Wait until something that an agent said makes it true."""
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                self._news.clear()
                await self._news.wait()

    def sent(self, transfer: str) -> list[SendOutcome]:
        return [each for each in self.said if isinstance(each, SendOutcome) and each.transfer == transfer]

    def said_by(self, agent: str) -> SendOutcome:
        """The first end of a transfer that this agent told of."""
        return next(each for each in self.said if isinstance(each, SendOutcome) and each.agent == agent)

    def answered(self, request: str) -> list[AnswerOutcome]:
        return [each for each in self.said if isinstance(each, AnswerOutcome) and each.request == request]

    async def send_outcome(self, order: SendOrder) -> SendOutcome:
        await self.until(lambda: self.sent(order.transfer))
        return self.sent(order.transfer)[0]

    async def answer(self, receiver: str, order: AnswerOrder) -> AnswerOutcome:
        """Give the order and wait for its end."""
        await self.order(receiver, order)
        await self.until(lambda: self.answered(order.request))
        return self.answered(order.request)[0]

    def _presence(self, presence: Any, _: Mapping[str, str]) -> None:
        if presence.state == "online":
            self._online.add(presence.agent)
        self._news.set()

    def _outcome(self, message: Outcome, _: Mapping[str, str]) -> None:
        self.said.append(message)
        if isinstance(message, TextRequest) and message.context_id in self.texts:
            reply = TextReply(
                request=message.request,
                transfer=message.transfer,
                context_id=message.context_id,
                text=self.texts[message.context_id],
            )
            task = asyncio.create_task(self.order(message.agent, reply))
            self._replies.add(task)
            task.add_done_callback(self._replies.discard)
        self._news.set()

    def _collect(self, into: list[Any]) -> Callable[[Any, Mapping[str, str]], None]:
        def collect(message: Any, _: Mapping[str, str]) -> None:
            into.append(message)
            self._news.set()

        return collect


async def queued(engine: Engine, count: int) -> None:
    """Wait until so many wait for the model; nobody is told of that before the next telemetry."""
    async with asyncio.timeout(PATIENCE_S):
        while engine.turns.waiting < count:  # noqa: ASYNC110
            await asyncio.sleep(0)


@asynccontextmanager
async def running_site() -> AsyncIterator[Site]:
    site = Site()
    await site.open()
    try:
        yield site
    finally:
        await site.stop()


def send_order(held: Held, receiver: str, **changes: Any) -> SendOrder:
    """Send the whole cache, lossless."""
    fields: dict[str, Any] = {
        "request": new_id(),
        "transfer": new_id(),
        "context_id": held.context_id,
        "receiver": receiver,
        "own_tokens": 0,
        "rung": "float32",
        "expires_s": 30.0,
        "chunk_bytes": 16_384,
    }
    return SendOrder(**(fields | changes))


def part_of(held: Held, sender: str, **changes: Any) -> Part:
    """A part of a question that is to come as a whole cache, lossless."""
    fields: dict[str, Any] = {
        "transfer": new_id(),
        "sender": sender,
        "context_id": held.context_id,
        "tokens": len(held.ids),
        "own_tokens": 0,
        "rung": "float32",
    }
    return Part(**(fields | changes))


def answer_order(*parts: Part, **changes: Any) -> AnswerOrder:
    fields: dict[str, Any] = {
        "request": new_id(),
        "asker": "somebody",
        "question": QUESTION,
        "parts": parts,
        "part_timeout_s": 10.0,
        "expires_s": 30.0,
        "max_new_tokens": 6,
    }
    return AnswerOrder(**(fields | changes))


def order_for(part: Part, question: AnswerOrder, receiver: str, **changes: Any) -> SendOrder:
    """The order that brings a part."""
    fields: dict[str, Any] = {
        "request": question.request,
        "transfer": part.transfer,
        "context_id": part.context_id,
        "receiver": receiver,
        "own_tokens": part.own_tokens,
        "rung": part.rung,
        "expires_s": 30.0,
        "chunk_bytes": 16_384,
    }
    return SendOrder(**(fields | changes))
