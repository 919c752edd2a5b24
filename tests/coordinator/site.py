"""A coordinator on the bus in memory, with agents and an asker that do what a test tells them, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from broker_config import topics
from broker_config.errors import BrokerUnreachable
from broker_config.messages import (
    AnswerOrder,
    AnswerOutcome,
    AnswerPiece,
    Ask,
    CancelAsk,
    CancelOrder,
    ContextInfo,
    CoordinatorPresence,
    CoordinatorRequest,
    Ended,
    ModelInfo,
    Order,
    Outcome,
    PartOutcome,
    Piece,
    Planned,
    Refused,
    RoundEvent,
    SendOrder,
    SendOutcome,
    SendProgress,
)
from broker_config.topics import Topic
from coordinator.journal import Journal
from coordinator.keeping import Keeper
from coordinator.recorder import RecordedBus
from coordinator.service import Coordinator
from coordinator.settings import CoordinatorSettings, PlanningSettings
from tests.coordinator.builders import MODEL, context, instance, presence, telemetry
from tests.memory_bus import MemoryBroker, MemoryBus

M = TypeVar("M")
O = TypeVar("O", bound=Order)  # noqa: E741  (an order)

ASKER = "client-1"
TIMEOUT_S = 30.0
SETTINGS = CoordinatorSettings(planning=PlanningSettings(policy="kv", round_timeout_s=TIMEOUT_S))


class FallibleBus(MemoryBus):
    """The coordinator's; publishing on the topics in `failing` fails."""

    def __init__(self, broker: MemoryBroker, site: str) -> None:
        super().__init__(broker, site)
        self.failing: set[str] = set()

    async def publish(self, topic: Topic[M], message: M, **parameters: str) -> None:
        if topic.pattern in self.failing:
            await asyncio.sleep(0)
            raise BrokerUnreachable("memory", "it was told to fail")
        await super().publish(topic, message, **parameters)


class FakeAgent:
    """Reports every second and keeps the orders it gets, in `orders`; does nothing with them by itself."""

    def __init__(
        self,
        broker: MemoryBroker,
        name: str,
        contexts: Iterable[ContextInfo] = (),
        *,
        number: int = 1,
        model: ModelInfo | None = MODEL,
    ) -> None:
        self.bus, self.name, self.contexts, self.number = broker.bus(), name, tuple(contexts), number
        self.orders: list[Order] = []
        self.sending: tuple[SendProgress, ...] = ()
        self._model = model
        self._news = asyncio.Event()
        self._sequence = 0
        self._beat: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Online, and reporting."""
        await self.bus.subscribe(topics.ORDERS, self._take, agent=self.name)
        await self.say("online")
        await self.report()
        self._beat = asyncio.create_task(self._report_on(), name=f"reports of {self.name}")

    async def fall_silent(self) -> None:
        """No more reports."""
        if self._beat is not None:
            self._beat.cancel()
            await asyncio.wait({self._beat})

    async def say(self, state: str, *, number: int | None = None) -> None:
        """Presence, of this instance or of another."""
        message = presence(self.name, number or self.number, state, self._model)
        await self.bus.publish(topics.PRESENCE, message, agent=self.name)

    async def report(self) -> None:
        """Telemetry, once; what it sends has moved on by the next."""
        known = telemetry(self.name, self.number, self._sequence, contexts=self.contexts)
        message = msgspec.structs.replace(known, sending=self.sending)
        self.sending = tuple(
            msgspec.structs.replace(each, moved_bytes=each.moved_bytes + 1_000) for each in self.sending
        )
        self._sequence += 1
        await self.bus.publish(topics.TELEMETRY, message, agent=self.name)

    async def order(self, kind: type[O], nth: int = 1) -> O:
        """The first order of a kind, or the nth, waited for."""
        while len(found := self.orders_of(kind)) < nth:
            self._news.clear()
            await self._news.wait()
        return found[nth - 1]

    def orders_of(self, kind: type[O]) -> list[O]:
        """All orders of a kind that have come."""
        return [order for order in self.orders if isinstance(order, kind)]

    async def tell(self, outcome: Outcome) -> None:
        """On this agent's own topic, whatever the outcome says of its agent."""
        await self.bus.publish(topics.OUTCOMES, outcome, agent=self.name)

    async def piece(self, order: AnswerOrder, index: int, text: str) -> None:
        """A piece of the answer."""
        piece = AnswerPiece(request=order.request, agent=self.name, index=index, text=text)
        await self.bus.publish(topics.ANSWERS, piece, agent=self.name, request=order.request)

    async def _report_on(self) -> None:
        while True:
            await asyncio.sleep(1)
            with suppress(BrokerUnreachable):
                await self.report()

    def _take(self, order: Order, _: Mapping[str, str]) -> None:
        self.orders.append(order)
        self._news.set()


class FakeAsker:
    """Asks, and keeps what it is told."""

    def __init__(self, broker: MemoryBroker, name: str = ASKER) -> None:
        self.bus, self.name = broker.bus(), name
        self.events: list[RoundEvent] = []
        self._news = asyncio.Event()

    async def start(self) -> None:
        await self.bus.subscribe(topics.EVENTS, self._take, client=self.name)

    async def ask(self, ask: Ask) -> None:
        await self._request(ask)

    async def withdraw(self, ask: Ask) -> None:
        await self._request(CancelAsk(request=ask.request))

    async def end(self, request: str) -> Ended | Refused:
        """The end of a question, waited for."""
        while not (ends := self.ends(request)):
            self._news.clear()
            await self._news.wait()
        return ends[0]

    def ends(self, request: str) -> list[Ended | Refused]:
        """Everything that says that a question has ended. It should be one."""
        return [event for event in self.of(request) if isinstance(event, Ended | Refused)]

    def of(self, request: str) -> list[RoundEvent]:
        """What was told of one question."""
        return [event for event in self.events if request_of(event) == request]

    def answer(self, request: str) -> str:
        """The pieces put together."""
        return "".join(event.text for event in self.of(request) if isinstance(event, Piece))

    async def _request(self, request: CoordinatorRequest) -> None:
        await self.bus.publish(topics.REQUESTS, request)

    def _take(self, event: RoundEvent, _: Mapping[str, str]) -> None:
        self.events.append(event)
        self._news.set()


