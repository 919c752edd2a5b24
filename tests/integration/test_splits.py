"""Real agents over a real broker and a slow link share a context, as the test orders it: no policy plans this yet."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from broker_config import topics
from broker_config.bus import MqttBus
from broker_config.messages import AnswerOrder, AnswerOutcome, Outcome, PaceOrder, Part, SendOrder, SendOutcome, new_id
from scripts.link import Bucket, EmulatedLink
from tests.integration.conftest import SITE, Site, on_either_broker_when_there_is_time, text

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

QUESTION = "Which valve?"
LINK_BPS = 400_000.0
"""A lossless cache of the long text takes about ten seconds."""


class Orders:
    """What the coordinator would order, and what it would hear."""

    def __init__(self, bus: MqttBus, context_id: str, tokens: int) -> None:
        self._bus, self._context_id, self._tokens = bus, context_id, tokens
        self._said: list[Outcome] = []
        self._news = asyncio.Event()

    def hear(self, outcome: Outcome, _: Mapping[str, str]) -> None:
        self._said.append(outcome)
        self._news.set()

    async def ask(
        self, own_tokens: int, *, meet: bool, rate_bps: float | None = None, pace_bps: float | None = None
    ) -> tuple[AnswerOutcome, SendOutcome]:
        """One question; pace_bps: the rate that the transfer gets once it runs."""
        request, transfer = new_id(), new_id()
        part = Part(
            transfer=transfer,
            sender="pi-1",
            context_id=self._context_id,
            tokens=self._tokens,
            own_tokens=own_tokens,
            meet=meet,
            rung="float32",
        )
        receiving = AnswerOrder(
            request=request, asker="test", question=QUESTION, parts=(part,), part_timeout_s=60, expires_s=90
        )
        sending = SendOrder(
            request=request,
            transfer=transfer,
            context_id=self._context_id,
            receiver="jetson-1",
            own_tokens=own_tokens,
            meet=meet,
            rung="float32",
            expires_s=90,
            chunk_bytes=16_384,
            rate_bps=rate_bps,
        )
        await self._bus.publish(topics.ORDERS, receiving, agent="jetson-1")
        await self._bus.publish(topics.ORDERS, sending, agent="pi-1")
        if pace_bps is not None:
            await asyncio.sleep(0.5)
            pace = PaceOrder(request=request, transfer=transfer, rate_bps=pace_bps)
            await self._bus.publish(topics.ORDERS, pace, agent="pi-1")
        while True:
            answers = [each for each in self._said if isinstance(each, AnswerOutcome) and each.request == request]
            sends = [each for each in self._said if isinstance(each, SendOutcome) and each.request == request]
            if answers and sends:
                return answers[0], sends[0]
            self._news.clear()
            await self._news.wait()


@on_either_broker_when_there_is_time
async def test_both_ends_meet_wherever_it_was_planned_with_the_answer_of_plain_text(site: Site) -> None:
    async with EmulatedLink(
        broker_host="127.0.0.1", broker_port=site.port, uplink=Bucket(LINK_BPS), downlink=Bucket(LINK_BPS)
    ) as link:
        await site.start_agent("pi-1", texts={"north": text(1, words=160)}, port=link.port)
        await site.start_agent("jetson-1")
        await site.until_ready()
        state = await site.state("pi-1")
        assert state is not None
        assert state.telemetry is not None
        (context,) = state.telemetry.contexts
        async with MqttBus(settings=site.settings, site=SITE, client_id="test-orders") as bus:
            orders = Orders(bus, context.context_id, context.tokens)
            await bus.subscribe(topics.OUTCOMES, orders.hear)
            expected, _ = await orders.ask(context.tokens, meet=False)
            assert expected.state == "answered", expected.reason
            for planned in (0, context.tokens // 4, context.tokens - 1):
                answer, sent = await orders.ask(planned, meet=True)
                assert (answer.state, answer.answer) == ("answered", expected.answer), answer.reason
                (part,) = answer.parts
                assert (part.state, part.fallback, sent.state) == ("delivered", "", "delivered")
                # this receiver computes everything in the time in which the link brings a slice
                assert part.own_tokens > context.tokens / 2
                assert sent.payload_bytes < 768 * context.tokens / 2
                assert answer.first_token_s < 5
            paced, sent = await orders.ask(0, meet=False, rate_bps=8_000.0, pace_bps=1e7)
            assert (paced.state, paced.answer) == ("answered", expected.answer), paced.reason
            assert paced.parts[0].own_tokens == 0
            assert sent.transfer_s < 40  # minutes at the rate it began with
