"""One run in virtual time: the coordinator's own code among virtual agents, on links that follow traces."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from broker_config import topics
from broker_config.bus import Bus
from broker_config.messages import Ask, Ended, Refused, RoundEvent, RoundReport, ids_from, new_id
from coordinator.errors import RequestRefused
from coordinator.journal import Journal
from coordinator.learning import Learned
from coordinator.policy import Policy
from coordinator.recorder import Keeps, RecordedBus
from coordinator.recording import Recording, Session
from coordinator.service import Coordinator
from scripts.replay.asks import Asked, Refusals, context_name, patiently, question_tokens, schedule
from scripts.replay.clock import run_virtual
from scripts.replay.network import Network
from scripts.replay.policies import Watched, known
from scripts.replay.results import (
    QuestionResult,
    Result,
    Seconds,
    question_result,
    refused_result,
)
from scripts.replay.setting import (
    SITE,
    AgentTerms,
    Place,
    copied,
    digest,
    link_of,
    memory_of,
    memory_settings,
    model_of,
    settings_of,
    speed_of,
)
from scripts.replay.virtual.agent import VirtualAgent
from scripts.replay.virtual.broker import Access, VirtualBroker
from scripts.replay.virtual.fleet import Neighbours
from scripts.replay.virtual.store import Context
from scripts.traces import Trace

CLIENT = "asker"
LOOKS = 256
"""Turns of the loop between two looks at what is outside: only Ctrl-C may come from there."""
COLLECTED_AFTER = 50_000
"""Objects made, less those released, between two searches for garbage in cycles: a run makes little of it, and a fleet
is much to search."""
BEGAN_S = 1.7e9
"""Of recordings: every run begins at the same moment, or no two of them were alike."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Of one run. trace: of links that have none of their own; device: of all agents, instead of their own.

    timelines: whether what agents tell is kept second by second. record: the file to record the session to.
    """

    place: Place
    policy: Policy
    trace_name: str = ""
    trace: Trace | None = None
    device: str = ""
    seed: int = 0
    timelines: bool = True
    record: Path | None = None


def run(terms: Terms, hear: Callable[[float], None] = lambda _: None) -> Result:
    """Replay it. hear: seconds of the run so far. Raises SettingInvalid, ScheduleInvalid, RecordingUnwritable."""
    began_s = time.perf_counter()
    setting, groups = copied(terms.place.setting)
    if terms.device:
        agents = tuple(msgspec.structs.replace(agent, device=terms.device, speed=None) for agent in setting.agents)
        setting = msgspec.structs.replace(setting, agents=agents)
    place = replace(terms.place, setting=setting)
    asked = schedule(place, groups, terms.seed)
    dice = random.Random(f"{terms.seed} ids")
    with TemporaryDirectory() as folder, ids_from(dice.randbytes), _seldom_collected():
        stage = _Stage(terms, place, asked, Path(folder), hear)
        run_virtual(stage.play(), limit_s=None, looks=LOOKS)
    return Result(
        mode="virtual",
        site=place.name,
        trace=terms.trace_name,
        device=terms.device,
        policy=terms.policy.name,
        seed=terms.seed,
        duration_s=setting.duration_s,
        questions=tuple(stage.results),
        agents=stage.seconds.agents if stage.seconds is not None else (),
        error=stage.policy.error or stage.fault,
        seconds=time.perf_counter() - began_s,
    )


class _Stage:
    """All that runs in one run."""

    def __init__(
        self, terms: Terms, place: Place, asked: Sequence[Asked], folder: Path, hear: Callable[[float], None]
    ) -> None:
        self._terms, self._place, self._asked, self._folder, self._hear = terms, place, asked, folder, hear
        self._over = asyncio.Event()
        self.policy = Watched(terms.policy, self._over.set)
        self.results: list[QuestionResult] = []
        self.fault = ""
        self.seconds: Seconds | None = None
        self._rates: dict[str, Trace | float] = {}

    async def play(self) -> None:
        """To the end, and to the last answer; to the policy's first error, if it raises."""
        asyncio.get_running_loop().set_exception_handler(self._escaped)
        setting, seed = self._place.setting, self._terms.seed
        accesses = self._accesses()
        broker = VirtualBroker(site=SITE)
        neighbours = Neighbours(model_of(setting), accesses, size_noise=setting.size_noise, seed=seed)
        async with AsyncExitStack() as stack:
            coordinator = await self._joined_coordinator(broker, stack)
            asker = VirtualAsker(broker)
            await asker.start()
            work: list[Coroutine[Any, Any, object]] = [
                coordinator.serve(),
                self._ask_all(asker),
                self._over.wait(),
                self._tell(),
                *(self._agent(broker, neighbours, *each).run() for each in enumerate(setting.agents)),
            ]
            tasks = [asyncio.create_task(each) for each in work]
            stack.push_async_callback(_cancel, tasks)
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # an agent's fault is the run's
        self.results.sort(key=lambda result: result.number)

    async def _ask_all(self, asker: VirtualAsker) -> None:
        """Every question at its time, until all have ended and the time is over."""
        async with asyncio.TaskGroup() as group:
            for number, asked in enumerate(self._asked):
                group.create_task(self._ask(asker, number, asked), name=f"question {number}")
        await asyncio.sleep(self._place.setting.duration_s - asyncio.get_running_loop().time())

    def _accesses(self) -> dict[str, Access]:
        """Each agent's way, over channels of one network."""
        setting, seed = self._place.setting, self._terms.seed
        rates: dict[str, Trace | float] = {}
        ways: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        for channel in setting.channels:
            rates[channel.name] = link_of(self._place, channel, self._terms.trace, seed)
            ways |= dict.fromkeys(channel.members, ((channel.name,), (channel.name,)))
        for agent in setting.agents:
            if agent.name not in ways:
                up, down = f"{agent.name}/up", f"{agent.name}/down"
                rates[up] = rates[down] = link_of(self._place, agent, self._terms.trace, seed)
                ways[agent.name] = (up,), (down,)
        network = Network(rates)
        accesses, clock = {}, network.loop.time
        for agent in setting.agents:
            up_, down_ = ways[agent.name]
            self._rates[agent.name] = rates[up_[0]]
            delay_s = _delay(rates[up_[0]], agent.delay_ms / 1000, clock)
            accesses[agent.name] = Access(network=network, up=up_, down=down_, delay_s=delay_s)
        return accesses

    async def _joined_coordinator(self, broker: VirtualBroker, stack: AsyncExitStack) -> Coordinator:
        """It listens, and what it hears and tells is taken down."""
        settings = settings_of(self._place.setting, self.policy.name)
        bus: Bus = broker.bus()
        keepers: list[Keeps] = []
        if self._terms.record is not None:
            session = Session(
                site=settings.site,
                began_s=BEGAN_S,
                clock_s=0.0,
                planning=settings.planning,
                channels=settings.channels,
                learned=Learned(),
            )
            keepers.append(Recording(self._terms.record, session))
        if self._terms.timelines:
            self.seconds = Seconds(self._true_mbps)
            keepers.append(self.seconds)
        for keeper in keepers:
            recorded = RecordedBus(bus, keeper)
            stack.callback(recorded.close)
            bus = recorded
        journal = Journal(self._folder / "rounds.jsonl")
        stack.callback(journal.close)
        coordinator = Coordinator(settings, policies=known(self.policy), on_fault=self._failed)
        await coordinator.join(bus, journal)
        return coordinator

    def _agent(self, broker: VirtualBroker, neighbours: Neighbours, index: int, terms: AgentTerms) -> VirtualAgent:
        place, seed = self._place, self._terms.seed
        setting = place.setting
        rate = self._rates[terms.name]
        return VirtualAgent(
            terms.name,
            control=broker.bus(neighbours.access(terms.name)),
            neighbours=neighbours,
            speed=speed_of(terms),
            noise=setting.noise,
            contexts=[
                Context(context_name(tokens), digest(terms.name, tokens, seed), tokens) for tokens in terms.contexts
            ],
            cached=terms.cached,
            memory=memory_settings(terms.memory),
            others=memory_of(place, terms, seed),
            telemetry=setting.telemetry,
            start_s=setting.telemetry.interval_s * index / len(setting.agents),
            signal=_signal(rate, neighbours.access(terms.name).network.loop.time),
            question_tokens=question_tokens,
            answer_tokens=setting.answer_tokens,
            seed=seed,
            on_fault=self._failed,
        )

    async def _ask(self, asker: VirtualAsker, number: int, asked: Asked) -> None:
        await asyncio.sleep(asked.at_s)
        patience_s = self._place.setting.requests.patience_s
        kls = {rung.name: rung.kl for rung in model_of(self._place.setting).ladder}
        try:
            taken = await patiently(lambda: asker.ask(asked), patience_s)
        except Refusals as error:
            self.results.append(refused_result(number, asked, error.count, str(error)))
        else:
            self.results.append(question_result(number, asked, taken, kls))

    def _failed(self, error: BaseException) -> None:
        """Something ended by a fault: so does the run."""
        self.fault = self.fault or f"a fault of ours: {type(error).__name__}: {error}"
        self._over.set()

    def _escaped(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The same, where nobody waited for it."""
        self._failed(context.get("exception") or RuntimeError(context.get("message", "")))

    async def _tell(self) -> None:
        """How far it is."""
        while True:
            self._hear(asyncio.get_running_loop().time())
            await asyncio.sleep(1)

    def _true_mbps(self, agent: str, at_s: float) -> float:
        rate = self._rates[agent]
        return round((rate.at(at_s).bandwidth_bps if isinstance(rate, Trace) else rate) / 1e6, 4)


class VirtualAsker:
    """Asks, beside the broker, and waits for the ends."""

    def __init__(self, broker: VirtualBroker) -> None:
        self._bus = broker.bus()
        self._waiting: dict[str, asyncio.Future[Ended | Refused]] = {}

    async def start(self) -> None:
        """Listen."""
        await self._bus.subscribe(topics.EVENTS, self._take, client=CLIENT)

    async def ask(self, asked: Asked) -> RoundReport:
        """The end's report. Raises RequestRefused."""
        request = new_id()
        self._waiting[request] = asyncio.get_running_loop().create_future()
        ask = Ask(
            request=request,
            client=CLIENT,
            question=asked.question,
            sources=asked.sources,
            receiver=asked.receiver,
            deadline_s=asked.deadline_s,
            quality_floor=asked.quality_floor,
            max_new_tokens=asked.max_new_tokens,
        )
        try:
            await self._bus.publish(topics.REQUESTS, ask)
            end = await self._waiting[request]
        finally:
            del self._waiting[request]
        if isinstance(end, Refused):
            raise RequestRefused(end.reason)
        return end.report

    def _take(self, event: RoundEvent, _: Mapping[str, str]) -> None:
        if isinstance(event, Ended | Refused):
            request = event.report.request if isinstance(event, Ended) else event.request
            waiting = self._waiting.get(request)
            if waiting is not None and not waiting.done():
                waiting.set_result(event)


def _delay(rate: Trace | float, otherwise_s: float, clock: Callable[[], float]) -> Callable[[], float]:
    """One way, now."""

    def delay_s() -> float:
        rtt_s = rate.at(clock()).rtt_s if isinstance(rate, Trace) else None
        return otherwise_s if rtt_s is None else rtt_s / 2

    return delay_s


def _signal(rate: Trace | float, clock: Callable[[], float]) -> Callable[[], float | None]:
    def dbm() -> float | None:
        return rate.at(clock()).rssi_dbm if isinstance(rate, Trace) else None

    return dbm


@contextmanager
def _seldom_collected() -> Iterator[None]:
    before = gc.get_threshold()
    if before[0]:  # 0: somebody wants none
        gc.set_threshold(max(before[0], COLLECTED_AFTER), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


async def _cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
