"""Arrays by their short names."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Flags = NDArray[np.bool_]

Thing = TypeVar("Thing")


def column(values: Sequence[float]) -> Floats:
    """One number for each link, or channel, or request."""
    return np.array(values, dtype=np.float64)


def numbered(keys: Sequence[Hashable], things: Sequence[Thing]) -> tuple[Ints, list[Thing]]:
    """Which of the distinct keys each is, (K,), and the thing of each of these, as they first come."""
    distinct = dict(zip(keys, things, strict=True))
    numbers = dict(zip(distinct, range(len(distinct)), strict=True))
    return np.fromiter(map(numbers.__getitem__, keys), dtype=np.intp, count=len(keys)), list(distinct.values())


def begins(values: Ints) -> Flags:
    """Where a value differs from the one before it, (N,) bool; the first does."""
    found = np.empty(len(values), dtype=bool)
    found[:1] = True
    np.not_equal(values[1:], values[:-1], out=found[1:])
    return found
