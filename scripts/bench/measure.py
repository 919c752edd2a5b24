"""Timing of alternatives in turn: A B C, A B C, …, so that a machine that drifts drifts for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from msgspec import Struct


class Timed(Struct, frozen=True, kw_only=True):
    """Seconds of one alternative: median, least and most of the counted runs."""

    median_s: float
    least_s: float
    most_s: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timed:
        return cls(median_s=statistics.median(seconds), least_s=min(seconds), most_s=max(seconds))


def in_turn(work: Mapping[str, Callable[[], object]], repeats: int, hear: Callable[[str], None]) -> dict[str, Timed]:
    """Every alternative once uncounted, then `repeats` rounds of all of them. hear: its name, before each."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for counted in [False] + [True] * repeats:
        for name, run in work.items():
            hear(name)
            start = time.perf_counter()
            run()
            if counted:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timed.of(taken) for name, taken in seconds.items()}
