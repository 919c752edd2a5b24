"""Routes, request and reply, backoff: the parts of the bus that need no broker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from broker_config.bus import Bus, MqttBus, Route, Routes, request
from broker_config.bus.session import backoff_s
from broker_config.errors import BrokerUnreachable, MessageRejected, RequestTimeout
from broker_config.messages import AddContext, ContextReply, ListContexts, Order, Presence, Probe, new_id
from broker_config.settings import BrokerSettings
from broker_config.topics import ORDERS, PRESENCE, PROBES, REPLIES
from broker_config.wire import pack
from scripts.replay.clock import run_virtual
from tests.memory_bus import MemoryBroker

INSTANCE = "0123456789abcdef"


def _presence(agent: str) -> Presence:
    return Presence(agent=agent, instance=INSTANCE, state="online")


def test_both_buses_are_a_bus() -> None:
    async def run() -> None:
        mqtt: Bus = MqttBus(settings=BrokerSettings(), site="home", client_id="pi-1")
        memory: Bus = MemoryBroker().bus("home")
        assert mqtt.site == memory.site == "home"

    run_virtual(run())


def test_a_handler_gets_the_parameters_without_the_site_and_only_its_own_messages() -> None:
    got: list[tuple[Any, Mapping[str, str]]] = []
    routes = Routes()
    routes.add(Route(PRESENCE, {"site": "home", "agent": "pi-1"}, lambda *each: got.append(each)))
    for site, agent in (("home", "pi-1"), ("home", "pi-2"), ("away", "pi-1")):
        routes.dispatch(PRESENCE.at(site=site, agent=agent), pack(_presence(agent)))
    assert got == [(_presence("pi-1"), {"agent": "pi-1"})]


def test_a_bad_message_and_a_failing_handler_are_logged_and_nobody_else_notices(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    got: list[object] = []
    routes = Routes()
    routes.add(Route(PROBES, {}, fails))
    routes.add(Route(PROBES, {}, lambda message, _: got.append(message)))
    address = PROBES.at(site="home", agent="pi-1")
    with caplog.at_level(logging.WARNING):
        routes.dispatch(address, b"nonsense")
        routes.dispatch(address, pack(Probe(sequence=1)))
    assert got == [Probe(sequence=1)]
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    assert caplog.records[0].getMessage().startswith(f"dropped a message from {address}: ")


def test_a_filter_is_left_when_its_last_route_goes() -> None:
    routes = Routes()
    one, two = (Route(PROBES, {"site": "home"}, lambda *_: None) for _ in range(2))
    routes.add(one)
    routes.add(two)
    assert routes.filters() == {"kvbus/home/probes/+": 1}
    assert not routes.remove(one)
    assert routes.remove(two)
    assert not routes.remove(two)
    assert routes.filters() == {}


def test_a_request_finds_its_own_reply() -> None:
    async def run() -> None:
        broker = MemoryBroker()
        asker, agent = broker.bus(), broker.bus()
        answering: set[asyncio.Task[None]] = set()

        def answer(order: Order, _: Mapping[str, str]) -> None:
            assert isinstance(order, ListContexts | AddContext)
            for correlation in (new_id(), order.correlation):
                reply = ContextReply(correlation=correlation, agent="pi-1")
                answering.add(asyncio.create_task(agent.publish(REPLIES, reply, client=order.client)))

        await agent.subscribe(ORDERS, answer, agent="pi-1")
        correlation = new_id()
        reply = await request(
            asker,
            ORDERS,
            ListContexts(correlation=correlation, client="laptop"),
            REPLIES,
            correlation=correlation,
            to={"agent": "pi-1"},
            reply_to={"client": "laptop"},
            timeout_s=1,
        )
        assert reply.correlation == correlation
        assert not list(asker.routes)

    run_virtual(run())


def test_a_request_without_a_reply_times_out_and_names_the_topic() -> None:
    async def run() -> None:
        bus = MemoryBroker().bus()
        with pytest.raises(RequestTimeout, match="no answer to a request on kvbus/home/agents/pi-1/orders within 2 s"):
            await request(
                bus,
                ORDERS,
                ListContexts(correlation=INSTANCE, client="laptop"),
                REPLIES,
                correlation=INSTANCE,
                to={"agent": "pi-1"},
                reply_to={"client": "laptop"},
                timeout_s=2,
            )
        assert not list(bus.routes)

    run_virtual(run())


@pytest.mark.parametrize("failures", [1, 2, 5, 10, 1_000_000])
def test_the_backoff_doubles_up_to_its_cap_with_jitter(failures: int) -> None:
    settings = BrokerSettings(backoff_first_s=0.25, backoff_cap_s=10)
    longest_s = min(10, 0.25 * 2.0 ** min(failures - 1, 20))
    waits = {backoff_s(settings, failures) for _ in range(50)}
    assert len(waits) > 1
    assert all(longest_s / 2 <= wait <= longest_s for wait in waits)


async def test_a_bus_that_is_not_started_says_so_at_once() -> None:
    bus = MqttBus(settings=BrokerSettings(), site="home", client_id="pi-1")
    with pytest.raises(BrokerUnreachable, match=r"no MQTT broker at 127\.0\.0\.1:1883: not started"):
        await bus.publish(PRESENCE, _presence("pi-1"), agent="pi-1")


async def test_a_message_that_is_too_long_is_refused_before_it_is_sent() -> None:
    bus = MqttBus(settings=BrokerSettings(), site="home", client_id="pi-1")
    with pytest.raises(MessageRejected, match="are allowed"):
        await bus.publish(replace(PROBES, max_bytes=100), Probe(sequence=1, padding=bytes(101)), agent="pi-1")
