"""A running guest, and a site on this machine that it takes part in."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from coordinator.fleet import AgentState
from scripts.prepare_model.cache import cache_root
from tests.guest.image import USER, image, missing
from tests.guest.machine import HOST, Machine
from tests.integration.conftest import SITE, Site, running_site

AGENT = "guest"
LONGEST_S = 900.0


@dataclass
class Run:
    """One run of `python -m scripts.flash`."""

    process: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)
    _reading: asyncio.Task[None] | None = None

    async def until(self, words: str) -> None:
        """It has said so."""
        async with asyncio.timeout(LONGEST_S):
            while not any(words in line for line in self.lines):
                assert self.process.returncode is None, "\n".join(self.lines)
                await asyncio.sleep(0.05)

    async def end(self) -> int:
        """How it ended."""
        assert self._reading is not None
        async with asyncio.timeout(LONGEST_S):
            await self._reading
            return await self.process.wait()

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line.decode().rstrip())


@dataclass
class Bench:
    """The machine, the site, and what flashes one from the other."""

    machine: Machine
    site: Site
    folder: Path
    bundle: Path

    async def start(self, command: str, *words: str) -> Run:
        """Begin one."""
        options = ["--ssh-key", str(self.machine.key), "--known-hosts", str(self.folder / "known_hosts")]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "scripts.flash", command, self.name, *options, *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        run = Run(process)
        run._reading = asyncio.create_task(run._read())
        return run

    async def run(self, command: str, *words: str) -> tuple[int, str]:
        """How it ended, and all that it said."""
        run = await self.start(command, *words)
        return await run.end(), "\n".join(run.lines)

    def flashing(self, *words: str, broker: int | None = None, bundle: Path | None = None) -> list[str]:
        """The options of `flash`. broker: its port here, if it isn't the site's; such a one has users."""
        port = broker or self.site.port
        return [
            *("--agent", AGENT, "--site", SITE, "--model", str(bundle or self.bundle)),
            *("--broker", f"{HOST}:{port}", "--broker-here", f"127.0.0.1:{port}"),
            *(("--users", str(self.folder / "users")) if broker else ("--open-broker",)),
            *(
                "--folder",
                str(cache_root() / "tests" / "device-bundle"),
                "--site-key",
                str(self.folder / "site-key.pem"),
            ),
            *words,
        ]

    async def flash(self, *words: str, broker: int | None = None, bundle: Path | None = None) -> dict[str, Any]:
        """Flash; what it reports of the host. It must succeed."""
        report = self.folder / "report.json"
        options = self.flashing("--json", str(report), *words, broker=broker, bundle=bundle)
        code, said = await self.run("flash", *options)
        assert code == 0, said
        (host,) = json.loads(report.read_text())["hosts"]
        result: dict[str, Any] = host["result"]
        return result

    async def status(self) -> dict[str, Any]:
        """What the device has."""
        report = self.folder / "status.json"
        code, said = await self.run("status", "--json", str(report))
        assert code == 0, said
        (host,) = json.loads(report.read_text())["hosts"]
        facts: dict[str, Any] = host["result"]["facts"]
        return facts

    @property
    def name(self) -> str:
        """Of the host."""
        return f"{USER}@127.0.0.1:{self.machine.port}"

    async def told_online(self) -> str:
        """The agent is on the site's bus; its instance."""
        return await self.another_online("")

    async def another_online(self, instance: str) -> str:
        """The agent is there, not as that instance any more."""

        def there(state: AgentState) -> bool:
            presence = state.presence
            return presence is not None and presence.state == "online" and presence.instance != instance

        state = await self.site.until(AGENT, there)
        assert state.presence is not None
        return state.presence.instance


class Log:
    """What was done and how long it took, for whoever reads the test's output."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began_s:6.0f} s] {re.sub(r'127.0.0.1:[0-9]+', 'guest', text)}", flush=True)  # noqa: T201


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """An arm64 device that nobody has flashed."""
    why = missing()
    if why:
        pytest.skip(f"{why} (see tests/guest/image.py)")
    with Machine(image(), tmp_path_factory.mktemp("guest")) as running:
        yield running


@pytest.fixture
async def bench(machine: Machine, tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> AsyncIterator[Bench]:
    """A site with nothing but a broker and a coordinator, beside the device."""
    folder = tmp_path_factory.mktemp("site")
    async with running_site("amqtt", folder, tiny_bundle) as site:
        yield Bench(machine=machine, site=site, folder=folder, bundle=tiny_bundle)
