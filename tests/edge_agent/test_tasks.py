"""What is done beside something else ends with it, however that ends."""

from __future__ import annotations

import asyncio

import pytest

from edge_agent.tasks import beside


class Other:
    """Something that lasts until it is let go."""

    def __init__(self) -> None:
        self.go, self.ended = asyncio.Event(), ""

    async def run(self) -> None:
        try:
            await self.go.wait()
            self.ended = "done"
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise


async def test_the_result_comes_when_both_are_done() -> None:
    other = Other()

    async def work() -> int:
        asyncio.get_running_loop().call_later(0.01, other.go.set)
        return 7

    assert await beside(work(), other.run()) == 7
    assert other.ended == "done"


async def test_a_failure_cancels_the_other_and_is_raised_as_it_is() -> None:
    other = Other()

    async def work() -> int:
        await asyncio.sleep(0)
        raise ValueError("fault")

    with pytest.raises(ValueError, match="fault"):
        await beside(work(), other.run())
    assert other.ended == "cancelled"


async def test_cancelled_it_cancels_both() -> None:
    other, begun = Other(), asyncio.Event()

    async def work() -> int:
        begun.set()
        await asyncio.Event().wait()
        return 0

    task = asyncio.create_task(beside(work(), other.run()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert other.ended == "cancelled"
