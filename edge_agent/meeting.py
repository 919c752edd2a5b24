"""Receiver and sender meet: what has not arrived yet is computed, from the first token on, until nothing is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edge_agent.arrivals import Arrivals, worth_computing
from edge_agent.engine import RESERVED_TOKENS, Engine
from edge_agent.kv.cache import Cache
from edge_agent.model.session import LiveContext
from edge_agent.precedence import Seat

LEAST_TOKENS = 16
"""Fewer are not computed where a slice is due: a run has a price of its own, whatever it computes."""
PATIENCE_S = 0.5
"""So long what was planned to come is waited for."""
UNMEASURED_TPS = 100.0
DELAYED = 0.3
"""A transfer that will be later than planned by this share of the time it was to take, and by PATIENCE_S, is late."""
LOOKS_S = 0.02
"""Of a transfer that is waited for, so often at most it is looked whether it is late."""


class Source(Protocol):
    """Where slices come from: a Reception."""

    over: bool
    """Whether nothing more comes."""

    def take(self) -> list[tuple[int, Cache]]:
        """(first token, entries) of what has come since; the seat's news is set when there is any."""

    def passed(self, token: int) -> None:
        """Of what ends at or before this token nothing is needed any more."""


@dataclass(frozen=True)
class Bid:
    """What this end is to do. own_tokens: so many leading tokens it is planned to compute; meet: it goes on behind
    them while the others are on their way; due_s: but, where that is known, not as long as they come as planned, all
    by then (on the loop's clock): what is computed beside decoding and others' work has its price.
    """

    ids: Sequence[int]
    own_tokens: int
    meet: bool
    due_s: float | None = None


