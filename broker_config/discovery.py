"""Finding the broker of a site on the local network by mDNS, for those who don't want to write an address down.

The broker's side announces `SITE._kvbus._tcp.local.`; an agent whose broker's host is the word `mdns` asks for it at
every connection, so that a laptop with another address tomorrow is found again. A written address needs none of this.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Self

from broker_config.errors import BrokerUnreachable, ConfigurationError

if TYPE_CHECKING:
    from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

MDNS = "mdns"
"""In the place of a host."""
SERVICE = "_kvbus._tcp.local."
FIND_S = 4.0
CONNECT_S = 2.0


class Announcement:
    """Tells a local network where a site's broker is, as long as it is entered.

    addresses: IPv4, those to be reached at; interfaces: addresses of the networks it is told on, all if empty.
    """

    def __init__(self, site: str, port: int, addresses: Sequence[str], *, interfaces: Sequence[str] = ()) -> None:
        self._interfaces = interfaces
        zeroconf = _library()
        self._info: AsyncServiceInfo = zeroconf.asyncio.AsyncServiceInfo(
            SERVICE,
            f"{site}.{SERVICE}",
            port=port,
            addresses=[socket.inet_aton(address) for address in addresses],
            server=f"kvbus-{site}.local.",
        )
        self._zeroconf: AsyncZeroconf | None = None

    async def __aenter__(self) -> Self:
        self._zeroconf = _open(self._interfaces)
        try:
            await (await self._zeroconf.async_register_service(self._info, allow_name_change=False))
        except _library().NonUniqueNameException:
            await self._zeroconf.async_close()
            raise ConfigurationError(f"another broker on this network says that it is {self._info.name}") from None
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._zeroconf is not None:
            await self._zeroconf.async_unregister_all_services()
            await self._zeroconf.async_close()


async def find(site: str, *, timeout_s: float = FIND_S, interfaces: Sequence[str] = ()) -> tuple[str, int]:
    """Address and port of a site's broker. Raises BrokerUnreachable if nobody says to have it."""
    zeroconf = _library()
    searching = _open(interfaces)
    try:
        info = zeroconf.asyncio.AsyncServiceInfo(SERVICE, f"{site}.{SERVICE}")
        found = await info.async_request(searching.zeroconf, timeout_s * 1000)
        addresses = info.parsed_addresses() if found else []
    except (zeroconf.Error, RuntimeError, OSError) as error:
        raise BrokerUnreachable(SERVICE, f"this network can't be asked: {error}") from None
    finally:
        await searching.async_close()
    if not addresses or info.port is None:
        raise BrokerUnreachable(f"{site}.{SERVICE}", "nobody on this network says to have it; give its address instead")
    return await _reached(addresses, info.port), info.port


async def _reached(addresses: Sequence[str], port: int) -> str:
    """The one that lets us connect, since a broker's machine may be on networks that we are not on; else the first."""
    for address in addresses if len(addresses) > 1 else ():
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                _, writer = await asyncio.open_connection(address, port)
            writer.close()
            return address
    return addresses[0]


def own_addresses() -> list[str]:
    """IPv4 addresses of this machine that others may reach."""
    import psutil  # noqa: PLC0415  only who announces needs it

    found = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith(("127.", "169.254."))
    ]
    return sorted(found)


def _library() -> ModuleType:
    try:
        import zeroconf.asyncio  # noqa: PLC0415  a device may be without it
    except ImportError:
        raise ConfigurationError(f'broker.host = "{MDNS}" needs the package zeroconf, which is not installed') from None
    return zeroconf


def _open(interfaces: Sequence[str]) -> AsyncZeroconf:
    from zeroconf import InterfaceChoice, IPVersion  # noqa: PLC0415
    from zeroconf.asyncio import AsyncZeroconf  # noqa: PLC0415

    try:
        return AsyncZeroconf(interfaces=list(interfaces) or InterfaceChoice.All, ip_version=IPVersion.V4Only)
    except OSError as error:
        raise BrokerUnreachable(SERVICE, f"this network can't be asked: {error.strerror or error}") from None
