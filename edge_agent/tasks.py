"""Work under way, by request: started once, cancelled by request, all ended when the agent stops."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

REMEMBERED = 4_096
"""Orders may arrive twice (QoS 1): the keys of so many past ones are kept to recognise that."""


LAST_WORDS_S = 2.0
"""Without a connection an end can't be reported; stopping must not wait for one."""


class Tasks:
    """Running tasks, each under a request and a key that is used only once.

    on_fault: told of one that ends by a fault.
    """

    def __init__(self, on_fault: Callable[[BaseException], None] | None = None) -> None:
        self._on_fault = on_fault
        self._running: dict[asyncio.Task[None], str] = {}
        self._seen: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, request: str, key: str, work: Coroutine[Any, Any, None]) -> bool:
        """Run work in the background. False, and nothing happens, if this key was started before."""
        if key in self._seen:
            work.close()
            return False
        self._seen[key] = None
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        task = asyncio.create_task(work, name=f"{key} of {request}")
        self._running[task] = request
        task.add_done_callback(self._done)
        return True

    def cancel(self, request: str) -> int:
        """Cancel what runs for a request; how many tasks that were."""
        found = [task for task, owner in self._running.items() if owner == request]
        for task in found:  # soon, not now: one that was never begun would end without a word
            asyncio.get_running_loop().call_soon(task.cancel)
        return len(found)

    async def close(self) -> None:
        """Cancel everything and wait for its end."""
        await asyncio.sleep(0)  # what was started just now begins, so that it can report its end
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s ended by a fault of ours: %r", task.get_name(), error)
            if self._on_fault is not None:
                self._on_fault(error)


async def last_words(work: Coroutine[Any, Any, None]) -> None:
    """Do something short although we are being cancelled: report an end, say goodbye. Given up after LAST_WORDS_S."""
    speaking = asyncio.ensure_future(work)
    await asyncio.wait({speaking}, timeout=LAST_WORDS_S)
    speaking.cancel()
    await asyncio.gather(speaking, return_exceptions=True)


async def gather_or_cancel(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; the first failure cancels the others, waits for their end, and is raised as it is."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