class FakeSite:
    """Two senders and a receiver, a coordinator, an asker."""

    def __init__(self, folder: Path, broker: MemoryBroker) -> None:
        self.broker = broker
        self.journal_path, self.learned_path = folder / "rounds.jsonl", folder / "learned.json"
        self.pi_1 = FakeAgent(broker, "pi-1", [context("report", 400)])
        self.pi_2 = FakeAgent(broker, "pi-2", [context("log", 300)])
        self.receiver = FakeAgent(broker, "jetson-1", [context("plan", 200)])
        self.agents = [self.pi_1, self.pi_2, self.receiver]
        self.asker = FakeAsker(broker)
        self.bus = FallibleBus(broker, "home")
        self.recorded: RecordedBus | None = None
        self.seen: list[CoordinatorPresence] = []

    async def start_coordinator(self, settings: CoordinatorSettings = SETTINGS, record: Path | None = None) -> None:
        """With the journal that the one before it left, and with what that had learned. record: as `run` has it."""
        self.broker.buses.append(self.bus)
        self.journal, keeper = Journal(self.journal_path), Keeper(self.learned_path)
        self.coordinator = Coordinator(settings)
        self.recorded = RecordedBus.begin(self.bus, record, settings, keeper.learned) if record else None
        await self.coordinator.join(self.recorded or self.bus, self.journal, keeper)
        self.serving = asyncio.create_task(self.coordinator.serve(), name="coordinator")
        await asyncio.sleep(0.01)  # virtual: whatever is retained has been heard

    async def stop_coordinator(self) -> None:
        """In good order, as on SIGTERM."""
        self.serving.cancel()
        await asyncio.wait({self.serving})
        self._forget_coordinator()

    async def kill_coordinator(self) -> None:
        """As by kill -9: it says nothing any more and writes nothing any more."""
        self.bus.failing = {topic.pattern for topic in topics.TOPICS}
        self._forget_coordinator()
        self.serving.cancel()
        await asyncio.wait({self.serving})

    def _forget_coordinator(self) -> None:
        if self.recorded is not None:
            self.recorded.close()
        self.broker.buses.remove(self.bus)
        self.bus = FallibleBus(self.broker, "home")
        self.journal.close()

    async def deliver(self, order: AnswerOrder, sends: Iterable[FakeAgent]) -> None:
        """These senders' transfers end delivered."""
        for sender in sends:
            send = await sender.order(SendOrder)
            assert send.transfer in {part.transfer for part in order.parts}
            await sender.tell(sent(send, sender.name))


def request_of(event: RoundEvent) -> str:
    """Of which question an event tells."""
    return event.report.request if isinstance(event, Planned | Ended) else event.request


def question(number: int = 1, **changes: object) -> Ask:
    """Of both senders, to jetson-1."""
    fields: dict[str, object] = {
        "request": instance(number),
        "client": ASKER,
        "question": "Which valve?",
        "sources": ("pi-1", "pi-2"),
        "receiver": "jetson-1",
    }
    return Ask(**{**fields, **changes})  # type: ignore[arg-type]


def sent(order: SendOrder, agent: str, **changes: object) -> SendOutcome:
    """Delivered."""
    fields: dict[str, object] = {
        "request": order.request,
        "transfer": order.transfer,
        "agent": agent,
        "state": "delivered",
        "payload_bytes": 1000,
        "wire_bytes": 1200,
        "encode_s": 0.25,
        "transfer_s": 0.5,
    }
    return SendOutcome(**{**fields, **changes})  # type: ignore[arg-type]


def answered(order: AnswerOrder, agent: str = "jetson-1", **changes: object) -> AnswerOutcome:
    """With every part delivered."""
    fields: dict[str, object] = {
        "request": order.request,
        "agent": agent,
        "state": "answered",
        "answer": "the north one",
        "answer_tokens": 3,
        "question_s": 0.125,
        "parts": tuple(
            PartOutcome(transfer=part.transfer, sender=part.sender, state="delivered", payload_bytes=1000)
            for part in order.parts
        ),
    }
    return AnswerOutcome(**{**fields, **changes})  # type: ignore[arg-type]


@asynccontextmanager
async def fake_site(
    folder: Path,
    broker: MemoryBroker | None = None,
    settings: CoordinatorSettings = SETTINGS,
    record: Path | None = None,
) -> AsyncIterator[FakeSite]:
    """Started, with every agent known. At the end everything is stopped, and no task may be left."""
    site = FakeSite(folder, broker or MemoryBroker())
    async with AsyncExitStack() as stack:
        for agent in site.agents:
            stack.push_async_callback(agent.fall_silent)
            await agent.start()
        await site.asker.start()
        await site.start_coordinator(settings, record)
        try:
            yield site
        finally:
            if not site.serving.done():
                await site.stop_coordinator()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks that nobody awaited: {left}"


def cancelled(agent: FakeAgent) -> bool:
    """Whether an agent was told to stop."""
    return bool(agent.orders_of(CancelOrder))
