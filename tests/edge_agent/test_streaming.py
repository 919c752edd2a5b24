"""A cache that is still being computed: its slices leave as they are done, the right ones first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent.engine import Engine
from edge_agent.errors import CacheInvalid, ModelFailed
from edge_agent.kv.cache import Cache, concatenate
from edge_agent.kv.header import Header
from edge_agent.kv.recipe import Layout, recipe
from edge_agent.model.exchange import payload_header
from edge_agent.model.session import LiveContext
from edge_agent.streaming import Stream
from tests import tiny
from tests.edge_agent.agents import queued
from tests.edge_agent.caches import equal
from tests.edge_agent.sessions import started_engine

CHUNK, SLICE = 16, 8
IDS = [1 + at * 5 % (tiny.VOCABULARY - 1) for at in range(70)]


@pytest.fixture
async def engine(tiny_bundle: Path) -> AsyncIterator[Engine]:
    """A started engine that prefills sixteen tokens a turn."""
    async with started_engine(tiny_bundle, chunk=CHUNK) as made:
        yield made


def header(engine: Engine, own: int = 0, slice_tokens: int = SLICE) -> Header:
    return payload_header(
        engine.model.manifest,
        "0" * 32,
        IDS,
        own_tokens=own,
        rung=recipe("float32"),
        layout=Layout(tuple(range(tiny.LAYERS))),
        slice_tokens=slice_tokens,
    )


async def all_of(stream: Stream) -> list[tuple[int, Cache]]:
    found = []
    while (ready := await stream.next()) is not None:
        found.append(ready)
    return found


@pytest.mark.parametrize(("own", "last_first"), [(0, False), (0, True), (20, True), (24, True), (70, True)])
@pytest.mark.parametrize("slice_tokens", [3, SLICE, 16, 64, 100])
async def test_the_slices_are_those_of_the_whole_cache(
    engine: Engine, own: int, slice_tokens: int, *, last_first: bool
) -> None:
    whole, _ = await engine.prefill_context(IDS, "somebody", mass=True)
    stream = Stream(engine, IDS, "me", header(engine, 0, slice_tokens), own_tokens=own, last_first=last_first)
    found = sorted(await all_of(stream), key=lambda each: each[0])
    assert [start for start, _ in found] == list(range(0, len(IDS), slice_tokens))
    assert equal(concatenate([part for _, part in found]), whole)
    kept = await stream.finish()
    assert kept is not None
    assert equal(kept, whole)
    assert all(layer.mass is not None for layer in kept.layers)
    assert stream.prefill_s > 0
    await stream.close()


async def test_without_meeting_they_rise_from_the_own_tokens_on(engine: Engine) -> None:
    whole, _ = await engine.prefill_context(IDS, "somebody")
    stream = Stream(engine, IDS, "me", header(engine, own=13), own_tokens=13, last_first=False)
    found = await all_of(stream)
    assert [start for start, _ in found] == list(range(0, 57, SLICE))
    assert equal(concatenate([part for _, part in found]), whole.between(13, 70))


async def test_the_first_slices_leave_before_the_context_is_computed_and_those_below_own_tokens_last(
    engine: Engine,
) -> None:
    async with engine.turns.turn("holder"):
        stream = Stream(engine, IDS, "me", header(engine), own_tokens=20, last_first=True)
        await queued(engine, 1)
        holder = asyncio.create_task(_hold_after(engine, 2))
        await queued(engine, 2)
    first = [(await stream.next() or (-1,))[0]]
    await asyncio.wait_for(holder, 5)
    await stream.finish()
    rest = [start for start, _ in await all_of(stream)]
    assert first == [24]  # 32 of 70 tokens are computed: the highest whole slice at or above the own tokens
    assert rest == [64, 56, 48, 40, 32, 16, 8, 0]


async def _hold_after(engine: Engine, chunks: int) -> None:
    """Let so many turns pass, then hold the model until the first slice can have left."""
    for _ in range(chunks - 1):
        async with engine.turns.turn("holder"):
            pass
    async with engine.turns.turn("holder"):
        await asyncio.sleep(0.3)


async def test_last_first_means_of_what_is_there(engine: Engine) -> None:
    stream = Stream(engine, IDS, "me", header(engine), own_tokens=0, last_first=True)
    assert await stream.finish() is not None
    assert [start for start, _ in await all_of(stream)] == list(range(0, 70, SLICE))[::-1]


@pytest.mark.parametrize("at", [0, 2, 4])
async def test_a_model_that_fails_ends_the_slices_with_its_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    real, runs = LiveContext.step, []

    def step(live: LiveContext, ids: np.ndarray, **how: bool) -> np.ndarray:
        runs.append(ids)
        if len(runs) > at:
            raise ModelFailed("the model run failed: cosmic ray")
        return real(live, ids, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(LiveContext, "step", step)
    stream = Stream(engine, IDS, "me", header(engine), own_tokens=0, last_first=False)
    with pytest.raises(ModelFailed, match="cosmic ray"):
        await all_of(stream)
    assert await stream.finish() is None
    await stream.close()


async def test_a_cache_with_a_nan_is_not_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(_: Cache) -> None:
        raise CacheInvalid("layer 0: keys hold a NaN or an infinity")

    monkeypatch.setattr(Cache, "check", check)
    stream = Stream(engine, IDS, "me", header(engine), own_tokens=0, last_first=False)
    with pytest.raises(CacheInvalid):
        await all_of(stream)
    assert await stream.finish() is None


async def test_closed_it_computes_no_further_and_the_turn_is_free(engine: Engine) -> None:
    async with engine.turns.turn("holder"):
        stream = Stream(engine, IDS, "me", header(engine), own_tokens=0, last_first=True)
        await queued(engine, 1)
        await stream.close()
        assert engine.turns.waiting <= 1
    cache, _ = await engine.prefill_context(IDS[:3], "heir")
    assert cache.entries == 3
    assert await stream.finish() is None
