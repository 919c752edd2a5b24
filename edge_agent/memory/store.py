"""Contexts by name, their caches by context id: in memory under a budget, made smaller as it fills, then on disk.

Above the budget's high watermark, until below the low one, whatever is longest unused is taken a step further: first
every cache is tightened, rung by rung; when all are at the tightest, they go to disk; where there is no disk for them,
they leave. A pinned cache (being sent, being joined) is never touched; a pin lives as long as its `pinned` block.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from broker_config.messages import ContextInfo
from edge_agent.errors import AgentError, BudgetExceeded, ContextUnknown
from edge_agent.kv.cache import Cache
from edge_agent.memory.budget import Budget
from edge_agent.memory.relief import Item, Step, next_step, trim
from edge_agent.memory.shelf import EXACT, Form, Shelf, rung_of
from edge_agent.memory.spill import Spill

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """A context's text, as the token ids it has in the prompt."""

    name: str
    context_id: str
    ids: tuple[int, ...]


class ContextStore:
    """To be used from one event loop, and closed at the end; coding and files are done in threads."""

    def __init__(self, shelf: Shelf, budget: Budget, spill: Spill | None = None) -> None:
        self.shelf, self._budget, self._spill = shelf, budget, spill
        self._held: dict[str, Held] = {}
        self._forms: OrderedDict[str, Form] = OrderedDict()
        self._pins: Counter[str] = Counter()
        self._pending_bytes = 0
        """Of caches that are being put: they take memory already."""
        self._relieving = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()

    @property
    def cache_bytes(self) -> int:
        """What caches take in memory."""
        return sum(form.nbytes for form in self._forms.values())

    @property
    def budget_bytes(self) -> int:
        """What they may take just now."""
        return self._budget.bytes_now(self.cache_bytes + self._pending_bytes)

    def add(self, name: str, context_id: str, ids: tuple[int, ...]) -> Held:
        """Hold a context; one of the same name is replaced, and its cache dropped if no other name needs it."""
        before = self._held.get(name)
        self._held[name] = Held(name, context_id, ids)
        self._drop_orphan(before)
        return self._held[name]

    def remove(self, name: str) -> None:
        """Forget a context. Raises ContextUnknown."""
        if name not in self._held:
            raise ContextUnknown(f"no context named {name} is held here")
        self._drop_orphan(self._held.pop(name))

    def names(self) -> tuple[str, ...]:
        return tuple(self._held)

    def by_name(self, name: str) -> Held | None:
        return self._held.get(name)

    def get(self, context_id: str) -> Held:
        """The context of this id. Raises ContextUnknown."""
        held = self._find(context_id)
        if held is None:
            raise ContextUnknown(f"context {context_id} is not held here")
        return held

    def rung(self, context_id: str) -> str | None:
        """The rung at which a context's cache is kept, in memory or on disk; None if it is not."""
        if context_id in self._forms:
            return rung_of(self._forms[context_id])
        return self._spill.rung(context_id) if self._spill else None

    async def fetch(self, context_id: str) -> Form | None:
        """A context's cache as it is kept, now the most recently used; from disk if it is there. None if it is not.

        What comes from disk stays in memory if there is room, or if room can be made at once. Ask for it inside
        `pinned`, or it may be taken a step further at once.
        """
        shelved = None
        if context_id not in self._forms and self._spill is not None:
            shelved = await asyncio.to_thread(self._spill.read, context_id)
            if shelved is not None and not self._relieving.locked():
                await self.relieve(shelved.nbytes, context_id)
        if context_id not in self._forms:
            if shelved is None or self._find(context_id) is None or shelved.nbytes > self._room(context_id):
                return shelved
            self._forms[context_id] = shelved
        self._forms.move_to_end(context_id)
        return self._forms[context_id]

    def keep(self, held: Held, cache: Cache) -> None:
        """Put a cache in the background; if it can't be kept, that is logged."""
        self._later(self._keep(held, cache), f"keep {held.name}")

    async def put(self, context_id: str, cache: Cache) -> Form:
        """Keep a cache as the most recently used, making room for it; coded, if only so it fits. Returns what is kept.

        Raises BudgetExceeded if it can't fit beside what is pinned (as a rule before anything is done for it), and
        AgentError if it can't be coded.
        """
        with self._counted(cache):
            self._check(min(cache.nbytes, self._least_bytes(cache)), context_id)
            form: Form = cache
            for rung in self.shelf.rungs[1:]:
                await self.relieve(form.nbytes, context_id, leave=False)
                if self._marked(form.nbytes, context_id) <= self._budget.high:
                    break
                if self._room(context_id) >= self.shelf.size_bytes(cache.entries, rung) or rung == self.shelf.rungs[-1]:
                    ids = self._ids(context_id, cache)
                    form = await asyncio.to_thread(self.shelf.put, cache, rung, context_id, ids)
            self._check(form.nbytes, context_id)
            await self.relieve(form.nbytes, context_id)
            if form.nbytes > self._room(context_id):  # others were pinned meanwhile
                raise BudgetExceeded(f"no room for a cache of {form.nbytes:,} bytes beside what is in use")
            self._forms[context_id] = form
            self._forms.move_to_end(context_id)
        if self._find(context_id) is None:  # it was removed meanwhile
            self._drop(context_id)
        return form

    @contextmanager
    def pinned(self, context_id: str) -> Iterator[None]:
        """Keep the cache of context_id in memory as it is inside the block (it may be put there in the block)."""
        self._pins[context_id] += 1
        try:
            yield
        finally:
            self._pins[context_id] -= 1
            if not self._pins[context_id]:
                del self._pins[context_id]
                if self._find(context_id) is None:
                    self._drop(context_id)

    async def relieve(self, room_bytes: int = 0, context_id: str = "", *, leave: bool = True) -> None:
        """Take caches further until, with so much room more, the watermarks are kept or nothing is left to be done.

        context_id: of the cache that the room is for; one that is kept of it already makes room, too. leave: whether
        caches may leave memory for it. None leaves for a low mark that can't be reached.
        """
        async with self._relieving:
            target = self._budget.high
            while (marked := self._marked(room_bytes, context_id)) > target:
                step = next_step(self._items(context_id), self.shelf.tighter, disk=self._spill is not None)
                if step is None or (step.rung is None and not leave):
                    return
                fixed = (self._pinned_bytes(context_id) + room_bytes) / max(1, self.budget_bytes)
                if step.rung is None and marked <= self._budget.high and fixed > self._budget.low:
                    return
                await self._take(step)
                await asyncio.to_thread(trim)  # or what was given back would not be seen as available
                target = self._budget.low

    def infos(self) -> tuple[ContextInfo, ...]:
        """What telemetry says of the store, by name."""
        return tuple(self._info(held) for held in sorted(self._held.values(), key=lambda held: held.name))

    async def settled(self) -> None:
        """Wait until nothing is done in the background."""
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)

    async def close(self) -> None:
        """End what is done in the background."""
        for task in self._background:
            task.cancel()
        await self.settled()

    def _info(self, held: Held) -> ContextInfo:
        rung = self.rung(held.context_id)
        return ContextInfo(
            context_id=held.context_id,
            name=held.name,
            tokens=len(held.ids),
            cached=rung is not None,
            cache_bytes=self._size(held.context_id),
            rung=rung,
            ready=None if rung is None else self.shelf.ready(rung),
        )

    async def _keep(self, held: Held, cache: Cache) -> None:
        with self.pinned(held.context_id):
            try:
                await self.put(held.context_id, cache)
            except (AgentError, MemoryError) as error:
                log.warning("%s: %s", held.name, str(error) or "no memory")

    async def _take(self, step: Step) -> None:
        """One step; nothing, if the cache was pinned, replaced or removed meanwhile."""
        form, held = self._forms[step.context_id], self._find(step.context_id)
        name, after = held.name if held else step.context_id, None
        ids = held.ids if held else ()
        try:
            if step.rung is not None:
                after = await asyncio.to_thread(self.shelf.put, form, step.rung, step.context_id, ids)
            elif step.to_disk and self._spill is not None:
                await asyncio.to_thread(self._write, self._spill, form, step.context_id, ids)
        except (AgentError, MemoryError) as error:
            log.warning("the cache of %s can't be kept: %s", name, str(error) or "no memory")
        if step.to_disk and self._find(step.context_id) is None:
            self._drop(step.context_id)
        if self._forms.get(step.context_id) is not form or self._pins[step.context_id]:
            return
        if after is not None:
            self._forms[step.context_id] = after
        else:
            del self._forms[step.context_id]
        log.info("the cache of %s is now at %s", name, self.rung(step.context_id) or "text only")

    def _write(self, spill: Spill, form: Form, context_id: str, ids: tuple[int, ...]) -> None:
        spill.write(self.shelf.put(form, EXACT, context_id, ids) if isinstance(form, Cache) else form)

    def _items(self, but: str) -> list[Item]:
        """What may be taken further, the longest unused first."""
        return [
            Item(context_id, rung_of(form), kept=self._kept_on_disk(context_id, form))
            for context_id, form in self._forms.items()
            if context_id != but and not self._pins[context_id]
        ]

    def _kept_on_disk(self, context_id: str, form: Form) -> bool:
        return self._spill is not None and self._spill.rung(context_id) == rung_of(form)

    def _check(self, nbytes: int, context_id: str) -> None:
        """Raise BudgetExceeded if so many bytes can't fit beside what is pinned."""
        pinned = self._pinned_bytes(context_id)
        if nbytes + pinned > self.budget_bytes:
            raise BudgetExceeded(
                f"a cache of {nbytes:,} bytes does not fit the budget of {self.budget_bytes:,}"
                + (f" beside {pinned:,} bytes in use" if pinned else "")
            )

    def _least_bytes(self, cache: Cache) -> int:
        """About what a cache takes at the tightest."""
        return self.shelf.size_bytes(cache.entries, self.shelf.rungs[-1])

    @contextmanager
    def _counted(self, cache: Cache) -> Iterator[None]:
        self._pending_bytes += cache.nbytes
        try:
            yield
        finally:
            self._pending_bytes -= cache.nbytes

    def _marked(self, room_bytes: int, context_id: str) -> float:
        """The share of the budget that caches take, with so much for that of a context."""
        wanted = self.cache_bytes - self._size(context_id) + room_bytes
        return wanted / max(1, self.budget_bytes)

    def _room(self, context_id: str) -> int:
        """Bytes that the cache of a context may take."""
        return self.budget_bytes - self.cache_bytes + self._size(context_id)

    def _size(self, context_id: str) -> int:
        return self._forms[context_id].nbytes if context_id in self._forms else 0

    def _pinned_bytes(self, but: str) -> int:
        return sum(form.nbytes for key, form in self._forms.items() if self._pins[key] and key != but)

    def _ids(self, context_id: str, cache: Cache) -> tuple[int, ...]:
        held = self._find(context_id)
        return held.ids if held else (0,) * cache.entries

    def _find(self, context_id: str) -> Held | None:
        return next((held for held in self._held.values() if held.context_id == context_id), None)

    def _drop_orphan(self, held: Held | None) -> None:
        if held is not None and self._find(held.context_id) is None and not self._pins[held.context_id]:
            self._drop(held.context_id)

    def _drop(self, context_id: str) -> None:
        self._forms.pop(context_id, None)
        if self._spill is not None and self._spill.rung(context_id) is not None:
            self._later(asyncio.to_thread(self._spill.remove, context_id), f"remove {context_id}")

    def _later(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
