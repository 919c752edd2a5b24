"""What systemd is told, as its own library would tell it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.notify import keep_alive, notify


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listening


def test_fields_are_said_in_capitals_a_line_each(systemd: socket.socket) -> None:
    notify(ready="1", status="at the broker\nand well")
    assert systemd.recv(1000) == b"READY=1\nSTATUS=at the broker and well"


def test_an_abstract_socket_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"kvbus-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        listening.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify(watchdog="1")
        assert listening.recv(1000) == b"WATCHDOG=1"


@pytest.mark.parametrize("address", ["", "relative", "/nonexistent/socket", "@nobody-listens"])
def test_nobody_who_listens_is_no_fault(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify(ready="1")


async def test_signs_of_life_come_more_often_than_they_must(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    alive = asyncio.create_task(keep_alive())
    for _ in range(3):
        assert await asyncio.to_thread(systemd.recv, 1000) == b"WATCHDOG=1"
    assert not alive.done()
    alive.cancel()


@pytest.mark.parametrize(("limit", "process"), [("", None), ("soon", None), ("400000", "1")])
async def test_who_is_not_watched_gives_none(
    limit: str, process: str | None, systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", limit)
    if process:
        monkeypatch.setenv("WATCHDOG_PID", process)
    else:
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
    await asyncio.wait_for(keep_alive(), 2)
