"""The store of contexts: text always, KV caches under a byte budget, least recently used out first."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from broker_config.messages import ContextInfo
from edge_agent.errors import BudgetExceeded, ContextUnknown
from edge_agent.kv.cache import Cache


@dataclass(frozen=True)
class Held:
    """A context's text, as the token ids it has in the prompt."""

    name: str
    context_id: str
    ids: tuple[int, ...]


class ContextStore:
    """Contexts by name, caches by context id. cache_bytes never exceeds budget_bytes.

    A pinned cache (being sent, being joined) is never put out; a pin lives exactly as long as its `pinned` block.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._held: dict[str, Held] = {}
        self._caches: OrderedDict[str, Cache] = OrderedDict()
        self._pins: Counter[str] = Counter()

    @property
    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches.values())

    def add(self, name: str, context_id: str, ids: tuple[int, ...]) -> Held:
        """Hold a context; one of the same name is replaced, and its cache dropped if no other name needs it."""
        self._held[name] = Held(name, context_id, ids)
        self._drop_orphans()
        return self._held[name]

    def remove(self, name: str) -> None:
        """Forget a context. Raises ContextUnknown."""
        if self._held.pop(name, None) is None:
            raise ContextUnknown(f"no context named {name} is held here")
        self._drop_orphans()

    def names(self) -> tuple[str, ...]:
        return tuple(self._held)

    def by_name(self, name: str) -> Held | None:
        return self._held.get(name)

    def get(self, context_id: str) -> Held:
        """The context of this id. Raises ContextUnknown."""
        for held in self._held.values():
            if held.context_id == context_id:
                return held
        raise ContextUnknown(f"context {context_id} is not held here")

    def cache(self, context_id: str) -> Cache | None:
        """Its cache, now the most recently used; None if it is not in memory."""
        if context_id not in self._caches:
            return None
        self._caches.move_to_end(context_id)
        return self._caches[context_id]

    def put(self, context_id: str, cache: Cache) -> tuple[str, ...]:
        """Keep a cache; the least recently used ones make room. Returns the ids that were put out.

        Raises BudgetExceeded (and keeps what is there) if it can't fit beside what is pinned.
        """
        pinned = sum(other.nbytes for key, other in self._caches.items() if self._pins[key] and key != context_id)
        if cache.nbytes + pinned > self.budget_bytes:
            raise BudgetExceeded(
                f"a cache of {cache.nbytes:,} bytes does not fit the budget of {self.budget_bytes:,}"
                + (f" beside {pinned:,} bytes in use" if pinned else "")
            )
        self._caches.pop(context_id, None)
        out = []
        for key in [key for key in self._caches if not self._pins[key]]:
            if self.cache_bytes + cache.nbytes <= self.budget_bytes:
                break
            del self._caches[key]
            out.append(key)
        self._caches[context_id] = cache
        return tuple(out)

    @contextmanager
    def pinned(self, context_id: str) -> Iterator[None]:
        """Keep the cache of context_id in memory inside the block (it may be put there in the block)."""
        self._pins[context_id] += 1
        try:
            yield
        finally:
            self._pins[context_id] -= 1
            if not self._pins[context_id]:
                del self._pins[context_id]

    def infos(self) -> tuple[ContextInfo, ...]:
        """What telemetry says of the store, by name."""
        return tuple(
            ContextInfo(
                context_id=held.context_id,
                name=held.name,
                tokens=len(held.ids),
                cached=held.context_id in self._caches,
                cache_bytes=self._caches[held.context_id].nbytes if held.context_id in self._caches else 0,
            )
            for held in sorted(self._held.values(), key=lambda held: held.name)
        )

    def _drop_orphans(self) -> None:
        wanted = {held.context_id for held in self._held.values()}
        for key in [key for key in self._caches if key not in wanted and not self._pins[key]]:
            del self._caches[key]
