"""Planned tokens are computed first, in the order of the parts; what goes beyond waits for them."""

from __future__ import annotations

import asyncio

from edge_agent.precedence import Precedence, Seat


def seats(count: int) -> list[Seat]:
    precedence = Precedence()
    return [precedence.seat() for _ in range(count)]


def may(parts: list[Seat]) -> list[bool]:
    return [seat.may_compute() for seat in parts]


async def test_without_planned_tokens_everybody_may() -> None:
    assert may(seats(3)) == [True] * 3
    assert seats(1)[0].alone
    assert not seats(2)[0].alone


async def test_planned_tokens_go_first_in_the_order_of_the_parts() -> None:
    parts = seats(4)
    parts[1].wish(planned=True)
    parts[2].wish(planned=True)
    assert may(parts) == [False, True, False, False]
    parts[1].wish(planned=False)
    assert may(parts) == [False, False, True, False]
    parts[2].wish(planned=False)
    assert may(parts) == [True] * 4


async def test_whoever_waits_for_precedence_hears_of_a_change_and_of_nothing_else() -> None:
    first, second = seats(2)
    first.wish(planned=True)
    second.news.clear()
    first.wish(planned=True)
    assert not second.news.is_set()
    waiting = asyncio.create_task(second.news.wait())
    await asyncio.sleep(0)
    first.wish(planned=False)
    await asyncio.wait_for(waiting, 1)
    assert second.may_compute()
