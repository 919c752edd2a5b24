"""A broker is found by its site's name, and found again where it went."""

from __future__ import annotations

import asyncio
import sys

import pytest
from zeroconf import NonUniqueNameException, NotRunningException
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from broker_config import discovery, topics
from broker_config.broker import EmbeddedBroker
from broker_config.bus import MqttBus
from broker_config.discovery import MDNS, Announcement, find, own_addresses
from broker_config.errors import BrokerUnreachable, ConfigurationError
from broker_config.messages import Probe
from broker_config.settings import BrokerSettings
from scripts.demo.processes import free_port

HERE = "127.0.0.1"


async def test_a_site_is_found_by_its_name_and_no_other() -> None:
    async with Announcement("attic", 4711, [HERE], interfaces=[HERE]):
        assert await find("attic", interfaces=[HERE]) == (HERE, 4711)
        with pytest.raises(BrokerUnreachable, match="nobody on this network"):
            await find("cellar", timeout_s=0.5, interfaces=[HERE])
    with pytest.raises(BrokerUnreachable):
        await find("attic", timeout_s=0.5, interfaces=[HERE])


async def test_of_several_addresses_one_that_can_be_reached_is_taken() -> None:
    """192.0.2.1 is nobody's."""
    places = ["127.0.0.1", "127.0.0.2"]
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.2", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        for addresses in (places, places[::-1]):
            async with Announcement("attic", port, addresses, interfaces=[HERE]):
                assert await find("attic", interfaces=[HERE]) == ("127.0.0.2", port)


async def test_a_site_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def taken(*_: object, **__: object) -> None:
        raise NonUniqueNameException

    monkeypatch.setattr(AsyncZeroconf, "async_register_service", taken)
    with pytest.raises(ConfigurationError, match=r"another broker on this network says that it is attic\._kvbus"):
        async with Announcement("attic", 4712, [HERE], interfaces=[HERE]):
            pass


async def test_a_network_that_can_not_be_asked_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> bool:
        raise NotRunningException

    monkeypatch.setattr(AsyncServiceInfo, "async_request", broken)
    with pytest.raises(BrokerUnreachable, match="can't be asked"):
        await find("attic", interfaces=[HERE])


async def test_a_bus_connects_to_what_it_finds_and_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [(HERE, free_port()), (HERE, free_port())]
    asked: list[str] = []

    async def found(site: str) -> tuple[str, int]:
        asked.append(site)
        return places[0]

    monkeypatch.setattr(discovery, "find", found)
    settings = BrokerSettings(host=MDNS, backoff_first_s=0.05, backoff_cap_s=0.1)
    heard: asyncio.Queue[Probe] = asyncio.Queue()
    async with MqttBus(settings=settings, site="attic", client_id="a") as bus:
        await bus.subscribe(topics.PROBES, lambda probe, _: heard.put_nowait(probe), agent="x")
        for _ in range(2):
            async with EmbeddedBroker(*places[0]):
                await bus.connected(10)
                await bus.publish(topics.PROBES, Probe(sequence=1), agent="x")
                await asyncio.wait_for(heard.get(), 10)
            places.reverse()
            async with asyncio.timeout(10):
                while bus.state.value == "connected":  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
    assert set(asked) == {"attic"}


async def test_a_broker_that_is_not_announced_is_said_so_and_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(site: str) -> tuple[str, int]:
        raise BrokerUnreachable(site, "nobody on this network says to have it")

    monkeypatch.setattr(discovery, "find", nothing)
    async with MqttBus(settings=BrokerSettings(host=MDNS), site="attic", client_id="a") as bus:
        with pytest.raises(BrokerUnreachable, match="nobody on this network"):
            await bus.connected(0.5)


async def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeroconf", None)
    with pytest.raises(ConfigurationError, match="needs the package zeroconf"):
        await find("attic")


def test_own_addresses_are_such_as_others_reach() -> None:
    assert all(not address.startswith("127.") for address in own_addresses())
