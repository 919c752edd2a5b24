"""A token bucket, so that a link takes its share of the channel and no more."""

from __future__ import annotations

import asyncio

# A burst of this long is let through at once: shorter ones would be at the mercy of the timer's resolution.
BURST_S = 0.05


class Pacer:
    """Lets bytes through at rate_bps (bits per second); None lets everything through at once.

    Unused rate is saved up to the larger of BURST_S at the rate and one piece, so that a pause (an encoder that is
    slower than the link) is not followed by a burst of all that was saved. Raises ValueError if rate_bps is not > 0.
    """

    def __init__(self, rate_bps: float | None, piece_bytes: int) -> None:
        if rate_bps is not None and not rate_bps > 0:
            raise ValueError(f"rate_bps must be above 0, not {rate_bps}")
        self._bytes_per_s = rate_bps / 8 if rate_bps is not None else None
        self._burst_bytes = max(piece_bytes, BURST_S * self._bytes_per_s) if self._bytes_per_s is not None else 0.0
        self._saved_bytes = self._burst_bytes
        self._at_s: float | None = None

    def delay_s(self, size_bytes: int) -> float:
        """Take size_bytes; returns for how many seconds they are to be held back. Never blocks."""
        if self._bytes_per_s is None:
            return 0.0
        now_s = asyncio.get_running_loop().time()
        gained = (now_s - self._at_s) * self._bytes_per_s if self._at_s is not None else 0.0
        self._at_s = now_s
        self._saved_bytes = min(self._burst_bytes, self._saved_bytes + gained) - size_bytes
        return max(0.0, -self._saved_bytes / self._bytes_per_s)
