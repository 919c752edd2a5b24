"""However slices come, what is joined of them and of what is computed here is the text itself."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import numpy as np
import pytest

from edge_agent.engine import Engine
from edge_agent.errors import CacheInvalid
from edge_agent.kv.cache import Cache
from edge_agent.meeting import Bid, Meeting
from edge_agent.precedence import Precedence, Seat
from tests import tiny
from tests.edge_agent.caches import equal
from tests.edge_agent.sessions import CLOSE, FAMILIES, far, started_engine

CHUNK = 16
TOKENS = 150
IDS = [1 + (7 * at * at + 3 * at) % (tiny.VOCABULARY - 1) for at in range(TOKENS)]
QUESTION = "Which valve?"


class Script:
    """Slices of a cache, handed over when the test says so."""

    def __init__(self, cache: Cache, seat: Seat) -> None:
        self.over = False
        self.given: list[tuple[int, Cache]] = []
        self.passed_token = 0
        self._cache, self._seat = cache, seat
        self._ready: list[tuple[int, Cache]] = []

    def give(self, start: int, stop: int) -> None:
        self._ready.append((start, self._cache.between(start, stop)))
        self.given.append(self._ready[-1])
        self._seat.news.set()

    def end(self) -> None:
        self.over = True
        self._seat.news.set()

    def take(self) -> list[tuple[int, Cache]]:
        taken, self._ready = self._ready, []
        return taken

    def passed(self, token: int) -> None:
        assert token >= self.passed_token
        self.passed_token = token


@pytest.fixture(params=FAMILIES)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    """A started engine that prefills sixteen tokens a turn."""
    async with started_engine(FAMILIES[request.param](), chunk=CHUNK) as made:
        yield made


def seats(count: int) -> list[Seat]:
    precedence = Precedence()
    return [precedence.seat() for _ in range(count)]


async def said(engine: Engine, live: object) -> tuple[np.ndarray, list[int]]:
    """First logits and greedy tokens after the question."""
    logits, _ = await engine.first_token(live, engine.text.question_ids(QUESTION))  # type: ignore[arg-type]
    tokens = [token async for token, _, _ in engine.generate(live, logits, max_new_tokens=8)]  # type: ignore[arg-type]
    return logits, tokens


def grid(random_: random.Random) -> list[tuple[int, int]]:
    """Slices of one size over all tokens."""
    size = random_.choice([5, 16, 31, 64])
    return [(start, min(start + size, TOKENS)) for start in range(0, TOKENS, size)]


async def feed(script: Script, slices: list[tuple[int, int]], random_: random.Random) -> None:
    """One after the other, at moments that have nothing to do with what is computed."""
    for start, stop in slices:
        for _ in range(random_.choice([0, 0, 1, 3, 10])):
            await asyncio.sleep(random_.choice([0, 0, 0.001, 0.003]))
        script.give(start, stop)
    script.end()


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("seed", range(12))
async def test_whatever_comes_when_the_answer_is_that_of_plain_text(engine: Engine, seed: int, *, alone: bool) -> None:
    random_ = random.Random(seed)
    whole, _ = await engine.prefill_context(IDS, "sender")
    text = engine.after_prefix()
    text.prefill(IDS)
    expected_logits, expected = await said(engine, text)
    slices = grid(random_)
    how = random_.choice(["rising", "falling", "mixed"])
    if how != "rising":
        slices.reverse()
    if how == "mixed":
        random_.shuffle(slices)
    sent = slices[: random_.randint(0, len(slices))] if random_.random() < 0.5 else slices
    seat = seats(1 if alone else 2)[0]
    script = Script(whole, seat)
    own = random_.randint(0, TOKENS)
    meeting = Meeting(engine, script, seat, Bid(IDS, own, meet=True), asker="receiver")
    feeding = asyncio.create_task(feed(script, sent, random_))
    await meeting.run()
    feeding.cancel()
    if alone:
        live = await meeting.live()
    else:
        pieces = await meeting.pieces()
        assert sum(tokens for _, tokens in pieces) == TOKENS
        live = await engine.join(pieces)
    logits, tokens = await said(engine, live)
    assert far(logits, expected_logits) < CLOSE
    assert tokens == expected
    assert 0 <= meeting.computed_tokens <= TOKENS
    assert (meeting.prefill_s > 0) == (meeting.computed_tokens > 0)
    assert script.passed_token == TOKENS


async def test_what_came_is_joined_bit_for_bit_and_what_was_computed_is_exact(engine: Engine) -> None:
    whole, _ = await engine.prefill_context(IDS, "sender")
    seat = seats(2)[0]
    script = Script(whole, seat)
    for start, stop in ((100, 120), (40, 70), (60, 64)):
        script.give(start, stop)
    script.end()
    meeting = Meeting(engine, script, seat, Bid(IDS, 20, meet=True), asker="receiver")
    await meeting.run()
    pieces = await meeting.pieces()
    assert [tokens for _, tokens in pieces] == [40, 30, 30, 20, 30]
    assert meeting.computed_tokens == 100
    for (cache, tokens), start in zip(pieces, (0, 40, 70, 100, 120), strict=True):
        theirs = whole.between(start, start + tokens).moved(-start)
        if start in (40, 100):
            assert equal(cache, theirs)
        for ours, original in zip(cache.layers, theirs.layers, strict=True):
            assert np.array_equal(ours.positions, original.positions)
            assert far(ours.keys, original.keys) < CLOSE
            assert far(ours.values, original.values) < CLOSE
    assert equal(pieces[0][0], whole.between(0, 40))  # computed in the very steps of the sender


@pytest.mark.parametrize("own", [0, 1, 16, 75, 149, 150])
async def test_without_meeting_the_planned_tokens_are_computed_and_the_rest_is_waited_for(
    engine: Engine, own: int
) -> None:
    whole, _ = await engine.prefill_context(IDS, "sender")
    seat = seats(1)[0]
    script = Script(whole, seat)
    meeting = Meeting(engine, script, seat, Bid(IDS, own, meet=False), asker="receiver")
    running = asyncio.create_task(meeting.run())
    async with asyncio.timeout(20):
        while meeting.computed_tokens < own:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.1)
    assert meeting.computed_tokens == own
    if own < TOKENS:
        assert not running.done()
        script.give(own, TOKENS)
    await running
    assert meeting.computed_tokens == own
    assert (meeting.waited_s > 0.05) == (own < TOKENS)
    text = engine.after_prefix()
    text.prefill(IDS)
    assert (await said(engine, await meeting.live()))[1] == (await said(engine, text))[1]


@pytest.mark.parametrize("meet", [True, False])
async def test_what_a_transfer_that_ended_did_not_bring_is_computed(engine: Engine, *, meet: bool) -> None:
    whole, _ = await engine.prefill_context(IDS, "sender")
    seat = seats(1)[0]
    script = Script(whole, seat)
    script.give(120, TOKENS)
    script.end()
    meeting = Meeting(engine, script, seat, Bid(IDS, 10, meet), asker="receiver")
    await meeting.run()
    assert meeting.given_up
    assert meeting.computed_tokens == 120


async def test_planned_tokens_that_are_still_to_be_computed_at_the_end_are_nothing_missing(engine: Engine) -> None:
    whole, _ = await engine.prefill_context(IDS, "sender")
    seat = seats(1)[0]
    script = Script(whole, seat)
    script.give(40, TOKENS)
    script.end()
    meeting = Meeting(engine, script, seat, Bid(IDS, 40, meet=True), asker="receiver")
    await meeting.run()
    assert not meeting.given_up
    assert meeting.computed_tokens == 40


async def test_two_parts_compute_what_was_planned_of_both_before_either_goes_beyond(engine: Engine) -> None:
    whole, _ = await engine.prefill_context(IDS, "sender")
    places = seats(2)
    scripts = [Script(whole, seat) for seat in places]
    order: list[tuple[int, int]] = []
    meetings = [
        Meeting(engine, script, seat, Bid(IDS, 48, meet=True), asker="receiver")
        for script, seat in zip(scripts, places, strict=True)
    ]
    for number, script in enumerate(scripts):
        script.passed = lambda token, number=number: order.append((number, token))  # type: ignore[method-assign,misc]
    await asyncio.gather(*(meeting.run() for meeting in meetings))
    assert order[:6] == [(0, 16), (0, 32), (0, 48), (1, 16), (1, 32), (1, 48)]
    assert [meeting.computed_tokens for meeting in meetings] == [TOKENS, TOKENS]
    ((cache, tokens),) = await meetings[0].pieces()
    assert tokens == TOKENS
    assert equal(cache, whole)


async def test_a_nan_that_the_model_computes_is_noticed(engine: Engine) -> None:
    live = engine.after_prefix(room=8)
    nan = Cache(
        tuple(
            layer.between(0, 4)
            if index
            else type(layer)(layer.keys[:, :4], np.full_like(layer.values[:, :4], np.nan), layer.positions[:4])
            for index, layer in enumerate((await engine.prefill_context(IDS[:4], "sender"))[0].layers)
        )
    )
    await engine.append(live, nan, 4)
    with pytest.raises(CacheInvalid, match="NaN"):
        await engine.first_token(live, engine.text.question_ids(QUESTION))
