"""A whole site of real processes: broker, coordinator, agents with the tiny model."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from broker_config.mosquitto import render
from broker_config.settings import BrokerSettings
from coordinator.client import Client
from coordinator.fleet import AgentState
from scripts.demo.processes import Processes, free_port, processes

SITE = "test"
READY_S = 60.0

WORDS = (
    *("valve", "pump", "north", "tank", "meter", "cable", "storm", "crew"),
    *("relay", "panel", "depth", "pressure", "tower", "engine", "ladder", "signal"),
)


def text(seed: int, words: int = 60) -> str:
    """A text of so many words (about four tokens of the tiny tokenizer each), another for every seed."""
    return " ".join(WORDS[(seed * 7 + i * (seed + 3) + i // 5) % len(WORDS)] for i in range(words)) + "."


@dataclass
class Site:
    """What runs, and how to do things to it."""

    kind: str
    folder: Path
    bundle: Path
    programs: Processes
    port: int
    client: Client
    agents: list[str] = field(default_factory=list)

    @property
    def settings(self) -> BrokerSettings:
        return BrokerSettings(port=self.port, backoff_first_s=0.05, backoff_cap_s=0.3)

    async def start_broker(self) -> None:
        """The broker, on the site's port, with sessions kept where it can (Mosquitto)."""
        if self.kind == "amqtt":
            await self.programs.start("broker", ["coordinator.cli", "broker", "--port", str(self.port)])
            return
        configuration = self.folder / "mosquitto.conf"
        persistence = self.folder / "sessions"
        persistence.mkdir(exist_ok=True)
        persistence.chmod(0o777)
        configuration.write_text(render("127.0.0.1", self.port, None, persistence))
        await self.programs.start_program("broker", ["mosquitto", "-c", str(configuration)])

    async def start_coordinator(self, extra: str = "") -> None:
        path = self.folder / "coordinator.toml"
        path.write_text(
            f'site = "{SITE}"\nstate_folder = "{self.folder}"\n[broker]\nport = {self.port}\nbackoff_cap_s = 0.3\n'
            f"[planning]\nexpiry_s = 2.5\n{extra}"
        )
        await self.programs.start("coordinator", ["coordinator.cli", "run", "--config", str(path)])

    async def start_agent(
        self,
        agent: str,
        *,
        texts: dict[str, str] | None = None,
        port: int | None = None,
        bundle: Path | None = None,
        process: str | None = None,
        budget_mb: float = 64.0,
    ) -> None:
        """An agent that holds these texts; port: that of its link, if it has one."""
        name = process or agent
        contexts = ""
        if texts:
            own = self.folder / f"{name}-contexts"
            own.mkdir(exist_ok=True)
            for title, content in texts.items():
                (own / f"{title}.txt").write_text(content)
            contexts = f'contexts_folder = "{own}"\n'
        path = self.folder / f"{name}.toml"
        path.write_text(
            f'agent = "{agent}"\nsite = "{SITE}"\nbundle = "{bundle or self.bundle}"\n{contexts}'
            f"[broker]\nport = {port or self.port}\nbackoff_first_s = 0.05\nbackoff_cap_s = 0.3\nkeepalive_s = 4\n"
            f"[memory]\ncache_budget_mb = {budget_mb}\n"
            "[telemetry]\ninterval_s = 0.2\nprobe_interval_s = 0.2\n"
        )
        await self.programs.start(name, ["edge_agent.cli", "run", str(path), "--plain"])
        self.agents.append(agent)

    async def state(self, agent: str) -> AgentState | None:
        return (await self.client.fleet(settle_s=0.4)).agents.get(agent)

    async def until(self, agent: str, holds: Callable[[AgentState], bool]) -> AgentState:
        """Wait until what an agent reports is so."""
        async with asyncio.timeout(READY_S):
            while True:
                state = await self.state(agent)
                if state is not None and holds(state):
                    return state
                self.programs.check()

    async def until_ready(self) -> None:
        for agent in self.agents:
            await self.until(agent, ready)

    async def kill(self, name: str) -> None:
        """kill -9, and wait for the end."""
        process = self.programs.running.pop(name)
        process.kill()
        await process.wait()


def ready(state: AgentState) -> bool:
    """Online, its link measured, all its contexts cached."""
    telemetry = state.telemetry
    return (
        state.presence is not None
        and state.presence.state == "online"
        and telemetry is not None
        and telemetry.speed is not None
        and telemetry.link.uplink_bps is not None
        and telemetry.link.downlink_bps is not None
        and all(context.cached for context in telemetry.contexts)
    )


@asynccontextmanager
async def running_site(kind: str, folder: Path, bundle: Path) -> AsyncIterator[Site]:
    """A broker and a coordinator; agents are the test's."""
    if kind == "mosquitto" and shutil.which("mosquitto") is None:
        pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
    async with AsyncExitStack() as stack:
        programs = await stack.enter_async_context(processes(folder))
        port = free_port()
        settings = BrokerSettings(port=port, backoff_first_s=0.05, backoff_cap_s=0.3)
        client = Client(broker=settings, site=SITE)
        site = Site(kind=kind, folder=folder, bundle=bundle, programs=programs, port=port, client=client)
        await site.start_broker()
        await site.start_coordinator()
        await stack.enter_async_context(client)
        yield site


@pytest.fixture(params=["amqtt", "mosquitto"])
async def site(request: pytest.FixtureRequest, tmp_path: Path, tiny_bundle: Path) -> AsyncIterator[Site]:
    """A site without agents, on either broker."""
    async with running_site(request.param, tmp_path, tiny_bundle) as started:
        yield started


on_either_broker_when_there_is_time = pytest.mark.parametrize(
    "site", [pytest.param("amqtt", marks=pytest.mark.slow), "mosquitto"], indirect=True
)
"""For what takes long and was never seen to differ: `make test-slow` has the rest."""


@pytest.fixture
async def amqtt_site(tmp_path: Path, tiny_bundle: Path) -> AsyncIterator[Site]:
    """A site on the embedded broker, for what does not depend on the broker."""
    async with running_site("amqtt", tmp_path, tiny_bundle) as started:
        yield started


async def until_true(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait for something that gives no event of its own, such as a line in another process's log."""
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
