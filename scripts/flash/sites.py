"""Where a site's broker is: as its devices reach it, and as we do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from broker_config.settings import BrokerSettings
from broker_config.users import users as names_in
from coordinator.credentials import add_agent
from scripts.flash.device import DEFAULT_PORT
from scripts.flash.errors import HostUnfit

OWN_USER = "flash"
"""At the broker: who asks an agent for its proof."""


def here_of(users: Path | None, address: str) -> Callable[[BrokerSettings], BrokerSettings]:
    """The broker as we reach it, with a user of our own."""
    user = password_file = None
    if users is not None:
        user, password = OWN_USER, users.parent / f"{OWN_USER}.password"
        if OWN_USER not in names_in(users) or not password.exists():
            add_agent(users, OWN_USER)
        password_file = str(password)

    def here(there: BrokerSettings) -> BrokerSettings:
        host, port = broker_place(address, there.host, there.port)
        return BrokerSettings(host=host, port=port, username=user, password_file=password_file)

    return here


def broker_place(address: str, default: str, port: int = DEFAULT_PORT) -> tuple[str, int]:
    """HOST[:PORT], or the default. Raises HostUnfit."""
    if not address:
        if default.startswith("127.") or default == "::1":
            raise HostUnfit("the broker's address for devices can't be told from here; give it: --broker HOST[:PORT]")
        return default, port
    host, separator, number = address.rpartition(":")
    if not separator or address.endswith("]"):
        return address.strip("[]"), port
    if not number.isdigit() or not 0 < int(number) < 1 << 16:
        raise HostUnfit(f"{address!r} is no HOST[:PORT]")
    return host.strip("[]"), int(number)
