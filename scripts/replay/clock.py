"""An event loop whose clock jumps to the next timer: hours of waiting in milliseconds, and the same every time."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class _JumpingSelector(selectors.BaseSelector):
    """Asks the real selector without waiting, and moves the clock by what would have been waited."""

    def __init__(self, advance: Callable[[float], None], every: int) -> None:
        self._real, self._advance = selectors.DefaultSelector(), advance
        self._every, self._left = every, 1

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._left -= 1
        ready = []
        if not self._left or timeout is None:
            ready, self._left = self._real.select(0), self._every
        if not ready:
            if timeout is None:
                raise RuntimeError("everything waits, and no timer will ever end it")
            self._advance(timeout)
        return ready

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time() passes only while everybody waits."""

    def __init__(self, start_s: float = 0.0, *, looks: int = 1) -> None:
        """looks: so seldom it is looked whether anything came from outside (a thread, a signal)."""
        self._now_s = start_s
        super().__init__(_JumpingSelector(self._advance, looks))

    def time(self) -> float:
        return self._now_s

    def _advance(self, seconds: float) -> None:
        later_s = self._now_s + max(seconds, 1e-9)
        self._now_s = later_s if later_s > self._now_s else math.nextafter(self._now_s, math.inf)


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
