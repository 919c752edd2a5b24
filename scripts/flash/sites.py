"""Where a site's broker is: as its devices reach it, and as we do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from broker_config.errors import BusError
from broker_config.settings import BrokerSettings
from coordinator.credentials import password_file_of
from scripts.flash.errors import HostUnfit

DEFAULT_PORT = BrokerSettings().port
OWN_USER = "flash"
"""At the broker: who asks an agent for its proof."""


def here_of(users: Path | None, address: str) -> Callable[[BrokerSettings], BrokerSettings]:
    """The broker as we reach it, with a user of our own, added when it is wanted. Both raise HostUnfit."""

    def here(there: BrokerSettings) -> BrokerSettings:
        host, port = broker_place(address, "") if address else (there.host, there.port)
        user = password_file = None
        if users is not None:
            try:
                user, password_file = OWN_USER, str(password_file_of(users, OWN_USER))
            except BusError as error:
                raise HostUnfit(f"nobody here could ask the agent anything: {error}") from None
        return BrokerSettings(host=host, port=port, username=user, password_file=password_file)

    return here


def broker_place(address: str, ours: str) -> tuple[str, int]:
    """HOST[:PORT], or our own address as a device sees it. Raises HostUnfit.

    An address of IPv6 stands in brackets if a port follows.
    """
    if not address:
        if ours.startswith("127.") or ":" in ours:  # us alone; or of IPv6, on which few brokers listen
            raise HostUnfit("the broker's address for devices can't be told from here; give it: BROKER=HOST[:PORT]")
        return ours, DEFAULT_PORT
    host, separator, number = address.rpartition(":")
    if not separator or address.endswith("]") or (":" in host and not host.startswith("[")):
        return address.strip("[]"), DEFAULT_PORT
    if not number.isdigit() or not 0 < int(number) < 1 << 16:
        raise HostUnfit(f"{address!r} is no HOST[:PORT]")
    return host.strip("[]"), int(number)
