"""Where a site's broker is: as its devices reach it, and as we do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from broker_config.settings import BrokerSettings
from coordinator.credentials import password_file_of
from scripts.flash.errors import HostUnfit

DEFAULT_PORT = BrokerSettings().port
OWN_USER = "flash"
"""At the broker: who asks an agent for its proof."""


def here_of(users: Path | None, address: str) -> Callable[[BrokerSettings], BrokerSettings]:
    """The broker as we reach it, with a user of our own."""
    user = password_file = None
    if users is not None:
        user, password_file = OWN_USER, str(password_file_of(users, OWN_USER))

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
