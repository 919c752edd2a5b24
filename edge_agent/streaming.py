"""A context's cache, sent in slices while it is still being computed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing

from edge_agent.engine import Engine
from edge_agent.kv.cache import Cache
from edge_agent.kv.header import Header


class Stream:
    """Computes a context, chunk by chunk in turns at the model, and gives out the slices of a payload as they are done.

    header: of that payload. last_first: of the slices that are there the highest goes first, before the context is
    complete only of those at or above own_tokens, which the receiver does not compute itself; else the lowest.
    on_whole is called with the whole cache, once it is there.
    A slice that was given out is held no longer than until the whole cache is there.
    """

    def __init__(
        self,
        engine: Engine,
        ids: Sequence[int],
        asker: str,
        header: Header,
        *,
        own_tokens: int,
        last_first: bool,
        on_whole: Callable[[Cache], None] | None = None,
    ) -> None:
        self.prefill_s = 0.0
        self._on_whole = on_whole
        self._engine, self._ids, self._asker, self._header = engine, list(ids), asker, header
        self._pick = max if last_first else min
        self._from = max(0, own_tokens - header.own_tokens)
        """First entry of which slices go before the context is complete."""
        self._unsent = {start for start, _ in header.slice_starts()}
        self._ready: dict[int, Cache] = {}
        self._whole: Cache | None = None
        self._news = asyncio.Event()
        self._work = asyncio.create_task(self._compute(), name=f"stream of {header.context_id}")
        self._work.add_done_callback(self._ended)

    async def next(self) -> tuple[int, Cache] | None:
        """The next slice (its first entry, its entries), waited for; None after the last.

        Raises like Engine.prefill_context, when what is left can't be computed.
        """
        while self._unsent:
            self._news.clear()
            ready = self._unsent if self._whole is not None else self._ready.keys()
            if ready:
                start = self._pick(ready)
                self._unsent.remove(start)
                return start, self._ready.pop(start) if self._whole is None else self._slice(self._whole, start)
            if self._work.done():
                self._work.result()
            await self._news.wait()
        return None

    async def finish(self) -> Cache | None:
        """The whole cache, waited for; None if it can't be computed."""
        await asyncio.wait({self._work})
        return self._whole

    async def close(self) -> None:
        """Stop computing."""
        self._work.cancel()
        await asyncio.wait({self._work})
        self._ready.clear()

    def _ended(self, work: asyncio.Task[None]) -> None:
        if not work.cancelled():
            work.exception()  # who waits for a slice is told; nobody may be
        self._news.set()

    async def _compute(self) -> None:
        live = self._engine.after_prefix(room=len(self._ids))
        first = live.next_position
        todo = [start for start in sorted(self._unsent) if start >= self._from]
        async with aclosing(self._engine.read(live, self._ids, self._asker, mass=True)) as chunks:
            async for read, seconds in chunks:
                self.prefill_s += seconds
                done = [start for start in todo if self._stop(start) <= read]
                if done and read < len(self._ids):
                    begin = self._header.own_tokens + done[0]
                    part = await self._engine.extract(live, first + begin, first + self._stop(done[-1]))
                    part = part.moved(begin)
                    self._ready |= {start: self._slice(part, start) for start in done}
                    self._news.set()
                    del todo[: len(done)]
        self._engine.meter.prefill(len(self._ids), self.prefill_s)
        whole = await self._engine.extract(live, first, live.next_position, mass=True)
        whole.check()
        self._ready.clear()
        self._whole = whole
        if self._on_whole is not None:
            self._on_whole(whole)

    def _stop(self, start: int) -> int:
        """The token before which a slice ends."""
        return self._header.own_tokens + start + self._header.slice_entries(start)

    def _slice(self, cache: Cache, start: int) -> Cache:
        return cache.between(self._header.own_tokens + start, self._stop(start))
