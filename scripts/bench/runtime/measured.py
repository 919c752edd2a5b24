"""What was measured, and ratios of it: paired, that is within one round, before any median is taken."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from msgspec import Struct

LOAD, PEAK = "load", "peak"
MASS = "attention mass"
"""A prefill after which the attention mass of the last queries is computed, which only our runtime gives."""

LLAMA, OPTIMUM = "llama.cpp Q8_0", "optimum export"
REFERENCES = (LLAMA, OPTIMUM)
"""What ratios are taken against, where it was measured."""


class Spread(Struct, frozen=True, kw_only=True):
    """Median, least and most of the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        return cls(median=statistics.median(figures), least=min(figures), most=max(figures))


class Absent(Struct, frozen=True, kw_only=True):
    """A variant, or one figure of it, that is not there. reason: one line."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {' '.join(self.reason.split())}"


class Row(Struct, frozen=True, kw_only=True):
    """One variant. figures: by job, one number a round: tokens/s, and for LOAD seconds, for PEAK MB."""

    name: str
    version: str
    file_mb: float
    figures: dict[str, tuple[float, ...]]


class RuntimeBench(Struct, frozen=True, kw_only=True):
    """One model. jobs: in the order of columns, those of `Row.figures` that were asked for of all variants."""

    model: str
    threads: int
    jobs: tuple[str, ...]
    rows: tuple[Row, ...]
    absent: tuple[Absent, ...]

    def row(self, name: str) -> Row | None:
        """The row of a variant, if it was measured."""
        return next((row for row in self.rows if row.name == name), None)


def mass_cost(row: Row, prefill: str) -> Spread | None:
    """Time of a prefill with attention mass over that of the same one (a job's name) without, round by round."""
    without, found = row.figures.get(prefill), row.figures.get(MASS)
    if not without or not found:
        return None
    return Spread.of([one / two for one, two in zip(without, found, strict=True)])


def ratio(row: Row, reference: Row, job: str) -> Spread | None:
    """A variant's figure over the reference's, round by round; None where one of them lacks it.

    More is better for speeds, less for LOAD and PEAK.
    """
    own, other = row.figures.get(job), reference.figures.get(job)
    if not own or not other:
        return None
    return Spread.of([one / two for one, two in zip(own, other, strict=True)])
