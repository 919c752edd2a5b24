"""The loop: telemetry in, questions in, orders out, outcomes followed to exactly one end for every question."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any

import structlog

from broker_config import topics
from broker_config.bus import Bus, BusState, MqttBus, Will
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
    Remind,
    RoundReport,
    SendOutcome,
    Telemetry,
    TextReply,
    TextRequest,
    new_id,
)
from broker_config.messages.base import COORDINATOR
from coordinator.errors import CoordinatorError, RequestImpossible
from coordinator.fleet import Fleet, apply, expire
from coordinator.journal import InFlight, Journal
from coordinator.keeping import Keeper
from coordinator.learning import Learned, Learning
from coordinator.planning import plan_round
from coordinator.policy import POLICIES, Policy, get_policy
from coordinator.recorder import RecordedBus
from coordinator.revision import revise
from coordinator.round import EndOfRound, Round, unfinished
from coordinator.settings import CoordinatorSettings
from coordinator.telling import Teller, publish_or_log
from coordinator.texts import Texts

log = structlog.get_logger()

OUTCOME_GRACE_S = 1.0
"""After the answer, senders' outcomes may still be on their way; the report waits for them so long."""
WATCH_INTERVAL_S = 0.5
STOP_S = 2.0
"""Stopping may not take longer, connection or not: what could not be told by then, the next coordinator tells."""
ENDS_KEPT = 256
"""Told ends that can be told again to an asker that was cut off."""
FAULT = "a fault of the coordinator; its log says more"


