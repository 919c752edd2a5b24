"""Real agents over real brokers and slow links: when one link changes under way, all get other shares."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest

from broker_config import topics
from broker_config.bus import MqttBus
from broker_config.messages import Order, PaceOrder, SendOrder
from coordinator.drift import REVISE_FACTOR
from scripts.link import Bucket, EmulatedLink
from tests.integration.conftest import SITE, Site, on_either_broker_when_there_is_time, text, until_true

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

LINK_BPS = 800e3
"""The receiver's downlink, which two caches of 0.28 MB share for about six seconds."""
CUT_BPS = LINK_BPS / 8
UNDER_WAY_BYTES = 80_000


class Overheard:
    """What a sender is ordered: its share at first, and what that becomes (None: paced no more)."""

    def __init__(self) -> None:
        self.began_bps: float | None = None
        self.paces_bps: list[float | None] = []

    def hear(self, order: Order, _: Mapping[str, str]) -> None:
        match order:
            case SendOrder():
                self.began_bps, self.paces_bps = order.rate_bps, []
            case PaceOrder():
                self.paces_bps.append(order.rate_bps)


@asynccontextmanager
async def slow_links(site: Site) -> AsyncIterator[dict[str, EmulatedLink]]:
    """Two senders and a receiver, each behind a link of its own."""
    async with AsyncExitStack() as stack:
        links = {}
        for number, agent in enumerate(("pi-1", "pi-2", "jetson-1")):
            link = EmulatedLink(
                broker_host="127.0.0.1", broker_port=site.port, uplink=Bucket(LINK_BPS), downlink=Bucket(LINK_BPS)
            )
            links[agent] = await stack.enter_async_context(link)
            texts = None if agent == "jetson-1" else {"page": text(number + 1, words=105)}
            await site.start_agent(agent, texts=texts, port=link.port)
        await site.until_ready()
        yield links


@on_either_broker_when_there_is_time
async def test_a_link_that_is_cut_under_way_leaves_its_share_to_the_other(site: Site) -> None:
    ask = partial(site.client.ask, "Which valve?", sources=["pi-1", "pi-2"], receiver="jetson-1")
    async with slow_links(site) as links, MqttBus(settings=site.settings, site=SITE, client_id="overhears") as bus:
        first, second = Overheard(), Overheard()
        await bus.subscribe(topics.ORDERS, first.hear, agent="pi-1")
        await bus.subscribe(topics.ORDERS, second.hear, agent="pi-2")
        expected = await ask(policy="token")
        assert expected.revisions == 0
        asking = asyncio.create_task(ask(policy="kv", quality_floor=0.0))
        start = links["pi-1"].uplink_bytes
        await until_true(lambda: links["pi-1"].uplink_bytes >= start + UNDER_WAY_BYTES)
        links["pi-1"].set_rate(uplink_bps=CUT_BPS)
        await until_true(lambda: bool(first.paces_bps and second.paces_bps))
        slowed_bps, raised_bps = first.paces_bps[0], second.paces_bps[0]
        links["pi-1"].set_rate(uplink_bps=LINK_BPS)
        report = await asking
    assert (report.state, report.answer) == ("answered", expected.answer), report.reason
    assert report.fallbacks == 0
    assert report.revisions >= 1
    assert all("share revised to" in link.note for link in report.links)
    assert first.began_bps
    assert second.began_bps
    assert slowed_bps
    assert raised_bps
    assert slowed_bps < first.began_bps / REVISE_FACTOR
    assert raised_bps > 1.1 * second.began_bps
    assert slowed_bps + raised_bps < 1.1 * (first.began_bps + second.began_bps)
