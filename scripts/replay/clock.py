"""An event loop whose clock jumps to the next timer: hours of waiting in milliseconds, and the same every time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time() passes only while everybody waits. Timers of one moment fire in the order in which they were set.

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
        super().__init__()

    def time(self) -> float:
        return self._now_s

    def call_at(  # type: ignore[override]  # as loosely as asyncio itself has it
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Never before now: time does not go back."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def _run_once(self) -> None:
        """One turn: what came from outside, then whatever is ready; the clock goes on if nothing is."""
        timers, ready = self._timers, self._ready
        while timers and timers[0][2].cancelled():
            heappop(timers)
        self._until_look -= 1
        if not self._until_look or not (ready or timers):
            self._until_look = self._looks
            self._process_events(self._selector.select(0))
        if not ready:
            if not timers:
                raise RuntimeError("everything waits, and no timer will ever end it")
            self._now_s = max(self._now_s, timers[0][0])
        while timers and timers[0][0] <= self._now_s:
            timer = heappop(timers)[2]
            if not timer.cancelled():
                ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()


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
