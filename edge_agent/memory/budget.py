"""How much memory caches may take just now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import psutil

from edge_agent.pressure import stalled_share


@dataclass(frozen=True)
class System:
    """Memory of the device: what is available, and the share of the last 10 s in which some task waited for it."""

    available_bytes: int
    stalled_share: float | None = None

    @classmethod
    def now(cls) -> System:
        return cls(psutil.virtual_memory().available, stalled_share())


@dataclass(frozen=True, kw_only=True)
class Budget:
    """limit_bytes: never more. share: of what would be available without any cache. high, low: watermarks, as shares of
    the budget: above the first, caches are made smaller until they are below the second.

    While tasks wait for memory, the budget shrinks by the share of time in which they do.
    """

    limit_bytes: int
    share: float = 1.0
    high: float = 0.8
    low: float = 0.6
    system: Callable[[], System] = System.now

    def __post_init__(self) -> None:
        if self.limit_bytes < 0 or not 0 < self.share <= 1 or not 0 < self.low <= self.high <= 1:
            raise ValueError(f"no budget: {self.limit_bytes} bytes, share {self.share}, marks {self.low}, {self.high}")

    def bytes_now(self, held_bytes: int) -> int:
        """The budget while caches take held_bytes. What they give back is available, so it does not move with them."""
        system = self.system()
        free = int(self.share * (system.available_bytes + held_bytes))
        return int(min(self.limit_bytes, free) * (1 - (system.stalled_share or 0.0)))
