"""Where receiver and sender meet: where the speeds of both say, wherever it was planned. Time is virtual."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from edge_agent.kv.cache import Cache
from edge_agent.meeting import LEAST_TOKENS, PATIENCE_S, Bid, Meeting
from edge_agent.precedence import Precedence, Seat
from edge_agent.speed import SpeedMeter
from edge_agent.turns import Turns
from scripts.replay.clock import run_virtual
from tests.edge_agent.caches import made_up

if TYPE_CHECKING:
    from edge_agent.engine import Engine

TOKENS, SLICE, CHUNK = 1_024, 64, 128
CACHE = made_up(layers=1, heads=1, entries=TOKENS, dim=2)


@dataclass
class TimedEngine:
    """Computes nothing, in the time that it would take."""

    tps: float
    turns: Turns = field(default_factory=Turns)
    meter: SpeedMeter = field(default_factory=SpeedMeter)
    model: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(prefill_chunk=CHUNK))

    def after_prefix(self, *, room: int) -> SimpleNamespace:
        return SimpleNamespace(next_position=0, room=room)

    async def append(self, live: object, cache: Cache, tokens: int) -> None:
        pass

    async def compute(self, live: object, ids: Sequence[int], *, keys: bool) -> float:
        await asyncio.sleep(len(ids) / self.tps)
        return len(ids) / self.tps


class Link:
    """Brings slices at so many tokens per second, the last first; what is passed is not sent any more."""

    def __init__(self, seat: Seat, tps: Callable[[float], float], *, after_s: float = 0.0, up_to: int = 0) -> None:
        self.over = False
        self.brought = 0
        self._seat, self._tps, self._after_s, self._up_to = seat, tps, after_s, up_to
        self._ready: list[tuple[int, Cache]] = []
        self._passed = 0

    def take(self) -> list[tuple[int, Cache]]:
        taken, self._ready = self._ready, []
        return taken

    def passed(self, token: int) -> None:
        self._passed = token

    async def run(self) -> None:
        await asyncio.sleep(self._after_s)
        for start in range(self._up_to, TOKENS, SLICE)[::-1]:
            left = float(SLICE)
            while left > 0:  # a rate that changes while a slice is on its way
                tps = self._tps(asyncio.get_running_loop().time())
                await asyncio.sleep(min(left / tps, 0.05))
                left -= tps * min(left / tps, 0.05) + 1e-9
            self._ready.append((start, CACHE.between(start, start + SLICE)))
            self.brought += SLICE
            self._seat.news.set()


@dataclass(frozen=True)
class Met:
    """What came of it. took_s in virtual seconds."""

    computed: int
    took_s: float
    waited_s: float
    brought: int


def met(
    own_tps: float,
    link_tps: Callable[[float], float] | float,
    own: int,
    *,
    after_s: float = 0.0,
    ends_s: float | None = None,
    up_to: int = 0,
) -> Met:
    """The meeting of a receiver and a link of these speeds; ends_s: when the transfer breaks."""

    async def run() -> Met:
        seat = Precedence().seat()
        rate = link_tps if callable(link_tps) else lambda _: link_tps
        link = Link(seat, rate, after_s=after_s, up_to=up_to)
        engine = cast("Engine", TimedEngine(own_tps))
        meeting = Meeting(engine, link, seat, Bid(range(TOKENS), own, meet=True), asker="receiver")
        bringing = asyncio.create_task(link.run())

        def cut() -> None:
            bringing.cancel()
            link.over = True
            seat.news.set()

        if ends_s is not None:
            asyncio.get_running_loop().call_later(ends_s, cut)
        await meeting.run()
        bringing.cancel()
        return Met(meeting.computed_tokens, asyncio.get_running_loop().time(), meeting.waited_s, link.brought)

    return run_virtual(run())


@pytest.mark.parametrize("planned", [64, 256, 512, 768, 1_000])
@pytest.mark.parametrize("own_tps", [50.0, 150.0, 400.0])
@pytest.mark.parametrize("link_tps", [20.0, 100.0, 300.0, 2_000.0])
def test_they_meet_where_both_speeds_say_wherever_it_was_planned(own_tps: float, link_tps: float, planned: int) -> None:
    found = met(own_tps, link_tps, planned)
    best_s = TOKENS / (own_tps + link_tps)
    # lost at most: a slice that is dropped or waited for, and what is computed beside it; or, where the plan expected
    # a slow link, the chunk that was begun before anything came
    late_s = best_s + 1.5 * SLICE / link_tps + LEAST_TOKENS / own_tps
    assert found.took_s <= max(late_s, CHUNK / own_tps) + 1e-6
    assert found.computed == pytest.approx(own_tps * best_s, abs=CHUNK)


def test_a_link_slower_than_planned_makes_the_receiver_compute_more_and_a_faster_one_less() -> None:
    planned = 512
    assert met(100, 50, planned).computed > planned + SLICE
    assert met(100, 400, planned).computed < planned - SLICE


def test_the_split_follows_a_link_that_changes_while_the_transfer_runs() -> None:
    slows = met(100, lambda now_s: 300 if now_s < 1 else 20, 256)
    assert slows.computed > 500
    assert slows.took_s < 1 + (TOKENS - 400) / 120 + 64 / 20 + 1
    quickens = met(100, lambda now_s: 20 if now_s < 2 else 2_000, 800)
    assert quickens.computed < 400
    assert quickens.took_s < 3.2


@pytest.mark.parametrize("ends_s", [0.0, 0.3, 2.0, 5.0])
def test_a_transfer_that_breaks_costs_no_time_beyond_computing_the_rest(ends_s: float) -> None:
    found = met(100, 60, 512, ends_s=ends_s)
    usable = found.brought
    assert found.computed >= TOKENS - usable - SLICE
    assert found.took_s <= max(ends_s, TOKENS / 100) + 0.7


def test_a_cache_that_is_to_win_is_waited_for_a_moment_and_then_computed_beside() -> None:
    soon = met(100, 5_000, 0, after_s=0.1)
    assert soon.took_s == pytest.approx(0.1 + TOKENS / 5_000, abs=0.001)
    assert soon.computed <= 2 * LEAST_TOKENS
    assert soon.waited_s >= 0.1
    late = met(100, 5_000, 0, after_s=3.0)
    assert late.computed >= 100
    assert late.took_s < 3.0 + TOKENS / 5_000 + CHUNK / 100
    assert late.waited_s < PATIENCE_S + 0.3


def test_nothing_that_never_comes_is_waited_for() -> None:
    found = met(100, 1.0, 512, after_s=1_000)
    assert found.computed == TOKENS
    assert found.waited_s == 0
    assert found.took_s == pytest.approx(TOKENS / 100)
