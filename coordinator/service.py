"""The loop: telemetry in, questions in, orders out, outcomes followed to exactly one end for every question."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import structlog

from broker_config import topics
from broker_config.bus import MqttBus, Will
from broker_config.errors import BusError
from broker_config.messages import (
    AddContext,
    AnswerOutcome,
    AnswerPiece,
    Ask,
    CancelAsk,
    CancelOrder,
    ContextReply,
    CoordinatorPresence,
    CoordinatorRequest,
    Ended,
    GiveContext,
    Outcome,
    Piece,
    Planned,
    Presence,
    Refused,
    RoundEvent,
    RoundReport,
    SendOutcome,
    Telemetry,
    TextReply,
    TextRequest,
    new_id,
)
from coordinator.errors import CoordinatorError
from coordinator.fleet import Fleet, apply, expire
from coordinator.journal import InFlight, Journal
from coordinator.planning import COORDINATOR, plan_round
from coordinator.policy import POLICIES, get_policy
from coordinator.round import EndOfRound, Round
from coordinator.settings import CoordinatorSettings
from coordinator.texts import Texts

log = structlog.get_logger()

M = TypeVar("M")

OUTCOME_GRACE_S = 1.0
"""After the answer, senders' outcomes may still be on their way; the report waits for them so long."""
WATCH_INTERVAL_S = 0.5


