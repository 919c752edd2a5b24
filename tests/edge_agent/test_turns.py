"""Turns at the model are fair between askers, and never lost."""

from __future__ import annotations

import asyncio

from edge_agent.turns import Turns


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_one_who_floods_delays_others_by_one_turn_only() -> None:
    turns, served = Turns(), list[str]()
    release = asyncio.Event()

    async def work(asker: str, name: str) -> None:
        async with turns.turn(asker):
            served.append(name)
            if name == "first":
                await release.wait()

    tasks = [asyncio.create_task(work("greedy", "first"))]
    await _settle()
    tasks += [asyncio.create_task(work("greedy", f"greedy {i}")) for i in range(3)]
    await _settle()
    tasks.append(asyncio.create_task(work("modest", "modest")))
    await _settle()
    assert turns.waiting == 4
    release.set()
    await asyncio.gather(*tasks)
    assert served == ["first", "greedy 0", "modest", "greedy 1", "greedy 2"]
    assert turns.waiting == 0


async def test_a_cancelled_waiter_loses_nobodys_turn() -> None:
    turns, served = Turns(), list[str]()
    release = asyncio.Event()

    async def work(name: str) -> None:
        async with turns.turn(name):
            served.append(name)
            if name == "holder":
                await release.wait()

    holder = asyncio.create_task(work("holder"))
    await _settle()
    doomed, heir = asyncio.create_task(work("doomed")), asyncio.create_task(work("heir"))
    await _settle()
    release.set()
    await asyncio.sleep(0)  # the turn is being passed to doomed
    doomed.cancel()
    await asyncio.gather(holder, heir, doomed, return_exceptions=True)
    assert "heir" in served
    async with asyncio.timeout(1), turns.turn("late"):
        pass
