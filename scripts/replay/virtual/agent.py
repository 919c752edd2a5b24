"""An agent in virtual time: orders in, outcomes out, presence and telemetry all the while (edge_agent.agent)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence

from broker_config import topics
from broker_config.messages import (
    AnswerOrder,
    CancelOrder,
    Order,
    PaceOrder,
    Presence,
    SendOrder,
    Speed,
    Telemetry,
    new_id,
)
from edge_agent.link_quality import LinkMeter
from edge_agent.settings import MemorySettings, TelemetrySettings
from edge_agent.tasks import Tasks
from scripts.replay.virtual.answering import VirtualAnswering
from scripts.replay.virtual.broker import ProbeBus, VirtualBus
from scripts.replay.virtual.engine import VirtualEngine
from scripts.replay.virtual.fleet import Neighbours
from scripts.replay.virtual.sending import VirtualSending
from scripts.replay.virtual.store import Context, VirtualStore
from scripts.traces.memory import MemoryTrace

PREFILLER = "contexts"
"""The asker in whose name an agent computes what it holds."""


class VirtualAgent:
    """One agent. speed: what its device really does, noise: see VirtualEngine. start_s: when it begins to work; signal:
    of its radio, in dBm.
    """

    def __init__(
        self,
        name: str,
        *,
        control: VirtualBus,
        neighbours: Neighbours,
        speed: Speed,
        noise: float,
        contexts: Sequence[Context],
        cached: bool,
        memory: MemorySettings,
        others: MemoryTrace,
        telemetry: TelemetrySettings,
        start_s: float,
        signal: Callable[[], float | None],
        question_tokens: Callable[[str], int],
        answer_tokens: int,
        seed: int,
        on_fault: Callable[[BaseException], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        clock = self._loop.time
        model, access = neighbours.model, neighbours.access(name)
        self.name, self._control, self._neighbours, self._telemetry = name, control, neighbours, telemetry
        self._instance, self._sequence, self._began_s = new_id(), 0, clock()
        self._tasks, self._start_s = Tasks(on_fault), start_s
        self._reporting: asyncio.TimerHandle | None = None
        self._relieving = False
        self.engine = VirtualEngine(
            speed, elements_per_token=model.elements_per_token, noise=noise, dice=random.Random(f"{seed} {name}")
        )
        self.store = VirtualStore(model, memory, others=others, clock=clock, recode=self._recode)
        self._contexts, self._cached = tuple(contexts), cached
        for context in contexts:
            self.store.add(context)
        self._link = LinkMeter(bulk=ProbeBus(access, control.site), agent=name, signal=signal, clock=clock)
        self._answering = VirtualAnswering(
            agent=name,
            engine=self.engine,
            store=self.store,
            control=control,
            link=self._link,
            neighbours=neighbours,
            question_tokens=question_tokens,
            answer_tokens=answer_tokens,
        )
        self._sending = VirtualSending(
            agent=name,
            engine=self.engine,
            store=self.store,
            control=control,
            link=self._link,
            neighbours=neighbours,
        )

    async def run(self) -> None:
        """Work until cancelled."""
        for context in self._contexts if self._cached else ():
            await self.store.put(context.context_id, at_once=True)
        await asyncio.sleep(self._start_s)
        await self._control.subscribe(topics.ORDERS, self._order, agent=self.name)
        presence = Presence(
            agent=self.name, instance=self._instance, state="online", model=self._neighbours.model, software="virtual"
        )
        await self._control.publish(topics.PRESENCE, presence, agent=self.name)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._link.run(self._telemetry.probe_interval_s), name="link probes")
                group.create_task(self._prefill(), name="contexts")
                self._report()
        finally:
            if self._reporting is not None:
                self._reporting.cancel()
            await self._tasks.close()

    def _order(self, order: Order, _: Mapping[str, str]) -> None:
        match order:
            case SendOrder():
                self._tasks.start(order.request, f"send {order.transfer}", self._sending.carry_out(order))
            case AnswerOrder():
                self._tasks.start(order.request, f"answer {order.request}", self._answering.carry_out(order))
            case PaceOrder():
                self._sending.pace(order)
            case CancelOrder():
                self._tasks.cancel(order.request)

    async def _prefill(self) -> None:
        """Compute what is held, one after the other."""
        for context in () if self._cached else self._contexts:
            if self.store.rung(context.context_id) is None:
                await self.engine.prefill_context(context.tokens, PREFILLER)
                await self.store.put(context.context_id)

    def _report(self) -> None:
        """Now, and again after the interval; when memory has filled, caches are tightened."""
        loop = self._loop
        telemetry = Telemetry(
            agent=self.name,
            instance=self._instance,
            sequence=self._sequence,
            uptime_s=loop.time() - self._began_s,
            memory=self.store.memory,
            link=self._link.quality,
            speed=self.engine.meter.speed,
            contexts=self.store.infos(),
            sending=self._link.progress,
            queued=self.engine.turns.waiting,
        )
        self._sequence += 1
        self._control.post(topics.TELEMETRY, telemetry, agent=self.name)
        if self.store.filled and not self._relieving:
            self._relieving = True
            self._tasks.start("memory", f"memory {self._sequence}", self._relieve())
        self._reporting = loop.call_later(self._telemetry.interval_s, self._report)

    async def _relieve(self) -> None:
        try:
            await self.store.relieve()
        finally:
            self._relieving = False

    async def _recode(self, tokens: int, rung: str, kept: str) -> float:
        return await self.engine.encode(self.engine.entries(tokens), rung, kept)
