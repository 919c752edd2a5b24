"""Real brokers for tests, both behind one interface, that can be killed and come back on the same port."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from pathlib import Path
from typing import Protocol, Self

import pytest

from broker_config.broker import EmbeddedBroker
from broker_config.mosquitto import render

HOST = "127.0.0.1"


class RealBroker(Protocol):
    """A broker that listens on HOST."""

    port: int

    async def kill(self) -> None:
        """Without a goodbye to anybody."""

    async def restart(self) -> None:
        """On the same port."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Amqtt:
    """The embedded broker, in this process."""

    def __init__(self, users: Path | None = None) -> None:
        self.port, self._users = free_port(), users
        self._broker: EmbeddedBroker | None = None

    async def __aenter__(self) -> Self:
        await self.restart()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def kill(self) -> None:
        broker, self._broker = self._broker, None
        if broker is not None:
            await broker.__aexit__(None, None, None)

    async def restart(self) -> None:
        self._broker = await EmbeddedBroker(HOST, self.port, self._users).__aenter__()


class Mosquitto:
    """A real Mosquitto with our configuration, in a process of its own."""

    def __init__(self, directory: Path, users: Path | None = None) -> None:
        self.port = free_port()
        self._binary = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
        if self._binary is None:
            pytest.skip("mosquitto is not installed")
        self._config = directory / "mosquitto.conf"
        run_as = "root" if os.geteuid() == 0 else None
        self._config.write_text(render(HOST, self.port, users, directory, run_as=run_as), encoding="utf-8")
        self._process: asyncio.subprocess.Process | None = None
        self.said = b""

    async def __aenter__(self) -> Self:
        await self.restart()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            _, said = await process.communicate()
            self.said += said

    async def restart(self) -> None:
        assert self._binary is not None
        self._process = await asyncio.create_subprocess_exec(
            self._binary, "-c", str(self._config), stderr=asyncio.subprocess.PIPE
        )
        assert self._process.stderr is not None
        while b"running" not in (line := await self._process.stderr.readline()):
            self.said += line
            assert line, self.said.decode()
