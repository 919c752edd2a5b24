"""An agent whose memory fills says at which rungs it keeps its caches, uses them so, and finds them again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker_config.messages import AnswerOutcome
from edge_agent.errors import SpillFailed
from edge_agent.memory import Budget
from edge_agent.memory.budget import System
from edge_agent.settings import AgentSettings, MemorySettings
from tests.edge_agent.agents import NORTH, SOUTH, MemoryAgent, Site, answer_order, part_of, running_site
from tests.memory_bus import MemoryBroker

AGENT = "pi-1"


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with running_site() as started:
        yield started


async def asked(site: Site, rung: str) -> AnswerOutcome:
    """A question of the agent's own context, kept no worse than the rung."""
    held = site.agents[AGENT].store.by_name("text-0")
    assert held is not None
    outcome = await site.answer(AGENT, answer_order(part_of(held, AGENT, rung=rung)))
    assert outcome.state == "answered", outcome.reason
    return outcome


async def test_its_own_context_is_used_as_it_is_kept_unless_better_is_asked(site: Site, tiny_bundle: Path) -> None:
    held = (await site.start(AGENT, tiny_bundle, NORTH))[0]
    exact = await asked(site, "float32")
    assert exact.parts[0].prefill_s == 0
    store = site.agents[AGENT].store
    store._budget = Budget(limit_bytes=int(0.2 * store.cache_bytes))
    await store.relieve()
    rung = store.rung(held.context_id)
    assert rung == store.shelf.rungs[-1]
    kept = await asked(site, rung)
    assert (kept.parts[0].prefill_s, kept.parts[0].decode_s > 0) == (0, True)
    better = await asked(site, "float32")
    assert better.parts[0].prefill_s > 0
    assert better.answer == exact.answer


async def test_caches_tighten_by_themselves_as_memory_fills_and_telemetry_says_so(
    site: Site, tiny_bundle: Path
) -> None:
    held = (await site.start(AGENT, tiny_bundle, NORTH))[0]
    store = site.agents[AGENT].store
    assert store.infos()[0].rung == "float32"
    left = store.cache_bytes  # somebody else took all the rest
    store._budget = Budget(limit_bytes=1 << 40, share=0.5, system=lambda: System(left - store.cache_bytes))
    await site.until(lambda: store.rung(held.context_id) != "float32")
    info = store.infos()[0]
    assert info.rung == store.shelf.rungs[1]
    assert info.ready == store.shelf.ready(info.rung)
    assert 0 < info.cache_bytes == store.cache_bytes


async def test_what_memory_has_no_room_for_is_on_disk_and_there_after_a_restart(
    site: Site, tiny_bundle: Path, tmp_path: Path
) -> None:
    await site.start(AGENT, tiny_bundle, NORTH, SOUTH)
    whole_mb = site.agents[AGENT].store.cache_bytes / 1e6
    await site.stop()
    small_mb = 0.08 * whole_mb  # one tightened cache and a half
    await site.start(AGENT, tiny_bundle, NORTH, SOUTH, budget_mb=small_mb, spill=tmp_path)
    infos = site.agents[AGENT].store.infos()
    tightest = site.agents[AGENT].store.shelf.rungs[-1]
    assert [info.cached for info in infos] == [True, True]
    away = [info for info in infos if not info.cache_bytes]
    assert [info.rung for info in away] == [tightest]
    assert away[0].ready is not None
    assert tightest in away[0].ready
    await site.stop()
    await site.start(AGENT, tiny_bundle, NORTH, SOUTH, budget_mb=small_mb, spill=tmp_path)
    again = site.agents[AGENT].store
    assert again.rung(away[0].context_id) == tightest
    outcome = await site.answer(AGENT, answer_order(part_of(again.get(away[0].context_id), AGENT, rung=tightest)))
    assert outcome.state == "answered", outcome.reason
    assert outcome.parts[0].prefill_s == 0


async def test_a_spill_folder_that_cannot_be_used_ends_the_start_with_one_line(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    memory = MemorySettings(spill_folder=str(tmp_path / "file"))
    agent = MemoryAgent(AgentSettings(agent=AGENT, bundle=str(tiny_bundle), memory=memory), MemoryBroker())
    with pytest.raises(SpillFailed, match="can't be used for caches"):
        await agent.run()
