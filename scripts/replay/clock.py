"""An event loop whose clock jumps to the next timer: hours of waiting in milliseconds, and the same every time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any, TypeVar

T = TypeVar("T")

FORGOTTEN_FROM = 1_000
"""Cancelled timers that are not worth a search."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time() passes only while everybody waits, and is the same however many turns that takes. Timers of one moment
    fire in the order in which they were set.

    Timers are kept here as (when, number, handle): asyncio's own queue compares handles, in Python, which takes much of
    a run with a thousand agents.
    """

    _ready: Any
    _selector: Any
    _process_events: Any

    def __init__(self, start_s: float = 0.0, *, looks: int = 1) -> None:
        """looks: so seldom it is looked whether anything came from outside (a thread, a signal)."""
        self._now_s, self._looks, self._until_look = start_s, looks, 1
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = count()
        self._cancelled = 0
        super().__init__()

    def time(self) -> float:
        return self._now_s

    def call_at(  # type: ignore[override]  # as loosely as asyncio itself has it
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """At that time; at once if it has passed."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        timer._scheduled = True  # type: ignore[attr-defined]  # so that it tells when it is cancelled
        heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are forgotten once they are most of all: a far one would be kept until its time."""
        self._cancelled += handle._scheduled  # type: ignore[attr-defined]
        if self._cancelled > FORGOTTEN_FROM and 2 * self._cancelled > len(self._timers):
            self._timers[:] = [entry for entry in self._timers if not (entry[2].cancelled() or entry[2] is handle)]
            heapify(self._timers)
            self._cancelled = 0

    def close(self) -> None:
        self._timers.clear()
        super().close()

    def _run_once(self) -> None:
        """One turn: what came from outside, then whatever is ready; the clock goes on if nothing is."""
        timers, ready = self._timers, self._ready
        while timers and timers[0][2].cancelled():
            self._popped()
        self._until_look -= 1
        if not self._until_look or not (ready or timers):
            self._until_look = self._looks
            self._process_events(self._selector.select(0))
        if not ready:
            if not timers:
                raise RuntimeError("everything waits, and no timer will ever end it")
            self._now_s = max(self._now_s, timers[0][0])
        while timers and timers[0][0] <= self._now_s:
            timer = self._popped()
            if not timer.cancelled():
                ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()

    def _popped(self) -> asyncio.TimerHandle:
        timer = heappop(self._timers)[2]
        timer._scheduled = False  # type: ignore[attr-defined]
        self._cancelled -= timer.cancelled()
        return timer


def run_virtual(
    main: Coroutine[Any, Any, T], *, limit_s: float | None = 3_600.0, start_s: float = 0.0, looks: int = 1
) -> T:
    """Run to the end in virtual time, from start_s on. Raises TimeoutError after limit_s virtual seconds.

    looks: see VirtualLoop.
    """

    async def limited() -> T:
        async with asyncio.timeout(limit_s):
            return await main

    with asyncio.Runner(loop_factory=partial(VirtualLoop, start_s, looks=looks)) as runner:
        return runner.run(limited())
