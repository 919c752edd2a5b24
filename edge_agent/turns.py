"""Whose turn it is at the model: round-robin between askers, first come first served within one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """A lock that is fair between askers: one who floods it with work delays others by one turn, not by all of his."""

    def __init__(self) -> None:
        self._busy = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @property
    def waiting(self) -> int:
        """How many wait for a turn."""
        return sum(len(queue) for queue in self._waiting.values())

    @asynccontextmanager
    async def turn(self, asker: str) -> AsyncIterator[None]:
        """Hold the turn inside the block."""
        await self._acquire(asker)
        try:
            yield
        finally:
            self._pass_on()

    async def _acquire(self, asker: str) -> None:
        if not self._busy:
            self._busy = True
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(asker, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # the turn came as we were cancelled: it must not be lost
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            asker, queue = next(iter(self._waiting.items()))
            place = queue.popleft()
            del self._waiting[asker]
            if queue:
                self._waiting[asker] = queue  # to the back of the round
            if not place.done():
                place.set_result(None)
                return
        self._busy = False