class Meeting:
    """One context, from the slices of a transfer and what is computed of it here.

    Tokens are computed in chunks, one turn at the model each, in a context behind the prompt's prefix. Where the next
    token is in a slice that has arrived, its entries are taken, and computing goes on behind them. When the transfer
    ends with a part missing, that is computed, too.
    """

    def __init__(self, engine: Engine, source: Source, seat: Seat, bid: Bid, *, asker: str) -> None:
        self._engine, self._source, self._seat, self._bid, self._asker = engine, source, seat, bid, asker
        self._clock = asyncio.get_running_loop().time
        self._began_s = self._clock()
        self._arrivals = Arrivals(self._began_s)
        self._here: dict[int, Cache] = {}
        """Slices by their first token, behind what is covered."""
        self._covered = 0
        self._pieces: list[tuple[int, Cache | None]] = []
        """(tokens, entries) one after the other; None: computed, and to be taken out of the live context."""
        self._live: LiveContext | None = None
        self._live_pieces = self._first = 0
        """How many pieces are in the live context; where it begins there."""
        self._busy_s = 0.0
        self.computed_tokens = 0
        self.prefill_s = self.waited_s = 0.0
        self.given_up = False
        """Whether the transfer ended before all came that it was to bring."""

    async def run(self) -> None:
        """Until every token is covered. Raises ContextTooLong, MemoryShort, ModelFailed."""
        try:
            while self._covered < len(self._bid.ids):
                if await self._take():
                    continue
                if self._wanted() and self._seat.may_compute():
                    await self._compute()
                else:
                    await self._wait()
        finally:
            self._seat.wish(planned=False)

    async def live(self) -> LiveContext:
        """The context in which all of it was read, with room for a question. For a question of one part."""
        return await self._caught_up()

    async def pieces(self) -> list[tuple[Cache, int]]:
        """Its entries and tokens, piece after piece, each as it was computed or as it came."""
        found, at = [], 0
        for tokens, cache in self._pieces:
            if cache is None:
                cache = await self._computed(at, tokens)  # noqa: PLW2901
            found.append((cache, tokens))
            at += tokens
        self._pieces, self._live = [], None
        return found

    async def _take(self) -> bool:
        """Take in what has arrived. Whether it covers the next token."""
        came = self._source.take()
        if came:
            self._arrivals.came(sum(cache.entries for _, cache in came), self._clock())
        self._here |= dict(came)
        before = self._covered
        for start in sorted(self._here):
            cache = self._here[start]
            stop = start + cache.entries
            if start <= self._covered:
                del self._here[start]
            if start <= self._covered < stop:
                rest = cache.between(self._covered, stop).moved(-self._covered)
                self._pieces.append((stop - self._covered, rest))
                self._advance(stop)
        if self._seat.alone and self._covered > before:
            await self._caught_up()
        return self._covered > before

    def _advance(self, to: int) -> None:
        self._covered = to
        self._source.passed(to)

    def _wanted(self) -> int:
        """How many tokens are worth computing now; 0: better wait."""
        own = self._bid.own_tokens
        gap = min(self._here, default=len(self._bid.ids)) - self._covered
        most = min(gap, self._engine.model.prefill_chunk)
        planned = self._covered < own
        if planned and not self._seat.alone:
            most = min(most, own - self._covered)
        if self._source.over:
            self._give_up()
        elif not self._bid.meet:
            most = min(most, own - self._covered) if planned else 0
        else:
            most = min(most, self._worth(gap, planned=planned))
        self._seat.wish(planned=planned and most > 0)
        return most

    def _worth(self, gap: int, *, planned: bool) -> int:
        """The same where both ends go on until they meet."""
        now_s, own_tps = self._clock(), self._own_tps()
        come_tps = self._arrivals.tps(now_s)
        if not planned and self._in_time(gap, come_tps, now_s):
            return 0
        if self._unknown():
            come_tps = 0.0
        elif planned and not self._arrivals.any:  # as it was planned
            come_tps = own_tps * (len(self._bid.ids) / self._bid.own_tokens - 1)
        worth = int(worth_computing(gap, come_tps=come_tps, own_tps=own_tps))
        if now_s >= self._late_s():
            return max(worth, min(gap, LEAST_TOKENS))
        return 0 if self._unknown() or worth < LEAST_TOKENS else worth

    def _in_time(self, gap: int, come_tps: float, now_s: float) -> bool:
        """Whether the others come as planned, or before a chunk could be computed, as far as can be seen."""
        if self._bid.due_s is None:
            return False
        if not self._arrivals.shown:
            return now_s <= self._bid.due_s + PATIENCE_S
        comes_s = gap / max(come_tps, 1e-9)
        soon = comes_s <= self._engine.model.prefill_chunk / self._own_tps()
        slack_s = max(PATIENCE_S, DELAYED * (self._bid.due_s - self._began_s))
        return soon or now_s + comes_s <= self._bid.due_s + slack_s

    def _unknown(self) -> bool:
        """Whether nothing says yet how fast a cache comes that was expected to win."""
        return not (self._bid.own_tokens or self.computed_tokens or self._arrivals.shown)

    def _late_s(self) -> float:
        """Until when it is better to wait than to compute a few tokens."""
        return self._arrivals.last_s + PATIENCE_S if self._unknown() else self._arrivals.late_s()

    def _own_tps(self) -> float:
        """Tokens that are computed here per second, turns of others counted."""
        if self._busy_s > 0:
            return self.computed_tokens / self._busy_s
        speed = self._engine.meter.speed
        return speed.prefill_tps if speed is not None else UNMEASURED_TPS

    def _give_up(self) -> None:
        """Note, once, whether anything is missing that was to come."""
        if self.given_up:
            return
        first = max(self._covered, self._bid.own_tokens)
        here = sum(max(0, start + cache.entries - max(start, first)) for start, cache in self._here.items())
        self.given_up = here < len(self._bid.ids) - first

    async def _compute(self) -> None:
        """One chunk, in a turn; of what is still wanted when it is our turn."""
        begin_s = self._clock()
        live = await self._caught_up()
        async with self._engine.turns.turn(self._asker):
            if await self._take() or not (count := self._wanted()):
                return
            ids = self._bid.ids[self._covered : self._covered + count]
            seconds = await self._engine.compute(live, ids, keys=not self._seat.alone)
        self._busy_s += self._clock() - begin_s
        self.prefill_s += seconds
        self.computed_tokens += count
        if 2 * count >= self._engine.model.prefill_chunk:  # small ones are slower for a token
            self._engine.meter.prefill(count, seconds, behind=self._covered)
        if self._pieces and self._pieces[-1][1] is None:
            self._pieces[-1] = (self._pieces[-1][0] + count, None)
        else:
            self._pieces.append((count, None))
        self._live_pieces = len(self._pieces)
        self._advance(self._covered + count)

    async def _wait(self) -> None:
        """For a slice, a turn before others, or the time when what is due is late."""
        begin_s = self._clock()
        held_up = self._wanted() > 0
        timeout_s = None if held_up or not self._bid.meet else max(LOOKS_S, self._late_s() - begin_s)
        self._seat.news.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._seat.news.wait()
        except TimeoutError:
            pass
        if not held_up:
            self.waited_s += self._clock() - begin_s

    async def _caught_up(self) -> LiveContext:
        """The live context with all that is covered in it."""
        if self._live is None:
            self._live = self._engine.after_prefix(room=len(self._bid.ids) + RESERVED_TOKENS)
            self._first = self._live.next_position
        while self._live_pieces < len(self._pieces):
            tokens, cache = self._pieces[self._live_pieces]
            if cache is not None:
                await self._engine.append(self._live, cache, tokens)
            if self._seat.alone:
                self._pieces[self._live_pieces] = (tokens, None)  # it is needed no more
            self._live_pieces += 1
        return self._live

    async def _computed(self, start: int, tokens: int) -> Cache:
        if self._live is None:
            raise RuntimeError("nothing was computed")
        cache = await self._engine.extract(self._live, self._first + start, self._first + start + tokens)
        cache.check()
        return cache
