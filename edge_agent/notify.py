"""What systemd hears of an agent that it runs: ready, alive, and one line of how it is (sd_notify(3)).

Without systemd (no NOTIFY_SOCKET) nothing is said.
"""

from __future__ import annotations

import asyncio
import os
import socket

SIGNS = 4
"""Signs of life within the time after which systemd takes the agent for hung."""


def notify(**fields: str) -> None:
    """Say NAME=value, like ready="1" or status="…". Never raises: nobody may be listening."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    text = "\n".join(f"{name.upper()}={' '.join(value.split())}" for name, value in fields.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
            out.connect("\0" + address[1:] if address.startswith("@") else address)
            out.send(text.encode())
    except OSError:
        return


async def keep_alive() -> None:
    """Give signs of life as often as systemd wants them, as long as the event loop turns; for ever."""
    limit_us = os.environ.get("WATCHDOG_USEC", "")
    if not limit_us.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify(watchdog="1")
        await asyncio.sleep(int(limit_us) / 1e6 / SIGNS)
