"""Replays with everything real but the distance: broker, coordinator, agents with a model, each behind an emulated link
that follows its trace.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import msgspec

from broker_config.errors import BusError
from broker_config.messages import RoundReport, Telemetry
from broker_config.mosquitto import render
from broker_config.settings import BrokerSettings
from coordinator.client import Client
from coordinator.errors import CoordinatorError, CoordinatorMissing, RequestImpossible, RequestRefused
from coordinator.fleet import Fleet
from coordinator.policy import POLICIES
from coordinator.recording import Recorded
from edge_agent.model.manifest import read_manifest
from edge_agent.model.text import Text
from scripts.demo.processes import START_TIMEOUT_S, DemoFailed, Processes, free_port, processes, until_listening
from scripts.link import Bucket, EmulatedLink, follow
from scripts.replay.asks import Asked, Refusals, context_name, patiently, schedule
from scripts.replay.errors import SettingInvalid
from scripts.replay.results import QuestionResult, Result, Seconds, question_result, refused_result
from scripts.replay.setting import MBIT, SITE, AgentTerms, Place, SharedTerms, link_of
from scripts.traces import Trace

TEXTS = Path(__file__).parents[1] / "prepare_model" / "texts"
FILLERS = (" so", " and", "s", ".", "x")
"""Of one token in most vocabularies: what a text is brought to its length with."""
START_MBPS = 200.0
"""While agents start."""
RUN_GRACE_S = 30.0
"""What comes to the time after which the last question must have ended."""

Say = Callable[[str], None]


class Broker(StrEnum):
    """Which is started."""

    EMBEDDED = "embedded"
    MOSQUITTO = "mosquitto"


@dataclass(frozen=True, kw_only=True)
class LiveTerms:
    """What is replayed live. folder: for configurations, logs, recordings."""

    place: Place
    traces: Sequence[tuple[str, Trace | None]]
    policies: Sequence[str]
    bundle: Path
    folder: Path
    broker: Broker = Broker.EMBEDDED
    seed: int = 0


@dataclass(frozen=True)
class Played:
    """A result, and the recording of its session."""

    result: Result
    recording: Path


async def live(terms: LiveTerms, say: Say) -> AsyncIterator[Played]:
    """Every trace under every policy in turn, as each ends. Raises SettingInvalid, ScheduleInvalid, DemoFailed."""
    check_live(terms)
    asked = schedule(terms.place, [tuple(agent.name for agent in terms.place.setting.agents)], terms.seed)
    async with _stage(terms, say) as stage:
        for name, trace in terms.traces:
            for policy in terms.policies:
                seconds = terms.place.setting.duration_s
                say(f"{name or terms.place.name}, {policy}: {len(asked)} questions in {seconds:g} s")
                yield await stage.play(name, trace, policy, asked)


def check_live(terms: LiveTerms) -> None:
    """Raises SettingInvalid for what can only be replayed in virtual time."""
    setting = terms.place.setting
    if setting.copies > 1:
        raise SettingInvalid("live, every agent is a process of its own: copies must be 1")
    for agent in setting.agents:
        if agent.memory.trace is not None:
            raise SettingInvalid(f"{agent.name}: live, memory is this machine's; a memory trace needs virtual time")
        if not agent.cached:
            raise SettingInvalid(f"{agent.name}: live, agents read their contexts before the first question")
    for policy in terms.policies:
        if policy not in POLICIES:
            raise SettingInvalid(f"live, policies are the coordinator's: {', '.join(POLICIES)}, not {policy}")
    for name, trace in terms.traces:
        links: tuple[AgentTerms | SharedTerms, ...] = (*setting.agents, *setting.channels)
        for each in links:
            try:
                link_of(terms.place, each, trace, terms.seed)
            except SettingInvalid as error:
                raise SettingInvalid(f"{name}: {error}") from None


class _Stage:
    """Everything that runs."""

    def __init__(
        self, terms: LiveTerms, *, port: int, client: Client, links: dict[str, EmulatedLink], programs: Processes
    ) -> None:
        self._terms, self._port, self._client, self._links, self._programs = terms, port, client, links, programs
        self._runs = 0

    async def play(self, name: str, trace: Trace | None, policy: str, asked: Sequence[Asked]) -> Played:
        """One run, by a coordinator that has learned nothing yet."""
        terms, setting = self._terms, self._terms.place.setting
        self._runs += 1
        recording = terms.folder / f"{self._runs:02d}-{name or terms.place.name}-{policy}.mcap"
        began_s = time.perf_counter()
        await self._start_coordinator(policy, recording)
        start_s = time.monotonic()
        following = self._follow(trace)
        results: list[QuestionResult] = []
        longest_s = setting.duration_s + setting.requests.patience_s + setting.planning.round_timeout_s + RUN_GRACE_S
        error = ""
        try:
            async with asyncio.timeout(longest_s), asyncio.TaskGroup() as group:
                for number, each in enumerate(asked):
                    group.create_task(self._ask(number, each, start_s, results))
        except* (TimeoutError, BusError, CoordinatorError) as errors:
            first = errors.exceptions[0]
            error = str(first) or f"a question had no end after {longest_s:g} s"
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)
            await self._programs.end("coordinator")
        seconds = Seconds(lambda agent, at_s: self._true_mbps(agent, trace, at_s))
        for event in Recorded(recording):
            if event.at_s >= start_s:
                seconds.add(event, event.at_s - start_s)
        result = Result(
            mode="live",
            site=terms.place.name,
            trace=name,
            device="",
            policy=policy,
            seed=terms.seed,
            duration_s=setting.duration_s,
            questions=tuple(sorted(results, key=lambda result: result.number)),
            agents=seconds.agents,
            error=error,
            seconds=time.perf_counter() - began_s,
        )
        return Played(result, recording)

    async def _start_coordinator(self, policy: str, recording: Path) -> None:
        folder = self._terms.folder / f"state-{self._runs}"
        folder.mkdir()
        path = self._terms.folder / "coordinator.toml"
        path.write_text(_coordinator_toml(self._terms.place, policy, folder, self._port), encoding="utf-8")
        command = ["coordinator.cli", "run", "--config", str(path), "--record", str(recording)]
        await self._programs.start("coordinator", command)
        until_s = time.monotonic() + START_TIMEOUT_S
        while True:
            self._programs.check()
            try:
                await self._client.coordinator()
            except CoordinatorMissing:
                if time.monotonic() > until_s:
                    raise
            else:
                return

    def _follow(self, trace: Trace | None) -> list[asyncio.Task[None]]:
        """Links at the start of their traces, from now on."""
        tasks = []
        for agent, link in self._links.items():
            rate = self._rate(agent, trace)
            if isinstance(rate, Trace):
                tasks.append(asyncio.create_task(follow(link, rate), name=f"trace of {agent}"))
            else:
                link.set_rate(rate, rate)
        return tasks

    async def _ask(self, number: int, asked: Asked, start_s: float, results: list[QuestionResult]) -> None:
        await asyncio.sleep(start_s + asked.at_s - time.monotonic())
        self._programs.check()

        async def ask() -> RoundReport:
            try:
                return await self._client.ask(
                    asked.question,
                    sources=asked.sources,
                    receiver=asked.receiver,
                    deadline_s=asked.deadline_s,
                    quality_floor=asked.quality_floor,
                    max_new_tokens=asked.max_new_tokens,
                )
            except RequestImpossible as error:
                raise RequestRefused(str(error)) from None

        try:
            taken = await patiently(ask, self._terms.place.setting.requests.patience_s)
        except Refusals as error:
            results.append(refused_result(number, asked, error.count, str(error)))
        else:
            kls = {rung.name: rung.kl for rung in read_manifest(self._terms.bundle).info().ladder}
            results.append(question_result(number, asked, taken, kls))

    def _rate(self, agent: str, trace: Trace | None) -> Trace | float:
        place = self._terms.place
        each = next((channel for channel in place.setting.channels if agent in channel.members), None)
        terms = each or next(known for known in place.setting.agents if known.name == agent)
        return link_of(place, terms, trace, self._terms.seed)

    def _true_mbps(self, agent: str, trace: Trace | None, at_s: float) -> float:
        rate = self._rate(agent, trace)
        return round((rate.at(at_s).bandwidth_bps if isinstance(rate, Trace) else rate) / MBIT, 4)


@asynccontextmanager
async def _stage(terms: LiveTerms, say: Say) -> AsyncIterator[_Stage]:
    """Broker and agents, all ready: models loaded, contexts read, links measured."""
    setting = terms.place.setting
    text = Text(terms.bundle, read_manifest(terms.bundle))
    async with AsyncExitStack() as stack:
        programs = await stack.enter_async_context(processes(terms.folder))
        port = free_port()
        if terms.broker is Broker.EMBEDDED:
            await programs.start("broker", ["coordinator.cli", "broker", "--port", str(port)])
        else:
            configuration = terms.folder / "mosquitto.conf"
            configuration.write_text(render("127.0.0.1", port, None, None), encoding="utf-8")
            await programs.start_program("broker", ["mosquitto", "-c", str(configuration)])
        await until_listening(port, programs)
        shared = {member: Bucket(START_MBPS * MBIT) for channel in setting.channels for member in channel.members[:1]}
        for channel in setting.channels:
            shared |= dict.fromkeys(channel.members, shared[channel.members[0]])
        links = {}
        for agent in setting.agents:
            up = shared.get(agent.name) or Bucket(START_MBPS * MBIT)
            down = shared.get(agent.name) or Bucket(START_MBPS * MBIT)
            delay_s = agent.delay_ms / 1000
            link = EmulatedLink(
                broker_host="127.0.0.1",
                broker_port=port,
                uplink=up,
                downlink=down,
                uplink_delay_s=delay_s,
                downlink_delay_s=delay_s,
            )
            links[agent.name] = await stack.enter_async_context(link)
        settings = BrokerSettings(port=port, backoff_first_s=0.1, backoff_cap_s=0.5)
        client = await stack.enter_async_context(Client(broker=settings, site=SITE))
        watch = await stack.enter_async_context(client.watch())
        for agent in setting.agents:  # one after another: they measure their own speed as they start
            say(f"starting {agent.name} …")
            path = _configured(terms, agent, text, links[agent.name].port)
            await programs.start(agent.name, ["edge_agent.cli", "run", str(path), "--plain"])
            until_s = time.monotonic() + START_TIMEOUT_S
            while not _ready(watch.fleet, agent):
                programs.check()
                if time.monotonic() > until_s:
                    raise DemoFailed(f"{agent.name} was not ready after {START_TIMEOUT_S:g} s")
                await asyncio.sleep(0.2)
        yield _Stage(terms, port=port, client=client, links=links, programs=programs)


def _ready(fleet: Fleet, agent: AgentTerms) -> bool:
    state = fleet.agents.get(agent.name)
    if state is None or state.telemetry is None or state.model is None:
        return False
    contexts, link = state.telemetry.contexts, state.telemetry.link
    read = len(contexts) == len(agent.contexts) and all(context.cached for context in contexts)
    return read and link.uplink_bps is not None and link.downlink_bps is not None


def _configured(terms: LiveTerms, agent: AgentTerms, text: Text, port: int) -> Path:
    """The agent's configuration, and its contexts in a folder."""
    setting, folder = terms.place.setting, terms.folder / f"{agent.name}-contexts"
    folder.mkdir()
    for tokens in agent.contexts:
        (folder / f"{context_name(tokens)}.txt").write_text(text_of(tokens, agent.name, text), encoding="utf-8")
    memory, telemetry = agent.memory, setting.telemetry
    path = terms.folder / f"{agent.name}.toml"
    path.write_text(
        f'agent = "{agent.name}"\nsite = "{SITE}"\nbundle = {json.dumps(str(terms.bundle))}\n'
        f"contexts_folder = {json.dumps(str(folder))}\n"
        f"[broker]\nport = {port}\nbackoff_cap_s = 0.5\n"
        f"[memory]\ncache_budget_mb = {memory.cache_budget_mb}\n"
        f"high_watermark = {memory.high_watermark}\nlow_watermark = {memory.low_watermark}\n"
        f"[telemetry]\ninterval_s = {telemetry.interval_s}\nprobe_interval_s = {telemetry.probe_interval_s}\n",
        encoding="utf-8",
    )
    return path


