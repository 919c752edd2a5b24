"""Asking from Python what `coordinator ask` asks from a shell.

from coordinator.client import ask
report = ask("When was the pump replaced?", sources=["pi-1"], receiver="jetson-1")
print(report.answer, report.e2e_s)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType

from broker_config import topics
from broker_config.bus import MqttBus, request
from broker_config.errors import BusError, RequestTimeout
from broker_config.messages import (
    DEFAULT_QUALITY_FLOOR,
    AddContext,
    Ask,
    CancelAsk,
    ContextInfo,
    ContextReply,
    CoordinatorPresence,
    Ended,
    GiveContext,
    ListContexts,
    Planned,
    PredictionError,
    Presence,
    Refused,
    Remind,
    RemoveContext,
    RoundEvent,
    RoundReport,
    Telemetry,
    new_id,
)
from broker_config.settings import BrokerSettings
from coordinator.checks import check, check_agent
from coordinator.errors import CoordinatorMissing, RequestRefused
from coordinator.fleet import Fleet, apply

CONNECT_TIMEOUT_S = 10.0
PRESENCE_TIMEOUT_S = 3.0
REPLY_TIMEOUT_S = 15.0
SETTLE_S = 1.2
"""Telemetry is retained and comes every second: after so long the picture is whole."""


class Client:
    """A person's, or a program's, connection to one site.

    Raises BrokerUnreachable when entered without a broker. Questions need a coordinator; contexts and the fleet don't.
    """

    def __init__(self, *, broker: BrokerSettings | None = None, site: str = "home") -> None:
        self._name = f"client-{new_id()}"
        self._bus = MqttBus(settings=broker or BrokerSettings(), site=site, client_id=f"{site}-{self._name}")
        self._site = site
        self._asked: set[str] = set()
        self._bus.add_on_connect(self._remind)

    async def __aenter__(self) -> Client:
        await self._bus.__aenter__()
        try:
            await self._bus.connected(CONNECT_TIMEOUT_S)
        except BaseException:
            await self._bus.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._bus.__aexit__(kind, error, trace)

    async def ask(
        self,
        question: str,
        *,
        sources: Sequence[str],
        receiver: str,
        policy: str | None = None,
        deadline_s: float | None = None,
        quality_floor: float = DEFAULT_QUALITY_FLOOR,
        rung: str | None = None,
        facts_tokens: int = 0,
        max_new_tokens: int = 32,
        timeout_s: float = 180.0,
        on_event: Callable[[RoundEvent], None] | None = None,
    ) -> RoundReport:
        """Ask, and wait for the end. on_event sees the plan, the pieces of the answer, and the end as they come.

        rung: send caches at this one of the model's ladder, whatever its loss. facts_tokens: so many tokens of facts
        come with each cache.

        Raises RequestImpossible, RequestRefused (with the coordinator's reason), CoordinatorMissing, RequestTimeout
        after timeout_s. Cancelled or out of time, it withdraws the question.
        """
        ask_ = Ask(
            request=new_id(),
            client=self._name,
            question=question,
            sources=tuple(sources),
            receiver=receiver,
            policy=policy,
            deadline_s=deadline_s,
            quality_floor=quality_floor,
            rung=rung,
            facts_tokens=facts_tokens,
            max_new_tokens=max_new_tokens,
        )
        check(ask_)
        await self.coordinator()
        ended: asyncio.Future[Ended | Refused] = asyncio.get_running_loop().create_future()

        def take(event: RoundEvent, _: Mapping[str, str]) -> None:
            if _request_of(event) != ask_.request:
                return
            if on_event:
                on_event(event)
            if isinstance(event, Ended | Refused) and not ended.done():
                ended.set_result(event)

        subscription = await self._bus.subscribe(topics.EVENTS, take, client=self._name)
        try:
            async with asyncio.timeout(timeout_s):
                await self._bus.publish(topics.REQUESTS, ask_)
                self._asked.add(ask_.request)
                event = await ended
        except TimeoutError:
            await self._withdraw(ask_.request)
            raise RequestTimeout(topics.REQUESTS.at(site=self._site), timeout_s) from None
        except asyncio.CancelledError:
            await asyncio.shield(self._withdraw(ask_.request))
            raise
        finally:
            self._asked.discard(ask_.request)
            await subscription.close()
        if isinstance(event, Refused):
            raise RequestRefused(event.reason)
        return event.report

    async def _remind(self) -> None:
        """Connected again: ends that were told meanwhile were missed."""
        for request_ in tuple(self._asked):
            await self._bus.publish(topics.REQUESTS, Remind(request=request_, client=self._name))

    async def coordinator(self) -> CoordinatorPresence:
        """The coordinator of the site. Raises CoordinatorMissing if there is none online."""
        found: asyncio.Future[CoordinatorPresence] = asyncio.get_running_loop().create_future()

        def take(presence: CoordinatorPresence, _: Mapping[str, str]) -> None:
            if presence.state == "online" and not found.done():
                found.set_result(presence)

        subscription = await self._bus.subscribe(topics.COORDINATOR, take)
        try:
            async with asyncio.timeout(PRESENCE_TIMEOUT_S):
                return await found
        except TimeoutError:
            raise CoordinatorMissing(self._site) from None
        finally:
            await subscription.close()

    async def give(self, agent: str, name: str, text: str) -> tuple[ContextInfo, ...]:
        """Have an agent hold a text; the coordinator keeps a copy. What the agent holds then.

        Raises RequestImpossible, RequestRefused, CoordinatorMissing, RequestTimeout.
        """
        message = GiveContext(correlation=new_id(), client=self._name, agent=agent, name=name, text=text)
        check(message)
        await self.coordinator()
        reply = await request(
            self._bus,
            topics.REQUESTS,
            message,
            topics.REPLIES,
            correlation=message.correlation,
            to={},
            reply_to={"client": self._name},
            timeout_s=REPLY_TIMEOUT_S,
        )
        return _contexts(reply)

    async def contexts(self, agent: str) -> tuple[ContextInfo, ...]:
        """What an agent holds. Raises RequestTimeout if it does not answer."""
        return await self._order(agent, ListContexts(correlation=new_id(), client=self._name))

    async def remove(self, agent: str, name: str) -> tuple[ContextInfo, ...]:
        """Have an agent forget a context. What it holds then. Raises RequestRefused, RequestTimeout."""
        return await self._order(agent, RemoveContext(correlation=new_id(), client=self._name, name=name))

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[Watch]:
        """The site's agents, live, inside the block."""
        watch = Watch()
        presence = await self._bus.subscribe(topics.PRESENCE, watch.take)
        telemetry = await self._bus.subscribe(topics.TELEMETRY, watch.take)
        try:
            yield watch
        finally:
            await presence.close()
            await telemetry.close()

    async def fleet(self, settle_s: float = SETTLE_S) -> Fleet:
        """The site's agents as they present themselves now; what is retained is here after settle_s."""
        async with self.watch() as watch:
            await asyncio.sleep(settle_s)
            return watch.fleet

    async def errors(self) -> tuple[PredictionError, ...]:
        """How far the coordinator's predictions were off, by policy; nothing if there is no coordinator."""
        try:
            return (await self.coordinator()).errors
        except CoordinatorMissing:
            return ()

    async def _withdraw(self, request: str) -> None:
        """Nobody waits for the answer any more; if that can't be said, the question ends by its own time-out."""
        with suppress(BusError):
            await self._bus.publish(topics.REQUESTS, CancelAsk(request=request))

    async def _order(self, agent: str, order: AddContext | RemoveContext | ListContexts) -> tuple[ContextInfo, ...]:
        check(order)
        check_agent(agent)
        reply = await request(
            self._bus,
            topics.ORDERS,
            order,
            topics.REPLIES,
            correlation=order.correlation,
            to={"agent": agent},
            reply_to={"client": self._name},
            timeout_s=REPLY_TIMEOUT_S,
        )
        return _contexts(reply)


class Watch:
    """A live picture of the agents. `fleet` is the newest; times in it are of time.monotonic()."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self._news = asyncio.Event()

    def take(self, event: Presence | Telemetry, _: Mapping[str, str]) -> None:
        """An agent reported."""
        self.fleet = apply(self.fleet, event, time.monotonic())
        self._news.set()

    async def until(self, holds: Callable[[Fleet], bool]) -> Fleet:
        """Wait until the picture is so; whoever calls sets the time limit."""
        while not holds(self.fleet):
            self._news.clear()
            await self._news.wait()
        return self.fleet


def ask(
    question: str,
    *,
    sources: Sequence[str],
    receiver: str,
    broker: BrokerSettings | None = None,
    site: str = "home",
    policy: str | None = None,
    deadline_s: float | None = None,
    quality_floor: float = DEFAULT_QUALITY_FLOOR,
    rung: str | None = None,
    facts_tokens: int = 0,
    max_new_tokens: int = 32,
) -> RoundReport:
    """`Client.ask` for programs without an event loop. Raises the same errors, and BrokerUnreachable."""

    async def run() -> RoundReport:
        async with Client(broker=broker, site=site) as client:
            return await client.ask(
                question,
                sources=sources,
                receiver=receiver,
                policy=policy,
                deadline_s=deadline_s,
                quality_floor=quality_floor,
                rung=rung,
                facts_tokens=facts_tokens,
                max_new_tokens=max_new_tokens,
            )

    return asyncio.run(run())


def _request_of(event: RoundEvent) -> str:
    return event.report.request if isinstance(event, Planned | Ended) else event.request


def _contexts(reply: ContextReply) -> tuple[ContextInfo, ...]:
    if reply.error:
        raise RequestRefused(reply.error)
    return reply.contexts
