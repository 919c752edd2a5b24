"""The stage: broker, coordinator, three agents, each behind a link of its own, and what can be done to them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from broker_config.settings import BrokerSettings
from coordinator.client import Client, Watch
from coordinator.fleet import Fleet
from coordinator.show import size
from scripts.demo.processes import START_TIMEOUT_S, DemoFailed, Processes, free_port, processes, until_listening
from scripts.demo.script import AGENTS, CACHE_BUDGET_MB, DOCUMENTS, FILLED, MEGABIT, RECEIVER, SENDERS, Act, pages
from scripts.link import Bucket, EmulatedLink

SITE = "demo"
EXACT = "float32"
DELAY_S = 0.005
LINK_TIMEOUT_S = 12.0
CLOSE_ENOUGH = 0.25
"""A measured rate this near to the set one is taken as settled."""

Say = Callable[[str], None]


class Stage:
    """Everything that runs."""

    def __init__(self, *, client: Client, watch: Watch, links: dict[str, EmulatedLink], programs: Processes) -> None:
        self.client, self.programs = client, programs
        self._watch, self._links = watch, links
        self._given: list[str] = []

    async def set_links(self, act: Act) -> None:
        """Change the links' rates and wait until the agents have noticed."""
        for agent, mbps in act.rates_mbps.items():
            self._links[agent].set_rate(mbps * MEGABIT, mbps * MEGABIT)
        try:
            async with asyncio.timeout(LINK_TIMEOUT_S):
                await self._watch.until(
                    lambda fleet: all(_noticed(fleet, agent, mbps) for agent, mbps in act.rates_mbps.items())
                )
        except TimeoutError:
            return  # planned from what is measured, as always; the report shows it

    async def fill(self, pressure: float) -> None:
        """Give pages to FILLED until its memory pressure is there."""
        await self._give_until(lambda fleet: _pressure(fleet, FILLED) >= pressure)

    async def tighten(self) -> None:
        """Give pages to FILLED until the cache of its own document has been tightened for them."""
        await self._give_until(lambda fleet: _rung(fleet, FILLED, SENDERS[FILLED]) not in {EXACT, None})

    def kept(self) -> str:
        """What FILLED keeps, at which rungs."""
        state = self._watch.fleet.agents[FILLED].telemetry
        contexts = state.contexts if state else ()
        rungs = Counter(context.rung for context in contexts if context.rung)
        parts = ", ".join(f"{count} at {rung}" for rung, count in rungs.most_common())
        taken = sum(context.cache_bytes for context in contexts)
        return f"{FILLED} keeps {len(contexts)} contexts, {parts}, in {size(taken)}"

    async def _give_until(self, done: Callable[[Fleet], bool]) -> None:
        for name, text in pages()[len(self._given) :]:
            if done(self._watch.fleet):
                return
            await self.client.give(FILLED, name, text)
            self._given.append(name)
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._watch.until(lambda fleet, name=name: _cached(fleet, FILLED, name))  # type: ignore[misc]
        raise DemoFailed(f"all pages given, and {FILLED}'s memory is not yet as the act wants it: {self.kept()}")


