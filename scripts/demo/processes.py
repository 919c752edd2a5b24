"""The demo's processes: started with logs of their own, watched, and always ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

GRACE_S = 5.0
START_TIMEOUT_S = 120.0
LINES_SHOWN = 5


class DemoFailed(Exception):
    """The demo can't go on; str() is what a person reads."""


@dataclass
class Processes:
    """Started programs, by name."""

    folder: Path
    running: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    async def start(self, name: str, arguments: Sequence[str]) -> None:
        """Run `python -m …` in a process group of its own, its output in NAME.log."""
        await self.start_program(name, [sys.executable, "-m", *arguments])

    async def start_program(self, name: str, command: Sequence[str]) -> None:
        """Run any command so; the log of an earlier one of that name is continued."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = await asyncio.create_subprocess_exec(
                *command,
                stdout=log,
                stderr=log,
                stdin=asyncio.subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise DemoFailed if one has ended, with the last lines it wrote."""
        for name, process in self.running.items():
            if process.returncode is not None:
                raise DemoFailed(f"{name} ended with status {process.returncode}:\n{self.last_lines(name)}")

    def last_lines(self, name: str) -> str:
        """The end of a program's log, indented."""
        lines = (self.folder / f"{name}.log").read_text(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-LINES_SHOWN:])

    async def end(self, *names: str) -> None:
        """End these: asked first, then killed."""
        ending = [self.running.pop(name) for name in names]
        for process in ending:
            _signal(process, signal.SIGTERM)
        try:
            async with asyncio.timeout(GRACE_S):
                await asyncio.gather(*(process.wait() for process in ending))
        except TimeoutError:
            for process in ending:
                _signal(process, signal.SIGKILL)
            await asyncio.gather(*(process.wait() for process in ending))

    async def stop(self) -> None:
        """End all of them."""
        await self.end(*self.running)


@asynccontextmanager
async def processes(folder: Path) -> AsyncIterator[Processes]:
    """Processes that do not outlive the block, however it is left."""
    started = Processes(folder)
    try:
        yield started
    finally:
        await asyncio.shield(started.stop())


async def until_listening(port: int, programs: Processes) -> None:
    """Until somebody takes connections at a port. Raises DemoFailed, TimeoutError."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            programs.check()
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
