"""The embedded broker for one machine: amqtt, started with limits, in this process.

Also what both brokers share: without users none of them listens beyond this machine.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from broker_config.errors import BrokerRefusedToStart
from broker_config.users import users as names_in

GOODBYE_S = 5.0


class EmbeddedBroker:
    """An MQTT 3.1.1 broker, as an async context manager; entering returns when it listens.

    host: an address of this machine; beyond loopback it refuses to start without users. port: 0 takes a free one.
    users: a file as broker_config.users writes it; with users in it a password is asked for on loopback too, and
    changes count from the next connection on. Raises BrokerRefusedToStart: no users, port in use, or amqtt missing.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 1883, users: Path | None = None) -> None:
        self.host = host
        self._wanted_port, self._users = port, users
        self._broker: Any = None

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._broker.bound_port) if self._broker is not None else self._wanted_port

    async def __aenter__(self) -> Self:
        users = users_needed(self.host, self._users)
        # amqtt tells of every connection, and with tracebacks of those that end
        logging.getLogger("amqtt").setLevel(logging.CRITICAL)
        logging.getLogger("transitions").setLevel(logging.WARNING)
        try:
            # amqtt is installed on the coordinator only, and takes a third of a second to import
            from broker_config.hardened import HardenedBroker  # noqa: PLC0415
        except ImportError as error:
            raise BrokerRefusedToStart(f"the embedded broker needs amqtt, which is not installed: {error}") from None
        broker = HardenedBroker(self.host, self._wanted_port, users)
        try:
            await broker.start()
        except Exception as error:  # noqa: BLE001  (amqtt wraps whatever went wrong)
            raise BrokerRefusedToStart(_why(error, self.host, self._wanted_port)) from None
        self._broker = broker
        return self

    async def __aexit__(self, *_: object) -> None:
        broker, self._broker = self._broker, None
        if broker is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(GOODBYE_S):
                    await broker.close()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a listener on host. A name other than localhost is taken to reach further."""
    bare = host.strip("[]")
    if bare == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def users_needed(host: str, users: Path | None) -> Path | None:
    """The file of users to ask passwords by, or None for an open broker on loopback.

    Raises BrokerRefusedToStart if host is reachable from other machines and there are no users.
    """
    if users is not None and names_in(users):
        return users
    if is_loopback(host):
        return None
    raise BrokerRefusedToStart(
        f"a broker on {host or 'all addresses'} is open to other machines and has no users; "
        "run `coordinator add-agent NAME` first"
    )


def _why(error: BaseException, host: str, port: int) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    if isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use: another broker? Stop it, or choose another port"
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return f"the embedded broker can't listen on {host}:{port}: {reason}"