def _coordinator_toml(place: Place, policy: str, folder: Path, port: int) -> str:
    channels = "".join(
        f'[[channels]]\nname = "{each.name}"\nmembers = {json.dumps(list(each.members))}\n'
        for each in place.setting.channels
    )
    planning = place.setting.planning
    return (
        f'site = "{SITE}"\nstate_folder = {json.dumps(str(folder))}\n'
        f"[broker]\nport = {port}\nbackoff_cap_s = 0.5\n"
        f'[planning]\npolicy = "{policy}"\ntie_fraction = {planning.tie_fraction}\n'
        f"rate_quantile = {planning.rate_quantile}\nround_timeout_s = {planning.round_timeout_s}\n"
        f"revise_factor = {planning.revise_factor}\nrevise_interval_s = {planning.revise_interval_s}\n"
        f"expiry_s = {planning.expiry_s}\n{channels}"
    )


def text_of(tokens: int, agent: str, text: Text) -> str:
    """A text of so many tokens, as a context, and another for every agent. Raises SettingInvalid."""
    words = "\n".join(path.read_text(encoding="utf-8") for path in sorted(TEXTS.glob("*.md"))).split()
    first = int.from_bytes(agent.encode(), "big") % len(words)
    words = [f"{agent}:", *words[first:], *words[:first]]
    words *= 1 + 2 * tokens // len(words)
    few, many = 0, len(words)
    while many - few > 1:  # the most words that fit
        middle = (few + many) // 2
        few, many = (middle, many) if len(text.context_ids(" ".join(words[:middle]))) <= tokens else (few, middle)
    made = " ".join(words[:few])
    while made and (count := len(text.context_ids(made))) < tokens:
        longer = (made + filler for filler in FILLERS)
        made = next((each for each in longer if count < len(text.context_ids(each)) <= tokens), "")
    if not made:
        raise SettingInvalid(f"no text of {tokens} tokens can be made for {agent}; take a longer context")
    return made


def measured(place: Place, recording: Path, bundle: Path) -> Place:
    """The same with the model of the bundle, and the speeds that agents told of in a session: for virtual time.

    Raises RecordingInvalid.
    """
    speeds = {}
    for event in Recorded(recording):
        if isinstance(event.message, Telemetry) and event.message.speed is not None:
            speeds[event.message.agent] = event.message.speed
    agents = tuple(
        msgspec.structs.replace(agent, speed=speeds.get(agent.name, agent.speed)) for agent in place.setting.agents
    )
    model = read_manifest(bundle).info()
    return replace(place, setting=msgspec.structs.replace(place.setting, agents=agents, model=model))
