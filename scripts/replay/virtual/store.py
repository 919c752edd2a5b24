"""An agent's memory in virtual time: its own rules of what is tightened and what leaves, over sizes of caches."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

from broker_config.messages import ContextInfo, Memory, ModelInfo
from edge_agent.errors import ContextUnknown
from edge_agent.memory import Budget, Shelf
from edge_agent.memory.budget import System
from edge_agent.memory.relief import Item, Step, next_step
from edge_agent.memory.shelf import EXACT
from edge_agent.settings import MemorySettings
from scripts.traces.memory import MemorySample, MemoryTrace


@dataclass(frozen=True)
class Context:
    """A context that an agent holds."""

    name: str
    context_id: str
    tokens: int


class VirtualStore:
    """What edge_agent.memory.ContextStore is to an agent's rooms.

    others: what the device has available without its caches, over time. recode: waits for as long as coding takes.
    """

    def __init__(
        self,
        model: ModelInfo,
        settings: MemorySettings,
        *,
        others: MemoryTrace,
        clock: Callable[[], float],
        recode: Callable[[int, str, str], Awaitable[float]],
    ) -> None:
        manifest = SimpleNamespace(ladder=model.ladder, baselines=model.baselines, info=lambda: model)
        transform: Any = object() if model.transform else None
        self.shelf = Shelf(cast("Any", manifest), transform, tightest_kl=settings.tightest_kl)
        self._others, self._clock, self._recode = others, clock, recode
        self._budget = Budget(
            limit_bytes=int(settings.cache_budget_mb * 1e6),
            share=settings.cache_budget_share,
            high=settings.high_watermark,
            low=settings.low_watermark,
            system=lambda: System(self._available_bytes(self.cache_bytes), self._now.stalled_share),
        )
        self._held: dict[str, Context] = {}
        self._rungs: OrderedDict[str, str] = OrderedDict()
        """Of the caches that are kept, the longest unused first."""
        self._cache_bytes = 0
        self._told: tuple[ContextInfo, ...] | None = None
        self._sampled_s, self._sample = clock(), others.at(clock())
        self._infos: dict[tuple[str, str | None], ContextInfo] = {}
        self._sizes: dict[tuple[int, str], int] = {}
        self._pins: Counter[str] = Counter()
        self._relieving = asyncio.Lock()

    @property
    def cache_bytes(self) -> int:
        """What caches take."""
        return self._cache_bytes

    @property
    def memory(self) -> Memory:
        """As edge_agent.pressure.measure has it."""
        now = self._now
        cache_bytes = self.cache_bytes
        budget_bytes, available_bytes = self._budget.bytes_now(cache_bytes), self._available_bytes(cache_bytes)
        terms = [
            cache_bytes / budget_bytes if budget_bytes else 1.0,
            1 - available_bytes / self._others.total_bytes,
            now.stalled_share,
        ]
        return Memory(
            pressure=min(1.0, max(0.0, *terms)),
            cache_bytes=cache_bytes,
            cache_budget_bytes=budget_bytes,
            available_bytes=available_bytes,
            total_bytes=self._others.total_bytes,
            resident_bytes=cache_bytes,
            stalled_share=now.stalled_share,
        )

    def add(self, context: Context) -> None:
        """Hold a context."""
        self._held[context.context_id], self._told = context, None
        self._held = {held.context_id: held for held in sorted(self._held.values(), key=lambda held: held.name)}

    def get(self, context_id: str) -> Context:
        """Raises ContextUnknown."""
        if context_id not in self._held:
            raise ContextUnknown(f"context {context_id} is not held here")
        return self._held[context_id]

    def rung(self, context_id: str) -> str | None:
        """At which its cache is kept; None if it is not."""
        return self._rungs.get(context_id)

    def used(self, context_id: str) -> None:
        """It is the most recently used now."""
        if context_id in self._rungs:
            self._rungs.move_to_end(context_id)

    async def put(self, context_id: str, *, at_once: bool = False) -> None:
        """Keep a cache that was computed as the most recently used, making room for it; coded, if only so it fits.

        Not at all, if it can't fit beside what is pinned. at_once: coding takes no time.
        """
        tokens, kept = self._held[context_id].tokens, EXACT
        size = partial(self.shelf.size_bytes, tokens)
        if size(self.shelf.rungs[-1]) + self._pinned_bytes(context_id) > self._budget_bytes():
            return
        with self.pinned(context_id):
            for rung in self.shelf.rungs[1:]:
                await self.relieve(size(kept), context_id, leave=False, at_once=at_once)
                if self._marked(size(kept), context_id) <= self._budget.high:
                    break
                if self._room(context_id) >= size(rung) or rung == self.shelf.rungs[-1]:
                    if not at_once:
                        await self._recode(tokens, rung, kept)
                    kept = rung
            await self.relieve(size(kept), context_id, at_once=at_once)
            if size(kept) <= self._room(context_id):
                self._keep(context_id, kept)
                self._rungs.move_to_end(context_id)

    @property
    def filled(self) -> bool:
        """Whether caches take more than the high watermark allows."""
        return self._marked(0, "") > self._budget.high

    async def relieve(
        self, room_bytes: int = 0, context_id: str = "", *, leave: bool = True, at_once: bool = False
    ) -> None:
        """Take caches further until, with so much room more for one, the watermarks are kept or nothing can be done.

        leave: whether caches may leave memory for it. None leaves for a low mark that can't be reached.
        """
        async with self._relieving:
            target = self._budget.high
            while (marked := self._marked(room_bytes, context_id)) > target:
                items = [
                    Item(each, rung)
                    for each, rung in self._rungs.items()
                    if each != context_id and not self._pins[each]
                ]
                step = next_step(items, self.shelf.tighter, disk=False)
                if step is None or (step.rung is None and not leave):
                    return
                fixed = (self._pinned_bytes(context_id) + room_bytes) / max(1, self._budget_bytes())
                if step.rung is None and marked <= self._budget.high and fixed > self._budget.low:
                    return
                await self._take(step, at_once=at_once)
                target = self._budget.low

    async def _take(self, step: Step, *, at_once: bool) -> None:
        """One step; nothing, if the cache was pinned or replaced meanwhile."""
        kept = self._rungs[step.context_id]
        if step.rung is not None and not at_once:
            await self._recode(self._held[step.context_id].tokens, step.rung, kept)
        if self._rungs.get(step.context_id) == kept and not self._pins[step.context_id]:
            self._keep(step.context_id, step.rung)

    def _keep(self, context_id: str, rung: str | None) -> None:
        """Its cache at this rung; None: no more."""
        if rung is None:
            del self._rungs[context_id]
        else:
            self._rungs[context_id] = rung
        self._cache_bytes, self._told = sum(map(self._size, self._rungs)), None

    @contextmanager
    def pinned(self, context_id: str) -> Iterator[None]:
        """Its cache stays as it is inside the block."""
        self._pins[context_id] += 1
        try:
            yield
        finally:
            self._pins[context_id] -= 1
            if not self._pins[context_id]:
                del self._pins[context_id]

    def infos(self) -> tuple[ContextInfo, ...]:
        """What telemetry says of the store, by name."""
        if self._told is None:
            self._told = tuple(map(self._info, self._held.values()))
        return self._told

    def _info(self, held: Context) -> ContextInfo:
        rung = self._rungs.get(held.context_id)
        known = self._infos.get((held.context_id, rung))
        return (
            known if known is not None else self._infos.setdefault((held.context_id, rung), self._made_info(held, rung))
        )

    def _made_info(self, held: Context, rung: str | None) -> ContextInfo:
        return ContextInfo(
            context_id=held.context_id,
            name=held.name,
            tokens=held.tokens,
            cached=rung is not None,
            cache_bytes=0 if rung is None else self._size(held.context_id),
            rung=rung,
            ready=None if rung is None or rung == EXACT else self.shelf.ready(rung),
        )

    def _marked(self, room_bytes: int, context_id: str) -> float:
        """The share of the budget that caches take, with so much for that of a context."""
        return (self.cache_bytes - self._kept_bytes(context_id) + room_bytes) / max(1, self._budget_bytes())

    def _room(self, context_id: str) -> int:
        """Bytes that the cache of a context may take."""
        return self._budget_bytes() - self.cache_bytes + self._kept_bytes(context_id)

    def _budget_bytes(self) -> int:
        return self._budget.bytes_now(self.cache_bytes)

    def _pinned_bytes(self, but: str) -> int:
        return sum(self._size(each) for each in self._rungs if self._pins[each] and each != but)

    def _kept_bytes(self, context_id: str) -> int:
        return self._size(context_id) if context_id in self._rungs else 0

    def _size(self, context_id: str) -> int:
        kept = self._held[context_id].tokens, self._rungs[context_id]
        if kept not in self._sizes:
            self._sizes[kept] = self.shelf.size_bytes(*kept)
        return self._sizes[kept]

    def _available_bytes(self, cache_bytes: int) -> int:
        return max(0, self._now.available_bytes - cache_bytes)

    @property
    def _now(self) -> MemorySample:
        """What else there is; looked up once for each moment."""
        now_s = self._clock()
        if now_s != self._sampled_s:
            self._sampled_s, self._sample = now_s, self._others.at(now_s)
        return self._sample
