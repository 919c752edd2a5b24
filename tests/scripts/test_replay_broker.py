"""The bus in virtual time: what probes measure on it, and what an outage does to them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from broker_config import topics
from broker_config.errors import PublishTimeout
from broker_config.messages import Probe
from edge_agent.link_quality import LinkMeter
from scripts.replay.clock import run_virtual
from scripts.replay.network import Network
from scripts.replay.virtual.broker import PUBLISH_TIMEOUT_S, Access, ProbeBus
from scripts.traces import Sample, Trace

MBIT = 1e6
DELAY_S = 0.02


def play(story: Callable[[], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        return await story()

    return run_virtual(run(), limit_s=1e6)


def probes(up: Trace | float, down: Trace | float) -> ProbeBus:
    network = Network({"up": up, "down": down})
    return ProbeBus(Access(network=network, up=("up",), down=("down",), delay_s=lambda: DELAY_S), "site")


def outage(from_s: int, until_s: int) -> Trace:
    rates = [0.0 if from_s <= at < until_s else 8 * MBIT for at in range(until_s + 100)]
    return Trace(tuple(Sample(float(at), rate) for at, rate in enumerate(rates)), 1.0, False)


def test_probes_measure_each_way_of_a_link() -> None:
    async def story() -> None:
        meter = LinkMeter(bulk=probes(8 * MBIT, 2 * MBIT), agent="pi-1", clock=asyncio.get_running_loop().time)
        await meter._bulk.subscribe(topics.PROBES, meter._back, agent="pi-1")
        await meter.probe()
        quality = meter.quality
        assert quality.uplink_bps == pytest.approx(8 * MBIT, rel=0.1)
        assert quality.downlink_bps == pytest.approx(2 * MBIT, rel=0.1)
        assert quality.round_trip_s == pytest.approx(2 * DELAY_S, abs=0.002)

    play(story)


def test_a_probe_in_an_outage_is_given_up_when_an_agent_would_give_it_up() -> None:
    async def story() -> None:
        bus, loop = probes(outage(1, 60), 8 * MBIT), asyncio.get_running_loop()
        await asyncio.sleep(2)
        with pytest.raises(PublishTimeout, match="within 8 s"):
            await bus.publish(topics.PROBE_SINK, Probe(sequence=1, padding=bytes(8_192)), agent="pi-1")
        assert loop.time() == pytest.approx(2 + PUBLISH_TIMEOUT_S)

    play(story)


def test_soon_after_an_outage_the_link_is_measured_as_it_was_before() -> None:
    async def story() -> None:
        link = outage(5, 65)
        meter = LinkMeter(bulk=probes(link, link), agent="pi-1", clock=asyncio.get_running_loop().time)
        measuring = asyncio.create_task(meter.run(3.0))
        await asyncio.sleep(90)
        assert meter.quality.uplink_bps == pytest.approx(8 * MBIT, rel=0.05)
        measuring.cancel()

    play(story)
