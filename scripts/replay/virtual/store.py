"""An agent's memory in virtual time: its own rules of what is tightened and what leaves, over sizes of caches."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from broker_config.messages import ContextInfo, Memory, ModelInfo
from edge_agent.errors import ContextUnknown
from edge_agent.memory import Budget, Shelf
from edge_agent.memory.budget import System
from edge_agent.memory.relief import Item, next_step
from edge_agent.memory.shelf import EXACT
from edge_agent.settings import MemorySettings
from scripts.traces.memory import MemoryTrace


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
            system=lambda: System(self._available_bytes(self.cache_bytes), self._others.at(clock()).stalled_share),
        )
        self._held: dict[str, Context] = {}
        self._rungs: OrderedDict[str, str] = OrderedDict()
        """Of the caches that are kept, the longest unused first."""
        self._infos: dict[tuple[str, str | None], ContextInfo] = {}
        self._sizes: dict[tuple[int, str], int] = {}
        self._pins: Counter[str] = Counter()

    @property
    def cache_bytes(self) -> int:
        """What caches take."""
        return sum(map(self._size, self._rungs))

    @property
    def memory(self) -> Memory:
        """As edge_agent.pressure.measure has it."""
        now = self._others.at(self._clock())
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

    def add(self, context: Context, *, cached: bool) -> None:
        """Hold a context, its cache as floats."""
        self._held[context.context_id] = context
        self._held = {held.context_id: held for held in sorted(self._held.values(), key=lambda held: held.name)}
        if cached:
            self.keep(context.context_id)

    def get(self, context_id: str) -> Context:
        """Raises ContextUnknown."""
        if context_id not in self._held:
            raise ContextUnknown(f"context {context_id} is not held here")
        return self._held[context_id]

    def rung(self, context_id: str) -> str | None:
        """At which its cache is kept, now the most recently used; None if it is not."""
        if context_id in self._rungs:
            self._rungs.move_to_end(context_id)
        return self._rungs.get(context_id)

    def keep(self, context_id: str) -> None:
        """A cache that was computed, coded so far that it fits; none, if it fits at no rung."""
        for rung in self.shelf.rungs:
            before = self._size(context_id) if context_id in self._rungs else 0
            size = self.shelf.size_bytes(self._held[context_id].tokens, rung)
            if self.cache_bytes - before + size <= self._budget.high * self._budget.bytes_now(self.cache_bytes):
                self._rungs[context_id] = rung
                self._rungs.move_to_end(context_id)
                return

    @property
    def filled(self) -> bool:
        """Whether caches take more than the high watermark allows."""
        return self._above(self._budget.high)

    async def relieve(self) -> None:
        """Take caches further until the watermarks are kept, or nothing is left to be done."""
        target = self._budget.high
        while self._above(target):
            items = [Item(context_id, rung) for context_id, rung in self._rungs.items() if not self._pins[context_id]]
            step = next_step(items, self.shelf.tighter, disk=False)
            if step is None:
                return
            kept = self._rungs[step.context_id]
            if step.rung is not None:
                await self._recode(self._held[step.context_id].tokens, step.rung, kept)
            if self._rungs.get(step.context_id) == kept and not self._pins[step.context_id]:
                if step.rung is None:
                    del self._rungs[step.context_id]
                else:
                    self._rungs[step.context_id] = step.rung
            target = self._budget.low

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
        return tuple(map(self._info, self._held.values()))

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

    def _above(self, mark: float) -> bool:
        cache_bytes = self.cache_bytes
        return cache_bytes > mark * max(1, self._budget.bytes_now(cache_bytes))

    def _size(self, context_id: str) -> int:
        kept = self._held[context_id].tokens, self._rungs[context_id]
        if kept not in self._sizes:
            self._sizes[kept] = self.shelf.size_bytes(*kept)
        return self._sizes[kept]

    def _available_bytes(self, cache_bytes: int) -> int:
        return max(0, self._others.at(self._clock()).available_bytes - cache_bytes)
