"""Virtual time, and ids that can be drawn again."""

from __future__ import annotations

import asyncio

import pytest

from broker_config.messages import ids_from, new_id
from scripts.replay.clock import FORGOTTEN_FROM, VirtualLoop, run_virtual


async def _waits() -> list[float]:
    loop, found = asyncio.get_running_loop(), []
    for seconds in (3_600.0, 0.001, 86_400.0):
        await asyncio.sleep(seconds)
        found.append(loop.time())
    return found


@pytest.mark.parametrize("looks", [1, 7, 256])
def test_hours_pass_at_once_however_seldom_it_is_looked_outside(looks: int) -> None:
    assert run_virtual(_waits(), limit_s=None, looks=looks) == pytest.approx([3_600, 3_600.001, 90_000.001])


def test_time_limits_are_virtual_too() -> None:
    with pytest.raises(TimeoutError):
        run_virtual(asyncio.sleep(50), limit_s=49.0)


def test_timers_of_one_moment_fire_in_the_order_in_which_they_were_set_and_none_that_was_cancelled() -> None:
    async def story() -> list[int]:
        loop, found = asyncio.get_running_loop(), list[int]()
        timers = [loop.call_at(5.0, found.append, number) for number in range(50)]
        for timer in timers[::7]:
            timer.cancel()
        loop.call_at(-1.0, found.append, 50)  # long due: now
        await asyncio.sleep(5)
        return found

    expected = [50, *(number for number in range(50) if number % 7)]
    assert run_virtual(story(), limit_s=None) == expected


def test_what_waits_for_ever_is_told() -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="no timer will ever end it"):
        run_virtual(forever(), limit_s=None)


def test_ids_are_drawn_where_that_is_asked_for_and_random_elsewhere() -> None:
    async def drawn() -> str:
        return await asyncio.create_task(_one())

    async def _one() -> str:
        return new_id()

    with ids_from(lambda count: bytes(range(count))):
        assert new_id() == "0001020304050607"
        assert run_virtual(drawn()) == "0001020304050607"
    assert len({new_id() for _ in range(100)}) == 100


def test_cancelled_timers_are_forgotten_long_before_their_time() -> None:
    async def story() -> int:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        found = list[int]()
        for number in range(20 * FORGOTTEN_FROM):
            loop.call_at(1e6, found.append, number).cancel()
            if not number % FORGOTTEN_FROM:
                loop.call_at(2.0, found.append, number)
        held = len(loop._timers)
        await asyncio.sleep(5)
        assert found == list(range(0, 20 * FORGOTTEN_FROM, FORGOTTEN_FROM))
        return held

    assert run_virtual(story()) < 3 * FORGOTTEN_FROM