class Coordinator:
    """One site's coordinator. `run` returns only when cancelled."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        record: Path | None = None,
        policies: Mapping[str, Policy] = POLICIES,
        on_fault: Callable[[BaseException], None] | None = None,
    ) -> None:
        """record: the file that the session is recorded to, or the folder of a file named by site and time.

        on_fault: told of work that ends by a fault. Raises PolicyUnknown.
        """
        self._settings, self._record, self._policies, self._on_fault = settings, record, policies, on_fault
        self._instance = new_id()
        self._fleet = Fleet()
        self._rounds: dict[str, Round] = {}
        self._texts = Texts()
        self._tasks: set[asyncio.Task[None]] = set()
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._ends: OrderedDict[str, Ended | Refused] = OrderedDict()
        self._listening_since_s: float | None = None
        self._stopping = False
        get_policy(settings.planning.policy, policies)

    async def run(self) -> None:
        """Serve until cancelled. Raises JournalUnwritable, RecordingUnwritable."""
        site, folder = self._settings.site, self._settings.state_path
        journal = Journal(folder / f"{site}-rounds.jsonl")
        keeper = Keeper(folder / f"{site}-learned.json")
        recorded: RecordedBus | None = None
        try:
            bus = MqttBus(
                settings=self._settings.broker,
                site=site,
                client_id=f"{site}-{COORDINATOR}",
                persistent=True,
                will=Will(topic=topics.COORDINATOR, message=self._presence("offline")),
                on_state=self._listening,
            )
            bus.add_on_connect(self._say_online)
            if self._record is not None:
                recorded = RecordedBus.begin(bus, self._record, self._settings, keeper.learned)
            # before the session starts: what the broker kept comes at once
            await self.join(recorded or bus, journal, keeper)
            async with bus:
                await self.serve()
        finally:
            journal.close()
            if recorded is not None:
                recorded.close()

    async def join(
        self, bus: Bus, journal: Journal, keeper: Keeper | None = None, learned: Learned | None = None
    ) -> None:
        """Listen on a bus. What an earlier coordinator left over is not taken again, what it had learned is known.

        learned: that, where nobody keeps it.
        """
        self._bus, self._journal, self._teller, self._keeper = bus, journal, Teller(bus), keeper
        learned = keeper.learned if keeper is not None else learned
        self._learning = Learning(self._settings.planning.rate_quantile, learned)
        self._listening(BusState.CONNECTED)
        for request in (*journal.known_ended, *(entry.ask.request for entry in journal.left_over)):
            self._remember(request)
        await bus.subscribe(topics.PRESENCE, self._heard)
        await bus.subscribe(topics.TELEMETRY, self._heard)
        await bus.subscribe(topics.OUTCOMES, self._outcome)
        await bus.subscribe(topics.ANSWERS, self._piece)
        await bus.subscribe(topics.REQUESTS, self._request)

    async def serve(self) -> None:
        """After `join`: end what was left over, then serve until cancelled."""
        try:
            for entry in self._journal.left_over:
                self._spawn(self._end_left_over(entry), f"left over {entry.ask.request}")
            while True:
                await asyncio.sleep(WATCH_INTERVAL_S)
                self._watch()
        finally:  # a task of its own: up to Python 3.11.2 time limits don't end in a task that was cancelled
            await asyncio.create_task(self._stop(), name="stop")

    def _listening(self, state: BusState) -> None:
        """While the bus is not connected, nobody's silence means anything."""
        self._listening_since_s = _now_s() if state is BusState.CONNECTED else None

    def _request(self, request: CoordinatorRequest, _: Mapping[str, str]) -> None:
        match request:
            case Ask():
                if request.request in self._recent:
                    return  # a duplicate (QoS 1)
                self._remember(request.request)
                self._spawn(self._ask(request, _now_s()), f"round {request.request}")
            case CancelAsk():
                self._spawn(self._withdraw(request.request), f"withdrawal of {request.request}")
            case Remind():
                self._spawn(self._remind(request), f"reminder of {request.request}")
            case GiveContext():
                self._spawn(self._give(request), f"give {request.name}")

    async def _withdraw(self, request: str) -> None:
        """A task as `_ask` is, so that it comes after a question that arrived right before it."""
        if request in self._rounds:
            self._rounds[request].stop("cancelled", "withdrawn by the asker")

    async def _remind(self, reminder: Remind) -> None:
        """Tell an end again that its asker may have missed. A question still under way has its end before it."""
        end = self._ends.get(reminder.request)
        left_over = any(entry.ask.request == reminder.request for entry in self._journal.left_over)
        if end is None and not left_over and reminder.request not in self._rounds:
            end = Refused(request=reminder.request, reason="this question is not known to the coordinator; ask again")
        if end is not None:
            await self._teller.tell_end(reminder.client, end)

    async def _ask(self, ask: Ask, accepted_s: float) -> None:
        """Plan, order, follow: exactly one of Refused and Ended is told, whatever happens."""
        try:
            round_ = self._begin(ask, accepted_s)
        except CoordinatorError as error:
            await self._refuse(ask, str(error))
            return
        except Exception:
            await self._refuse(ask, FAULT)
            raise
        try:
            state, reason = await self._carry_out(round_)
        except Exception:
            await self._end(round_, "failed", FAULT)
            raise
        await self._end(round_, state, reason)

    def _begin(self, ask: Ask, accepted_s: float) -> Round:
        """The planned round, remembered. In one go, so that a withdrawal finds either nothing or a whole round."""
        if self._stopping:
            raise RequestImpossible("the coordinator is being stopped; ask again")
        round_ = plan_round(
            ask,
            fleet=self._fleet,
            settings=self._settings,
            running=self._rounds.values(),
            texts=self._texts,
            now_s=accepted_s,
            learning=self._learning,
            policies=self._policies,
        )
        self._journal.began(InFlight(ask=ask, agents=round_.agents))
        self._rounds[ask.request] = round_
        return round_

    async def _carry_out(self, round_: Round) -> tuple[EndOfRound, str]:
        """Orders out, then wait for the receiver's outcome, its silence, a withdrawal, or the time-out."""
        ask, timeout_s = round_.ask, self._settings.planning.round_timeout_s
        # told beside the orders, so that they need not wait for it; begun before them, so that it is the first event
        planned = Planned(report=round_.report("planned"))
        self._spawn(self._teller.tell(ask.client, planned), f"plan of {ask.request}")
        try:
            async with asyncio.timeout(timeout_s):
                await self._bus.publish(topics.ORDERS, round_.answer_order(timeout_s), agent=ask.receiver)
                for agent, send in round_.send_orders(timeout_s):
                    await self._bus.publish(topics.ORDERS, send, agent=agent)
                await round_.done.wait()
        except TimeoutError:
            await self._cancel_orders(round_.agents, ask.request, "not answered in time")
            return "expired", f"not answered within {timeout_s:g} s"
        except BusError as error:
            await self._cancel_orders(round_.agents, ask.request, "orders could not be given")
            return "failed", f"orders could not be given: {error}"
        if round_.stopped is not None:
            await self._cancel_orders(round_.agents, ask.request, round_.stopped[1])
            return round_.stopped
        assert round_.answer is not None  # noqa: S101  (done without a stop)
        if round_.answer.state != "answered":  # nobody needs what is still on its way
            await self._cancel_orders(round_.still_sending(), ask.request, "the question has ended")
        try:
            async with asyncio.timeout(OUTCOME_GRACE_S):
                await round_.sent.wait() if round_.links else None
        except TimeoutError:
            log.info("a sender's outcome is missing", request=ask.request)
        return round_.answer.state, ""

    async def _end(self, round_: Round, state: EndOfRound, reason: str) -> None:
        report = round_.report(state, reason)
        self._rounds.pop(report.request, None)
        if self._learning.take(round_, report) and not self._stopping:
            self._spawn(publish_or_log(self._bus, topics.COORDINATOR, self._presence("online")), "prediction error")
        log.info("ended", request=report.request, state=state, e2e_s=report.e2e_s, reason=report.reason)
        await self._conclude(round_.ask, report)

    async def _end_left_over(self, entry: InFlight) -> None:
        """A question that an earlier coordinator took and did not end: its end is told now."""
        ask = entry.ask
        reason = "the coordinator was restarted while this question was in flight; ask again"
        await self._cancel_orders(entry.agents, ask.request, reason)
        report = unfinished(ask, ask.policy or self._settings.planning.policy, reason)
        log.info("ended after a restart", request=ask.request)
        await self._conclude(ask, report)

    async def _refuse(self, ask: Ask, reason: str) -> None:
        log.info("refused", request=ask.request, reason=reason)
        if await self._tell_end(ask, Refused(request=ask.request, reason=reason[:1024])):
            self._forget(ask.request)

    async def _conclude(self, ask: Ask, report: RoundReport) -> None:
        """Tell the end; once told it is forgotten. Untold, the journal leaves it to the next coordinator.

        A crash between telling and noting leaves it, too: the asker then hears a second end, and takes the first.
        """
        if not await self._tell_end(ask, Ended(report=report)):
            return
        self._forget(report.request)

    def _forget(self, request: str) -> None:
        """It has its end, and will not be taken again."""
        try:
            self._journal.ended(request)
        except CoordinatorError as error:
            log.error("journal", error=str(error))

    async def _tell_end(self, ask: Ask, end: Ended | Refused) -> bool:
        self._ends[ask.request] = end
        while len(self._ends) > ENDS_KEPT:
            self._ends.popitem(last=False)
        return await self._teller.tell_end(ask.client, end)

    def _watch(self) -> None:
        """A receiver that is gone ends its rounds; what was learned is kept."""
        now_s, since_s, expiry_s = _now_s(), self._listening_since_s, self._settings.planning.expiry_s
        self._fleet = expire(self._fleet, now_s)
        if self._keeper is not None:
            self._keeper.keep(self._learning, now_s)
        if since_s is None:
            return  # silence says nothing to the deaf
        for round_ in self._rounds.values():
            if gone := round_.receiver_gone(self._fleet, now_s, listening_since_s=since_s, expiry_s=expiry_s):
                round_.stop("failed", gone)

    async def _give(self, request: GiveContext) -> None:
        """Keep a copy of the text, and have the agent hold it; the agent answers the client itself."""
        try:
            self._fleet.require_online(request.agent, _now_s(), self._settings.planning.expiry_s)
            self._texts.keep(request.agent, request.name, request.text)
            known, text = request.correlation, request.text
            order = AddContext(correlation=known, client=request.client, name=request.name, text=text)
            await self._bus.publish(topics.ORDERS, order, agent=request.agent)
        except (CoordinatorError, BusError) as failed:
            reply = ContextReply(correlation=request.correlation, agent=request.agent, error=str(failed)[:1024])
            await publish_or_log(self._bus, topics.REPLIES, reply, client=request.client)

    def _heard(self, event: Presence | Telemetry, topic: Mapping[str, str]) -> None:
        if not _is_own(event, topic):
            return
        before, now_s = self._fleet.agents.get(event.agent), _now_s()
        self._fleet = apply(self._fleet, event, now_s)
        after = self._fleet.agents[event.agent]
        if after.duplicate and not (before and before.duplicate):
            log.error("two agents with one id", agent=event.agent, instances=after.duplicate)
        if isinstance(event, Presence):
            log.info("presence", agent=event.agent, state=event.state)
        elif after.telemetry is event:  # not a rival's, and not overtaken on its way
            self._revise(event, now_s)

    def _revise(self, telemetry: Telemetry, now_s: float) -> None:
        """Links may have changed so much that what is under way needs other shares."""
        rounds = [round_ for round_ in self._rounds.values() if not round_.done.is_set()]
        for agent, order in revise(telemetry, rounds, fleet=self._fleet, settings=self._settings, now_s=now_s):
            log.info("share revised", request=order.request, agent=agent, rate_bps=order.rate_bps)
            self._spawn(publish_or_log(self._bus, topics.ORDERS, order, agent=agent), f"pace of {order.transfer}")

    def _outcome(self, outcome: Outcome, topic: Mapping[str, str]) -> None:
        round_ = self._rounds.get(outcome.request) if _is_own(outcome, topic) else None
        if round_ is None:
            return  # of a round that has ended
        match outcome:
            case TextRequest() if outcome.agent == round_.ask.receiver:
                self._spawn(self._answer_text(outcome), f"text for {outcome.agent}")
            case SendOutcome():
                round_.take_send(outcome)
            case AnswerOutcome():
                round_.take_answer(outcome, _now_s())

    async def _answer_text(self, request: TextRequest) -> None:
        text = self._texts.find(self._fleet, request.context_id)
        reply = TextReply(request=request.request, transfer=request.transfer, context_id=request.context_id, text=text)
        await publish_or_log(self._bus, topics.ORDERS, reply, agent=request.agent)

    def _piece(self, piece: AnswerPiece, topic: Mapping[str, str]) -> None:
        round_ = self._rounds.get(piece.request) if _is_own(piece, topic) else None
        if round_ is None or round_.done.is_set():
            return  # nothing is told after the end
        if round_.take_piece(piece, _now_s()):
            event = Piece(request=piece.request, text=piece.text)
            self._spawn(self._teller.tell(round_.ask.client, event), f"piece of {piece.request}")

    async def _cancel_orders(self, agents: Iterable[str], request: str, reason: str) -> None:
        for agent in agents:
            await publish_or_log(
                self._bus, topics.ORDERS, CancelOrder(request=request, reason=reason[:1024]), agent=agent
            )

    def _presence(self, state: str) -> CoordinatorPresence:
        online = state == "online"
        return CoordinatorPresence(
            instance=self._instance,
            state="online" if online else "offline",
            policies=tuple(self._policies) if online else (),
            errors=self._learning.errors() if online else (),
        )

    async def _say_online(self) -> None:
        await self._bus.publish(topics.COORDINATOR, self._presence("online"))

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
            if self._on_fault is not None:
                self._on_fault(error)

    async def _stop(self) -> None:
        """End every question honestly, say goodbye; without a broker, leave both to the journal and to the will."""
        self._stopping = True
        self._teller.close()
        for round_ in self._rounds.values():
            round_.stop("cancelled", "the coordinator was stopped; ask again")
        try:
            async with asyncio.timeout(STOP_S if self._listening_since_s is not None else 0):
                while self._tasks:
                    await asyncio.wait(self._tasks)
                await publish_or_log(self._bus, topics.COORDINATOR, self._presence("offline"))
        except TimeoutError:
            log.warning("stopped without having told everything", left=len(self._tasks))
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._keeper is not None:
            self._keeper.close(self._learning)


def _now_s() -> float:
    """The one clock of this room: the event loop's, which is monotonic."""
    return asyncio.get_running_loop().time()


def _is_own(event: Presence | Telemetry | Outcome | AnswerPiece, topic: Mapping[str, str]) -> bool:
    """Whether an agent speaks for itself: the topic is what the broker's access rules are on."""
    if event.agent == topic["agent"]:
        return True
    log.warning("an agent speaks for another", agent=topic["agent"], other=event.agent)
    return False
