"""The engine: a measured speed, fair turns, and answers that end where they should."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.engine import RESERVED_TOKENS, Engine
from edge_agent.errors import ContextEmpty, ContextTooLong
from edge_agent.kv.cache import Float32, Int32
from edge_agent.model.session import LiveContext, Model
from edge_agent.model.text import AnswerText, Text
from tests import tiny
from tests.edge_agent.agents import queued
from tests.edge_agent.caches import equal
from tests.edge_agent.sessions import started_engine

CHUNK = 8
EOS = 0


@pytest.fixture
async def engine(tiny_bundle: Path) -> AsyncIterator[Engine]:
    """A started engine that prefills eight tokens a turn."""
    async with started_engine(tiny_bundle, chunk=CHUNK) as made:
        yield made


def logits_for(token: int) -> Float32:
    """Logits that leave no doubt."""
    row = np.zeros(tiny.VOCABULARY, dtype=np.float32)
    row[token] = 9.0
    return row


async def generated(
    engine: Engine, live: LiveContext, first: Float32, max_new_tokens: int
) -> list[tuple[int, str, AnswerText]]:
    return [each async for each in engine.generate(live, first, max_new_tokens=max_new_tokens)]


def script(monkeypatch: pytest.MonkeyPatch, tokens: Sequence[int]) -> list[int]:
    """Make the model say these tokens, one a step; returns the ids that it was given."""
    given: list[int] = []
    left = iter(tokens)

    def step(live: LiveContext, ids: np.ndarray, *, logits: str | None) -> Float32:
        given.extend(int(token) for token in ids)
        return logits_for(next(left))

    monkeypatch.setattr(LiveContext, "step", step)
    return given


def test_an_engine_that_was_not_started_says_so(tiny_bundle: Path) -> None:
    model = Model(tiny_bundle)
    engine = Engine(model, Text(tiny_bundle, model.manifest))
    with pytest.raises(RuntimeError, match="not been started"):
        engine.after_prefix()
    engine.close()


async def test_the_measured_speed_is_positive_and_fit_to_be_published(engine: Engine) -> None:
    speed = engine.meter.speed
    assert speed is not None
    assert speed.prefill_fixed_s >= 0
    assert min(speed.prefill_tps, speed.decode_tps) > 0
    assert min(speed.encode_elements_per_s, speed.decode_elements_per_s) > 0
    assert speed.prefill_s_per_token2 >= 0
    assert {each.codec for each in speed.codecs} == {"klt", "q", "fp", "float"}
    assert speed.encode_elements_per_s == min(each.encode_elements_per_s for each in speed.codecs)
    assert msgspec.convert(msgspec.to_builtins(speed), type(speed)) == speed


async def test_measuring_leaves_the_prefix_as_it_was(engine: Engine) -> None:
    live = engine.after_prefix()
    prefix = engine.model.new_context()
    prefix.prefill(engine.model.manifest.prompt.prefix_ids)
    assert live.entries == len(engine.model.manifest.prompt.prefix_ids)
    assert equal(live.extract(0, live.entries), prefix.extract(0, prefix.entries))


async def test_a_prefilled_context_joined_again_goes_on_like_running_text(engine: Engine) -> None:
    ids = engine.text.context_ids("The pump stopped at noon, and the valve was closed.")
    question = engine.text.question_ids("What stopped?")
    before = engine.meter.speed
    cache, seconds = await engine.prefill_context(ids, "somebody")
    assert cache.entries == len(ids)
    assert seconds > 0
    assert engine.meter.speed != before
    logits, _ = await engine.first_token(await engine.join([(cache, cache.entries)]), question)
    text = engine.after_prefix()
    text.prefill(ids)
    assert np.abs(logits - text.prefill(question)).max() < 1e-4


async def test_a_question_teaches_as_what_stands_behind_its_contexts(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[tuple[int, int]] = []
    monkeypatch.setattr(engine.meter, "prefill", lambda tokens, _, behind=0: taught.append((tokens, behind)))
    caches = [await engine.prefill_context([1] * tokens, "somebody") for tokens in (5, 9)]
    live = await engine.join([(cache, cache.entries) for cache, _ in caches])
    await engine.first_token(live, [1, 2, 3])
    assert taught == [(5, 0), (9, 0), (3, 14)]


async def test_two_prefills_take_turns(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    real = LiveContext.step

    def step(live: LiveContext, ids: Int32, **how: Any) -> Float32:
        order.append(int(ids[0]))
        return real(live, ids, **how)

    monkeypatch.setattr(LiveContext, "step", step)
    async with engine.turns.turn("holder"):
        work = [asyncio.create_task(engine.prefill_context([token] * 4 * CHUNK, str(token))) for token in (1, 2)]
        await queued(engine, len(work))
    await asyncio.gather(*work)
    assert order == [1, 2] * 4
    assert engine.turns.waiting == 0


async def test_a_short_prefill_waits_for_a_chunk_of_a_long_one_and_not_for_all(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[int] = []
    real = LiveContext.step

    def step(live: LiveContext, ids: Int32, **how: Any) -> Float32:
        order.append(int(ids[0]))
        return real(live, ids, **how)

    monkeypatch.setattr(LiveContext, "step", step)
    async with engine.turns.turn("holder"):
        long = asyncio.create_task(engine.prefill_context([1] * 6 * CHUNK, "long"))
        short = asyncio.create_task(engine.prefill_context([2] * CHUNK, "short"))
        await queued(engine, 2)
    await short
    assert order.count(1) < 6
    await long
    assert order == [1, 2, 1, 1, 1, 1, 1]


async def test_a_cancelled_prefill_gives_its_turn_back(engine: Engine) -> None:
    work = asyncio.create_task(engine.prefill_context([1] * 60 * CHUNK, "doomed"))
    await asyncio.sleep(0)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    cache, _ = await engine.prefill_context([1, 2, 3], "heir")
    assert cache.entries == 3


async def test_generation_ends_at_the_stop_string(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    said = engine.text.ids("dry well\n")
    given = script(monkeypatch, [*said[1:], 7, 8])
    pieces = await generated(engine, engine.after_prefix(), logits_for(said[0]), 20)
    assert [token for token, _, _ in pieces] == said
    assert "".join(text for _, text, _ in pieces) == pieces[-1][2].answer == "dry well"
    assert pieces[-1][2].finished
    assert given == said[:-1]  # what ends the answer is not read any more


async def test_generation_ends_at_the_end_of_sequence(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    said = engine.text.ids("dry")
    script(monkeypatch, [*said[1:], EOS, 7])
    pieces = await generated(engine, engine.after_prefix(), logits_for(said[0]), 20)
    assert [token for token, _, _ in pieces] == [*said, EOS]
    assert pieces[-1][2].answer == "dry"


@pytest.mark.parametrize("most", [1, 3])
async def test_generation_ends_after_the_most_tokens_that_were_asked_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    word = engine.text.ids("a")[0]
    given = script(monkeypatch, [word] * 10)
    pieces = await generated(engine, engine.after_prefix(), logits_for(word), most)
    assert len(pieces) == most
    assert len(given) == most - 1
    assert not pieces[-1][2].finished


async def test_generation_is_greedy(engine: Engine) -> None:
    live = engine.after_prefix()
    again = live.fork()
    question = engine.text.question_ids("What stopped?")
    logits, _ = await engine.first_token(live, question)
    pieces = await generated(engine, live, logits, 6)
    expected = again.prefill(question)
    for token, _, _ in pieces:
        assert token == int(np.argmax(expected))
        expected = again.prefill([token])


async def test_a_context_must_leave_room_for_question_and_answer(engine: Engine) -> None:
    manifest = engine.model.manifest
    room = manifest.window_tokens - len(manifest.prompt.prefix_ids) - RESERVED_TOKENS
    engine.check_fits(room)
    with pytest.raises(ContextTooLong, match=f"{manifest.window_tokens + 1} tokens do not fit .* 1024"):
        engine.check_fits(room + 1)


async def test_what_cannot_be_prefilled_is_refused_and_the_engine_goes_on(engine: Engine) -> None:
    with pytest.raises(ContextTooLong):
        await engine.prefill_context([1] * tiny.WINDOW_TOKENS, "greedy")
    with pytest.raises(ContextEmpty):
        await engine.prefill_context([], "idle")
    assert (await engine.prefill_context([1], "modest"))[0].entries == 1