class Coordinator:
    """One site's coordinator. `run` returns only when cancelled."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        self._settings = settings
        self._instance = new_id()
        self._fleet = Fleet()
        self._rounds: dict[str, Round] = {}
        self._texts = Texts()
        self._tasks: set[asyncio.Task[None]] = set()
        self._follows: dict[str, asyncio.Task[None]] = {}
        self._withdrawn: dict[str, str] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._telling = asyncio.Lock()
        get_policy(settings.planning.policy)

    async def run(self) -> None:
        """Serve until cancelled. Raises JournalUnwritable."""
        journal = Journal(self._settings.state_path / f"{self._settings.site}-rounds.jsonl")
        try:
            async with self._bus() as bus:
                await self._serve(bus, journal)
        finally:
            journal.close()

    @asynccontextmanager
    async def _bus(self) -> AsyncIterator[MqttBus]:
        site = self._settings.site
        will = Will(topic=topics.COORDINATOR, message=self._presence("offline"))
        client_id = f"{site}-{COORDINATOR}"
        async with MqttBus(
            settings=self._settings.broker, site=site, client_id=client_id, persistent=True, will=will
        ) as bus:
            yield bus

    async def _serve(self, bus: MqttBus, journal: Journal) -> None:
        self._bus_, self._journal = bus, journal
        await bus.subscribe(topics.PRESENCE, self._heard)
        await bus.subscribe(topics.TELEMETRY, self._heard)
        await bus.subscribe(topics.OUTCOMES, self._outcome)
        await bus.subscribe(topics.ANSWERS, self._piece)
        await bus.subscribe(topics.REQUESTS, self._request)
        bus.add_on_connect(self._say_online)
        try:
            await self._end_left_over()
            while True:
                await asyncio.sleep(WATCH_INTERVAL_S)
                self._watch()
        finally:
            await self._stop()

    def _request(self, request: CoordinatorRequest, _: Mapping[str, str]) -> None:
        match request:
            case Ask():
                if request.request in self._recent:
                    return  # a duplicate (QoS 1)
                self._remember(request.request)
                task = self._spawn(self._ask(request, time.monotonic()), f"round {request.request}")
                self._follows[request.request] = task
                task.add_done_callback(lambda _: self._follows.pop(request.request, None) and None)
            case CancelAsk():
                self._spawn(self._withdraw(request.request, "withdrawn by the asker"), f"cancel {request.request}")
            case GiveContext():
                self._spawn(self._give(request), f"give {request.name}")

    async def _ask(self, ask: Ask, accepted_s: float) -> None:
        """Plan, order, follow: exactly one of Refused and Ended is told, whatever happens."""
        try:
            round_ = plan_round(
                ask,
                fleet=self._fleet,
                settings=self._settings,
                running=self._rounds.values(),
                texts=self._texts,
                now_s=accepted_s,
            )
            self._journal.began(InFlight(ask=ask, agents=round_.agents))
        except CoordinatorError as error:
            await self._tell(ask, Refused(request=ask.request, reason=str(error)[:1024]))
            log.info("refused", request=ask.request, reason=str(error))
            return
        self._rounds[ask.request] = round_
        state: EndOfRound = "cancelled"
        reason = "the coordinator was stopped; ask again"
        try:
            state, reason = await self._carry_out(round_)
        except asyncio.CancelledError:
            reason = self._withdrawn.pop(ask.request, reason)
            await asyncio.shield(self._end(round_, state, reason))
            raise
        await self._end(round_, state, reason)

    async def _carry_out(self, round_: Round) -> tuple[EndOfRound, str]:
        """Orders out, then wait for the receiver's outcome, its silence, or the time-out."""
        ask, timeout_s = round_.ask, self._settings.planning.round_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                order = round_.answer_order(timeout_s)
                await self._bus_.publish(topics.ORDERS, order, agent=ask.receiver)
                for agent, send in round_.send_orders(timeout_s):
                    await self._bus_.publish(topics.ORDERS, send, agent=agent)
                await self._tell(ask, Planned(report=round_.report("planned")))
                await round_.done.wait()
        except TimeoutError:
            await self._cancel_orders(round_.agents, ask.request, "not answered in time")
            return "expired", f"not answered within {timeout_s:g} s"
        except BusError as error:
            await self._cancel_orders(round_.agents, ask.request, "orders could not be given")
            return "failed", f"orders could not be given: {error}"
        if round_.answer is None:
            await self._cancel_orders(round_.agents, ask.request, "the receiver is gone")
            return "failed", f"{ask.receiver} went offline while it was answering; ask again when it is back"
        try:
            async with asyncio.timeout(OUTCOME_GRACE_S):
                await round_.sent.wait() if round_.links else None
        except TimeoutError:
            log.info("a sender's outcome is missing", request=ask.request)
        return round_.answer.state, ""

    async def _end(self, round_: Round, state: EndOfRound, reason: str) -> None:
        report = round_.report(state, reason)
        self._rounds.pop(report.request, None)
        await self._tell(round_.ask, Ended(report=report))
        try:
            self._journal.ended(report.request)
        except CoordinatorError as error:
            log.error("journal", error=str(error))
        log.info("ended", request=report.request, state=state, e2e_s=report.e2e_s, predicted_s=report.predicted_e2e_s)

    async def _end_left_over(self) -> None:
        """Questions that an earlier coordinator took and did not end: their end is told now."""
        for entry in self._journal.left_over:
            ask = entry.ask
            reason = "the coordinator was restarted while this question was in flight; ask again"
            await self._cancel_orders(entry.agents, ask.request, reason)
            report = RoundReport(
                request=ask.request,
                question=ask.question,
                receiver=ask.receiver,
                policy=ask.policy or self._settings.planning.policy,
                state="failed",
                reason=reason,
            )
            if await self._tell(ask, Ended(report=report)):
                self._journal.ended(ask.request)
            log.info("ended after a restart", request=ask.request)

    def _watch(self) -> None:
        """A receiver that fell silent ends its rounds."""
        now_s = time.monotonic()
        self._fleet = expire(self._fleet, now_s)
        for round_ in self._rounds.values():
            if not self._fleet.online(round_.ask.receiver, now_s, self._settings.planning.expiry_s):
                round_.done.set()

    async def _withdraw(self, request: str, reason: str) -> None:
        round_, task = self._rounds.get(request), self._follows.get(request)
        if round_ is None or task is None:
            return
        self._withdrawn[request] = reason
        await self._cancel_orders(round_.agents, request, reason)
        task.cancel()

    async def _give(self, request: GiveContext) -> None:
        """Keep a copy of the text, and have the agent hold it; the agent answers the client itself."""
        error = ""
        try:
            self._fleet.require_online(request.agent, time.monotonic(), self._settings.planning.expiry_s)
            self._texts.keep(request.agent, request.name, request.text)
            order = AddContext(
                correlation=request.correlation, client=request.client, name=request.name, text=request.text
            )
            await self._bus_.publish(topics.ORDERS, order, agent=request.agent)
        except (CoordinatorError, BusError) as failed:
            error = str(failed)
        if error:
            reply = ContextReply(correlation=request.correlation, agent=request.agent, error=error[:1024])
            await self._publish(topics.REPLIES, reply, client=request.client)

    def _heard(self, event: Presence | Telemetry, _: Mapping[str, str]) -> None:
        before = self._fleet.agents.get(event.agent)
        self._fleet = apply(self._fleet, event, time.monotonic())
        after = self._fleet.agents[event.agent]
        if after.duplicate and not (before and before.duplicate):
            log.error("two agents with one id", agent=event.agent, instances=after.duplicate)
        if isinstance(event, Presence):
            log.info("presence", agent=event.agent, state=event.state)

    def _outcome(self, outcome: Outcome, _: Mapping[str, str]) -> None:
        round_ = self._rounds.get(outcome.request)
        match outcome:
            case TextRequest():
                self._spawn(self._answer_text(outcome), f"text for {outcome.agent}")
            case SendOutcome() if round_:
                round_.take_send(outcome)
            case AnswerOutcome() if round_ and outcome.agent == round_.ask.receiver:
                round_.take_answer(outcome, time.monotonic())
            case _:
                pass  # of a round that has ended

    async def _answer_text(self, request: TextRequest) -> None:
        text = self._texts.find(self._fleet, request.context_id)
        reply = TextReply(request=request.request, transfer=request.transfer, context_id=request.context_id, text=text)
        await self._publish(topics.ORDERS, reply, agent=request.agent)

    def _piece(self, piece: AnswerPiece, _: Mapping[str, str]) -> None:
        round_ = self._rounds.get(piece.request)
        if round_ is None or piece.agent != round_.ask.receiver:
            return
        round_.take_piece(time.monotonic())
        self._spawn(self._tell_piece(round_.ask, piece), f"piece of {piece.request}")

    async def _tell_piece(self, ask: Ask, piece: AnswerPiece) -> None:
        await self._tell(ask, Piece(request=piece.request, text=piece.text))

    async def _cancel_orders(self, agents: Iterable[str], request: str, reason: str) -> None:
        for agent in agents:
            await self._publish(topics.ORDERS, CancelOrder(request=request, reason=reason[:1024]), agent=agent)

    async def _tell(self, ask: Ask, event: RoundEvent) -> bool:
        async with self._telling:  # first come, first served: events keep their order
            return await self._publish(topics.EVENTS, event, client=ask.client)

    async def _publish(self, topic: topics.Topic[M], message: M, **parameters: str) -> bool:
        """Publish; a failure is logged, since there is nobody else to tell."""
        try:
            await self._bus_.publish(topic, message, **parameters)
        except BusError as error:
            log.warning("not published", topic=topic.pattern, error=str(error))
            return False
        return True

    def _presence(self, state: str) -> CoordinatorPresence:
        online = state == "online"
        return CoordinatorPresence(
            instance=self._instance,
            state="online" if online else "offline",
            policies=tuple(POLICIES) if online else (),
        )

    async def _say_online(self) -> None:
        await self._bus_.publish(topics.COORDINATOR, self._presence("online"))

    def _remember(self, request: str) -> None:
        self._recent[request] = None
        while len(self._recent) > 4_096:
            self._recent.popitem(last=False)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a fault of ours", task=task.get_name(), error=repr(error))

    async def _stop(self) -> None:
        """End every question honestly, say goodbye."""
        for request, round_ in list(self._rounds.items()):
            await self._cancel_orders(round_.agents, request, "the coordinator was stopped")
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._publish(topics.COORDINATOR, self._presence("offline"))
