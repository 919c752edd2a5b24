"""One odd measurement is an accident, several in a row in one direction are a change."""

from __future__ import annotations

import math

LIMIT = 0.4
"""Logarithm of a ratio of measured to expected from which on it is odd: half as much again, or two thirds."""


class Surprise:
    """Judges a series of logarithms of ratios of measured to expected. believed: so many in a row are a change; before
    that an odd one counts as much as one of `counts`."""

    def __init__(self, *, believed: int = 2, counts: float = LIMIT) -> None:
        self._believed, self._counts = believed, counts
        self._row: list[float] = []

    def split(self, error: float) -> tuple[float, float]:
        """How much to take over at once, and how large an error (LIMIT at most) to learn from as usual.

        Once there are enough odd ones, what they have in common is taken over.
        """
        if abs(error) <= LIMIT:
            self._row.clear()
            return 0.0, error
        if self._row and self._row[-1] * error < 0:
            self._row.clear()
        self._row.append(error)
        if len(self._row) < self._believed:
            return 0.0, math.copysign(self._counts, error)
        jump = math.copysign(min(map(abs, self._row)), error)
        self._row.clear()
        return jump, min(max(error - jump, -LIMIT), LIMIT)
