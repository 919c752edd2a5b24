"""One odd measurement is an accident, two in a row in one direction are a change."""

from __future__ import annotations

import math

LIMIT = 0.4
"""Logarithm of a ratio of measured to expected from which on it is odd: half as much again, or two thirds."""


class Surprise:
    """Judges a series of logarithms of ratios of measured to expected."""

    def __init__(self) -> None:
        self._before = 0.0

    def split(self, error: float) -> tuple[float, float]:
        """How much to take over at once, and how large an error (LIMIT at most) to learn from as usual.

        The first odd one counts half of LIMIT; what a second one in its direction has in common with it is taken over.
        """
        before, self._before = self._before, 0.0
        if abs(error) <= LIMIT:
            return 0.0, error
        self._before = error
        if before * error <= 0:
            return 0.0, math.copysign(LIMIT / 2, error)
        jump = math.copysign(min(abs(before), abs(error)), error)
        self._before = error - jump if abs(error - jump) > LIMIT else 0.0
        return jump, min(max(error - jump, -LIMIT), LIMIT)