@asynccontextmanager
async def stage(bundle: Path, folder: Path, act: Act, say: Say, record: Path | None = None) -> AsyncIterator[Stage]:
    """Broker, coordinator and agents, all ready: models loaded, documents cached, links measured.

    record: the file that the session is recorded to.
    """
    async with AsyncExitStack() as stack:
        programs = await stack.enter_async_context(processes(folder))
        port = free_port()
        await programs.start("broker", ["coordinator.cli", "broker", "--port", str(port)])
        settings = BrokerSettings(port=port, backoff_first_s=0.1, backoff_cap_s=0.5)
        configuration = folder / "coordinator.toml"
        configuration.write_text(
            f'site = "{SITE}"\nstate_folder = "{folder}"\n[broker]\nport = {port}\nbackoff_cap_s = 0.5\n'
        )
        await until_listening(port, programs)
        recorded = ["--record", str(record)] if record else []
        await programs.start("coordinator", ["coordinator.cli", "run", "--config", str(configuration), *recorded])
        links = {}
        for agent in AGENTS:
            rate = act.rates_mbps[agent] * MEGABIT
            link = EmulatedLink(
                broker_host="127.0.0.1",
                broker_port=port,
                uplink=Bucket(rate),
                downlink=Bucket(rate),
                uplink_delay_s=DELAY_S,
                downlink_delay_s=DELAY_S,
            )
            links[agent] = await stack.enter_async_context(link)
            path = folder / f"{agent}.toml"
            path.write_text(_agent_toml(agent, bundle, folder, link.port))
        client = await stack.enter_async_context(Client(broker=settings, site=SITE))
        watch = await stack.enter_async_context(client.watch())
        for group in (tuple(SENDERS), (RECEIVER,)):  # not all at once: they measure their own speed as they start
            for agent in group:
                await programs.start(agent, ["edge_agent.cli", "run", str(folder / f"{agent}.toml"), "--plain"])
            await _until_ready(watch, programs, group, say)
        yield Stage(client=client, watch=watch, links=links, programs=programs)


async def _until_ready(watch: Watch, programs: Processes, agents: tuple[str, ...], say: Say) -> None:
    said = ""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while waiting := [f"{agent} ({what})" for agent in agents if (what := _missing(watch.fleet, agent))]:
        programs.check()
        if said != (said := "waiting for " + ", ".join(waiting)):
            say(said)
        if time.monotonic() > deadline_s:
            raise DemoFailed(f"not ready after {START_TIMEOUT_S:.0f} s: {said}")
        await asyncio.sleep(0.1)


def _missing(fleet: Fleet, agent: str) -> str:
    """What an agent still lacks, or nothing."""
    state = fleet.agents.get(agent)
    if state is None or state.telemetry is None or state.model is None:
        return "loads its model"
    telemetry = state.telemetry
    if agent in SENDERS and not any(info.cached for info in telemetry.contexts):
        return "reads its document"
    if telemetry.link.uplink_bps is None or telemetry.link.downlink_bps is None:
        return "measures its link"
    return ""


def _noticed(fleet: Fleet, agent: str, mbps: float) -> bool:
    """Whether an agent's measured rates are near the set one."""
    telemetry = fleet.agents[agent].telemetry
    rates = (telemetry.link.uplink_bps, telemetry.link.downlink_bps) if telemetry else (None,)
    return all(bps is not None and abs(bps / (mbps * MEGABIT) - 1) < CLOSE_ENOUGH for bps in rates)


def _pressure(fleet: Fleet, agent: str) -> float:
    telemetry = fleet.agents[agent].telemetry
    return telemetry.memory.pressure if telemetry else 0.0


def _rung(fleet: Fleet, agent: str, name: str) -> str | None:
    telemetry = fleet.agents[agent].telemetry
    contexts = telemetry.contexts if telemetry else ()
    return next((context.rung for context in contexts if context.name == name), None)


def _cached(fleet: Fleet, agent: str, name: str) -> bool:
    telemetry = fleet.agents[agent].telemetry
    return telemetry is not None and any(info.name == name and info.cached for info in telemetry.contexts)


def _agent_toml(agent: str, bundle: Path, folder: Path, port: int) -> str:
    contexts = ""
    if agent in SENDERS:
        own = folder / f"{agent}-documents"
        own.mkdir()
        text = (DOCUMENTS / f"{SENDERS[agent]}.txt").read_text(encoding="utf-8")
        (own / f"{SENDERS[agent]}.txt").write_text(text, encoding="utf-8")
        contexts = f'contexts_folder = "{own}"\n'
    return (
        f'agent = "{agent}"\nsite = "{SITE}"\nbundle = "{bundle}"\n{contexts}'
        f"[broker]\nport = {port}\nbackoff_cap_s = 0.5\n"
        f"[memory]\ncache_budget_mb = {CACHE_BUDGET_MB}\n"
        "[telemetry]\ninterval_s = 0.5\nprobe_interval_s = 0.3\n"
    )
