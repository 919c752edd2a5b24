"""Processes are killed and links cut in the middle: every question still ends, once, and says how."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from broker_config.messages import Planned, RoundEvent, RoundReport
from scripts.link import Bucket, EmulatedLink
from tests.integration.conftest import Site, on_either_broker_when_there_is_time, text, until_true

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

QUESTION = "Which valve?"
SLOW_BPS = 400_000.0
"""A lossless cache of the long text then takes about ten seconds."""
UNDER_WAY_BYTES = 60_000


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
async def cache_on_its_way(site: Site, *, given: bool = False) -> AsyncIterator[tuple[Asking, EmulatedLink]]:
    """pi-1 is sending jetson-1 a lossless cache over a slow link, and has begun when the block is entered.

    given: the text went through the coordinator, which keeps a copy, and not into pi-1's folder.
    """
    north = text(1, words=160)
    async with EmulatedLink(
        broker_host="127.0.0.1", broker_port=site.port, uplink=Bucket(SLOW_BPS), downlink=Bucket(SLOW_BPS)
    ) as link:
        await site.start_agent("pi-1", texts=None if given else {"north": north}, port=link.port)
        await site.start_agent("jetson-1")
        await site.until_ready()
        if given:
            await site.client.give("pi-1", "north", north)
            await site.until_ready()
        asking = Asking(site, sources=["pi-1"], receiver="jetson-1", policy="kv", quality_floor=0.0)
        await asking.planned.wait()
        start = link.uplink_bytes
        await until_true(lambda: link.uplink_bytes >= start + UNDER_WAY_BYTES)
        yield asking, link


async def answer_as_text(site: Site) -> RoundReport:
    """The same question by the token medium."""
    return await site.client.ask(QUESTION, sources=["pi-1"], receiver="jetson-1", policy="token")


async def test_a_cache_whose_sender_dies_is_computed_from_the_ids_that_came_before_it(amqtt_site: Site) -> None:
    site = amqtt_site
    async with cache_on_its_way(site, given=True) as (asking, _):
        await site.kill("pi-1")
        report = await asking.task
        await site.start_agent("pi-1", texts={"north": text(1, words=160)})
        await site.until_ready()
        expected = await answer_as_text(site)
    assert report.state == "answered", report.reason
    assert report.fallbacks == 1
    assert report.links[0].fallback == "ids"
    assert report.links[0].computed_tokens == report.links[0].tokens
    assert report.answer == expected.answer


async def test_a_link_that_is_cut_for_a_moment_loses_nothing(amqtt_site: Site) -> None:
    async with cache_on_its_way(amqtt_site) as (asking, link):
        await link.cut()
        await link.restore()
        report = await asking.task
    assert report.state == "answered", report.reason
    assert report.fallbacks == 0
    assert report.links[0].payload_bytes is not None


async def test_a_receiver_that_dies_ends_the_question_with_its_name(amqtt_site: Site) -> None:
    async with cache_on_its_way(amqtt_site) as (asking, _):
        await amqtt_site.kill("jetson-1")
        report = await asking.task
    assert report.state == "failed"
    assert "jetson-1 went offline" in report.reason


@on_either_broker_when_there_is_time
async def test_a_coordinator_that_is_killed_and_restarted_ends_what_it_had_taken(site: Site) -> None:
    async with cache_on_its_way(site) as (asking, _):
        await site.kill("coordinator")
        await site.start_coordinator()
        report = await asking.task
        assert report.state == "failed"
        assert "restarted while this question was in flight" in report.reason
        again = await answer_as_text(site)
    assert again.state == "answered", again.reason


async def test_a_withdrawn_question_is_cancelled_everywhere(amqtt_site: Site) -> None:
    async with cache_on_its_way(amqtt_site) as (asking, _):
        asking.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking.task
        await until_true(lambda: "cancelled" in (amqtt_site.folder / "pi-1.log").read_text())
        after = await answer_as_text(amqtt_site)
    assert after.state == "answered"


@on_either_broker_when_there_is_time
async def test_a_question_survives_its_broker_or_ends_with_a_reason(site: Site) -> None:
    async with cache_on_its_way(site) as (asking, _):
        await site.kill("broker")
        await site.start_broker()
        async with asyncio.timeout(60):
            report = await asking.task
        assert report.state == "answered" or report.reason
        await site.until_ready()
        again = await answer_as_text(site)
    assert again.state == "answered"


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
