"""What is done next when caches take too much memory. Pure; and giving freed memory back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Item:
    """A cache in memory, at a rung. kept: it is on disk at that rung, too."""

    context_id: str
    rung: str
    kept: bool = False


@dataclass(frozen=True)
class Step:
    """rung: to which a cache is tightened. Without: it leaves memory, written to disk first if to_disk."""

    context_id: str
    rung: str | None = None
    to_disk: bool = False


def next_step(items: Sequence[Item], tighter: Callable[[str], str | None], *, disk: bool) -> Step | None:
    """The next step, of caches from the longest unused to the last used; None if there is nothing to be done.

    tighter: the rung that follows one, or None. All are tightened before any leaves.
    """
    for item in items:
        rung = tighter(item.rung)
        if rung is not None:
            return Step(item.context_id, rung)
    if not items:
        return None
    return Step(items[0].context_id, to_disk=disk and not items[0].kept)


def trim() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (glibc)."""
    found = _malloc_trim()
    if found is not None:
        found(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library
        return None
    return found
