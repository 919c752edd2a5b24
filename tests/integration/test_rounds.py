"""Questions to real agents over a real broker end as they should."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from broker_config.messages import Ended, Piece, Planned, RoundEvent
from coordinator.client import Client
from coordinator.errors import RequestRefused
from tests.integration.conftest import SITE, Site, text

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

QUESTION = "Which valve?"


async def three_agents(site: Site) -> None:
    await site.start_agent("pi-1", texts={"north": text(1)})
    await site.start_agent("pi-2", texts={"south": text(2)})
    await site.start_agent("jetson-1")
    await site.until_ready()


async def test_every_medium_gives_the_same_lossless_answer_and_events_come_in_order(site: Site) -> None:
    await three_agents(site)
    answers = {}
    for policy in ("token", "kv", "jmsra"):
        events: list[RoundEvent] = []
        report = await site.client.ask(
            QUESTION,
            sources=["pi-1", "pi-2"],
            receiver="jetson-1",
            policy=policy,
            quality_floor=0.0,
            on_event=events.append,
        )
        assert report.state == "answered", report.reason
        assert report.fallbacks == 0
        answers[policy] = report.answer
        assert isinstance(events[0], Planned)
        assert isinstance(events[-1], Ended)
        pieces = [event.text for event in events[1:-1] if isinstance(event, Piece)]
        assert "".join(pieces).strip() == report.answer
        for link in report.links:
            assert link.measured is not None
            assert link.payload_bytes is not None
            if policy == "kv":
                assert (link.medium, link.rung) == ("cache", "float32")
                assert link.payload_bytes > 2 * link.fp16_bytes
            if policy == "token":
                assert link.medium == "tokens"
                assert link.payload_bytes < 2_000
        assert report.e2e_s is not None
        assert report.total_s is not None
        assert 0 < report.e2e_s <= report.total_s
    assert answers["token"]
    assert len(set(answers.values())) == 1


async def test_the_papers_recipe_is_sent_when_asked_for_with_facts_beside_it(site: Site) -> None:
    await three_agents(site)
    bytes_sent = {}
    for facts_tokens in (0, 32):
        report = await site.client.ask(
            QUESTION,
            sources=["pi-1", "pi-2"],
            receiver="jetson-1",
            policy="kv",
            rung="qkvcomm-6",
            facts_tokens=facts_tokens,
        )
        assert report.state == "answered", report.reason
        assert report.fallbacks == 0
        for link in report.links:
            assert (link.medium, link.rung) == ("cache", "qkvcomm-6")
            assert link.payload_bytes is not None
            assert link.payload_bytes < 0.5 * link.fp16_bytes
        bytes_sent[facts_tokens] = sum(link.payload_bytes or 0 for link in report.links)
    assert bytes_sent[0] < bytes_sent[32] < bytes_sent[0] + 2_000
    with pytest.raises(RequestRefused, match="ladder has no rung q5"):
        await site.client.ask(QUESTION, sources=["pi-1"], receiver="jetson-1", rung="q5")


async def test_contexts_are_given_listed_and_removed(amqtt_site: Site) -> None:
    site = amqtt_site
    await site.start_agent("pi-1", texts={"north": text(1)})
    await site.until_ready()
    held = await site.client.give("pi-1", "extra", text(5))
    assert [context.name for context in held] == ["extra", "north"]
    assert [context.name for context in await site.client.contexts("pi-1")] == ["extra", "north"]
    assert (site.folder / "pi-1-contexts" / "extra.txt").read_text() == text(5)
    with pytest.raises(RequestRefused, match="pi-1 holds 2 contexts"):
        await site.client.ask(QUESTION, sources=["pi-1"], receiver="pi-1")
    assert [context.name for context in await site.client.remove("pi-1", "north")] == ["extra"]
    assert not (site.folder / "pi-1-contexts" / "north.txt").exists()
    with pytest.raises(RequestRefused, match="no context named north"):
        await site.client.remove("pi-1", "north")
    with pytest.raises(RequestRefused, match="the context is empty"):
        await site.client.give("pi-1", "blank", "   ")
    with pytest.raises(RequestRefused, match="do not fit the model's window of 1024"):
        await site.client.give("pi-1", "long", text(3, words=900))
    local = await site.client.ask(QUESTION, sources=["pi-1"], receiver="pi-1")
    assert local.state == "answered"
    assert local.links[0].payload_bytes == 0


async def test_what_cannot_be_asked_is_refused_with_one_line(amqtt_site: Site) -> None:
    site = amqtt_site
    await site.start_agent("pi-1", texts={"north": text(1)})
    await site.start_agent("jetson-1")
    await site.until_ready()
    cases: dict[str, dict[str, Any]] = {
        "no agent is called pi-9": {"sources": ["pi-9"]},
        "no agent is called nobody": {"receiver": "nobody"},
        "no context called south": {"sources": ["pi-1:south"]},
        "no policy is called best": {"policy": "best"},
        "names a source twice": {"sources": ["pi-1", "pi-1"]},
        "the question is empty": {"question": "   "},
        "jetson-1 holds no context": {"sources": ["jetson-1"]},
    }
    for line, change in cases.items():
        arguments: dict[str, Any] = {"question": QUESTION, "sources": ["pi-1"], "receiver": "jetson-1", **change}
        with pytest.raises(RequestRefused, match=line) as caught:
            await site.client.ask(**arguments)
        assert "\n" not in str(caught.value)
    site.programs.running["pi-1"].terminate()
    await site.until("pi-1", lambda state: state.presence is not None and state.presence.state == "offline")
    with pytest.raises(RequestRefused, match="pi-1 is offline"):
        await site.client.ask(QUESTION, sources=["pi-1"], receiver="jetson-1")


async def test_questions_of_several_clients_at_once_are_all_answered(amqtt_site: Site) -> None:
    site = amqtt_site
    await three_agents(site)
    async with Client(broker=site.settings, site=SITE) as other:
        reports = await asyncio.gather(
            *(
                client.ask(f"{QUESTION} {policy}", sources=["pi-1", "pi-2"], receiver="jetson-1", policy=policy)
                for client in (site.client, other)
                for policy in ("kv", "token", "jmsra")
            )
        )
    assert [report.state for report in reports] == ["answered"] * 6


async def test_another_models_agent_is_refused(amqtt_site: Site, other_tiny_bundle: Path) -> None:
    site = amqtt_site
    await site.start_agent("pi-1", texts={"north": text(1)}, bundle=other_tiny_bundle)
    await site.start_agent("jetson-1")
    await site.until_ready()
    with pytest.raises(RequestRefused, match="different models"):
        await site.client.ask(QUESTION, sources=["pi-1"], receiver="jetson-1")


async def test_memory_pressure_tightens_the_rung(amqtt_site: Site) -> None:
    site = amqtt_site
    await site.start_agent("pi-1", texts={"north": text(1)}, budget_mb=0.9)
    await site.start_agent("jetson-1")
    await site.until_ready()
    rungs = []
    for number, pressure in enumerate((0.0, 0.70)):
        while True:
            state = await site.until("pi-1", lambda state: state.telemetry is not None)
            assert state.telemetry is not None
            if state.telemetry.memory.pressure >= pressure:
                break
            await site.client.give(
                "pi-1", f"page-{len(state.telemetry.contexts)}", text(10 + len(state.telemetry.contexts), 20)
            )
            await site.until_ready()
        report = await site.client.ask(
            QUESTION, sources=["pi-1:north"], receiver="jetson-1", policy="kv", deadline_s=60, quality_floor=1e6
        )
        assert report.state == "answered", (number, report.reason)
        rungs.append(report.links[0].rung)
    assert rungs[0] == "float32"
    assert rungs[1].startswith("klt")
