"""Processes are killed and links cut in the middle: every question still ends, once, and says how."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from broker_config.messages import Planned, RoundEvent, RoundReport
from scripts.link import Bucket, EmulatedLink
from tests.integration.conftest import Site, text, until_true

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

QUESTION = "Which valve?"
SLOW_BPS = 400_000.0
"""A lossless cache of the long text then takes about ten seconds."""


class Asking:
    """A question in the background, with a moment at which it is known to be under way."""

    def __init__(self, site: Site, **arguments: object) -> None:
        self.planned = asyncio.Event()
        self.task: asyncio.Task[RoundReport] = asyncio.create_task(
            site.client.ask(QUESTION, on_event=self._see, **arguments)  # type: ignore[arg-type]
        )

    def _see(self, event: RoundEvent) -> None:
        if isinstance(event, Planned):
            self.planned.set()


@asynccontextmanager
async def slow_link(site: Site) -> AsyncIterator[EmulatedLink]:
    async with EmulatedLink(
        broker_host="127.0.0.1", broker_port=site.port, uplink=Bucket(SLOW_BPS), downlink=Bucket(SLOW_BPS)
    ) as link:
        yield link


async def bytes_are_flowing(link: EmulatedLink, count: int = 60_000) -> None:
    """Wait until so many more bytes have gone up."""
    start = link.uplink_bytes
    await until_true(lambda: link.uplink_bytes >= start + count)


async def test_a_cache_that_cannot_arrive_is_replaced_by_its_text(amqtt_site: Site) -> None:
    site = amqtt_site
    async with slow_link(site) as link:
        await site.start_agent("pi-1", port=link.port)
        await site.start_agent("jetson-1")
        await site.until_ready()
        await site.client.give("pi-1", "north", text(1, words=160))
        await site.until_ready()
        expected = await site.client.ask(QUESTION, sources=["pi-1"], receiver="jetson-1", policy="token")
        asking = Asking(site, sources=["pi-1"], receiver="jetson-1", policy="kv", quality_floor=0.0)
        await asking.planned.wait()
        await bytes_are_flowing(link)
        await site.kill("pi-1")
        report = await asking.task
    assert report.state == "answered", report.reason
    assert report.fallbacks == 1
    assert report.links[0].fallback == "coordinator"
    assert report.answer == expected.answer


async def test_a_link_that_is_cut_for_a_moment_loses_nothing(amqtt_site: Site) -> None:
    site = amqtt_site
    async with slow_link(site) as link:
        await site.start_agent("pi-1", texts={"north": text(1, words=160)}, port=link.port)
        await site.start_agent("jetson-1")
        await site.until_ready()
        asking = Asking(site, sources=["pi-1"], receiver="jetson-1", policy="kv", quality_floor=0.0)
        await asking.planned.wait()
        await bytes_are_flowing(link)
        await link.cut()
        await link.restore()
        report = await asking.task
    assert report.state == "answered", report.reason
    assert report.fallbacks == 0
    assert report.links[0].payload_bytes is not None


async def test_a_receiver_that_dies_ends_the_question_with_its_name(amqtt_site: Site) -> None:
    site = amqtt_site
    async with slow_link(site) as link:
        await site.start_agent("pi-1", texts={"north": text(1, words=160)}, port=link.port)
        await site.start_agent("jetson-1")
        await site.until_ready()
        asking = Asking(site, sources=["pi-1"], receiver="jetson-1", policy="kv", quality_floor=0.0)
        await asking.planned.wait()
        await bytes_are_flowing(link)
        await site.kill("jetson-1")
        report = await asking.task
    assert report.state == "failed"
    assert "jetson-1 went offline" in report.reason


async def test_a_coordinator_that_is_killed_and_restarted_ends_what_it_had_taken(site: Site) -> None:
    async with slow_link(site) as link:
        await site.start_agent("pi-1", texts={"north": text(1, words=160)}, port=link.port)
        await site.start_agent("jetson-1")
        await site.until_ready()
        asking = Asking(site, sources=["pi-1"], receiver="jetson-1", policy="kv", quality_floor=0.0)
        await asking.planned.wait()
        await bytes_are_flowing(link)
        await site.kill("coordinator")
        await site.start_coordinator()
        report = await asking.task
        assert report.state == "failed"
        assert "restarted while this question was in flight" in report.reason
        again = await site.client.ask(QUESTION, sources=["pi-1"], receiver="jetson-1", policy="token")
    assert again.state == "answered"


async def test_a_withdrawn_question_is_cancelled_everywhere(amqtt_site: Site) -> None:
    site = amqtt_site
    async with slow_link(site) as link:
        await site.start_agent("pi-1", texts={"north": text(1, words=160)}, port=link.port)
        await site.start_agent("jetson-1")
        await site.until_ready()
        asking = Asking(site, sources=["pi-1"], receiver="jetson-1", policy="kv", quality_floor=0.0)
        await asking.planned.wait()
        await bytes_are_flowing(link)
        asking.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking.task
        await until_true(lambda: "cancelled" in (site.folder / "pi-1.log").read_text())
        after = await site.client.ask(QUESTION, sources=["pi-1"], receiver="jetson-1", policy="token")
    assert after.state == "answered"


async def test_a_broker_that_is_killed_and_restarted_is_found_again(site: Site) -> None:
    await site.start_agent("pi-1", texts={"north": text(1)})
    await site.start_agent("jetson-1")
    await site.until_ready()
    await site.kill("broker")
    await site.start_broker()
    await site.until_ready()
    report = await site.client.ask(QUESTION, sources=["pi-1"], receiver="jetson-1", policy="kv")
    assert report.state == "answered", report.reason


async def test_two_agents_with_one_id_are_named(amqtt_site: Site) -> None:
    site = amqtt_site
    await site.start_agent("pi-1", texts={"north": text(1)})
    await site.until_ready()
    await site.start_agent("pi-1", texts={"north": text(1)}, process="impostor")
    logs = [site.folder / "pi-1.log", site.folder / "impostor.log"]
    await until_true(lambda: any("another agent with id pi-1" in log.read_text() for log in logs), timeout_s=60)
