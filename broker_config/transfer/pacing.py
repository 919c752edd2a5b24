"""A token bucket, so that a link takes its share of the channel and no more."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence

from broker_config.messages import RateStep

# A burst of this long is let through at once: shorter ones would be at the mercy of the timer's resolution.
BURST_S = 0.05


class Pacer:
    """Lets bytes through at rate_bps (bits per second); None lets everything through at once.

    later_rates: what the rate is from so many seconds on, counted from began_s on the loop's clock (without: from now).
    Unused rate is saved up to the larger of BURST_S at the rate and one piece, so that a pause (an encoder that is
    slower than the link) is not followed by a burst of all that was saved. Raises ValueError if a rate is not > 0.
    """

    def __init__(
        self,
        rate_bps: float | None,
        piece_bytes: int,
        later_rates: Sequence[RateStep] = (),
        *,
        began_s: float | None = None,
    ) -> None:
        self._piece_bytes = piece_bytes
        self._at_s: float | None = None
        self._steps: list[tuple[float, float | None]] = []
        self._plan(rate_bps, later_rates, began_s)
        self._saved_bytes = self._burst_bytes(self._steps[0][1])
        self.changed = asyncio.Event()

    def change(self, rate_bps: float | None, later_rates: Sequence[RateStep] = ()) -> None:
        """Other rates from now on; what was said of later ones is void. `changed` is set. Raises ValueError."""
        now_s = asyncio.get_running_loop().time()
        self._settle(now_s)
        self._plan(rate_bps, later_rates, now_s)
        self.changed.set()

    def rate_bps(self) -> float | None:
        """The rate just now."""
        _, bytes_per_s = next(self._segments(asyncio.get_running_loop().time()))
        return None if bytes_per_s is None else 8 * bytes_per_s

    def delay_s(self, size_bytes: int) -> float:
        """Take size_bytes; returns for how many seconds they are to be held back. Never blocks."""
        if self._steps == [(-math.inf, None)]:
            return 0.0
        self._settle(asyncio.get_running_loop().time())
        self._saved_bytes -= size_bytes
        return self.wait_s()

    def wait_s(self) -> float:
        """For how many seconds what was taken is still to be held back."""
        if self._steps == [(-math.inf, None)]:
            return 0.0
        now_s = at_s = asyncio.get_running_loop().time()
        self._settle(now_s)
        owed_bytes = -self._saved_bytes
        for until_s, bytes_per_s in self._segments(now_s):
            if owed_bytes <= 0 or bytes_per_s is None:
                break
            paid_s = at_s + owed_bytes / bytes_per_s
            if paid_s <= until_s:
                at_s = paid_s
                break
            owed_bytes -= (until_s - at_s) * bytes_per_s
            at_s = until_s
        return at_s - now_s

    def _plan(self, rate_bps: float | None, later_rates: Sequence[RateStep], began_s: float | None) -> None:
        rates = [rate_bps, *(step.rate_bps for step in later_rates)]
        for rate in rates:
            if rate is not None and not rate > 0:
                raise ValueError(f"rate_bps must be above 0, not {rate}")
        if later_rates and began_s is None:
            began_s = asyncio.get_running_loop().time()
        later = sorted((step.after_s, step.rate_bps / 8) for step in later_rates)
        self._steps = [(-math.inf, None if rate_bps is None else rate_bps / 8)]
        self._steps += [((began_s or 0.0) + after_s, bytes_per_s) for after_s, bytes_per_s in later]

    def _segments(self, from_s: float) -> Iterator[tuple[float, float | None]]:
        """(until, bytes per second) from a time on."""
        ends = [*(start_s for start_s, _ in self._steps[1:]), math.inf]
        for (_, bytes_per_s), until_s in zip(self._steps, ends, strict=True):
            if until_s > from_s:
                yield until_s, bytes_per_s

    def _settle(self, now_s: float) -> None:
        """Save what was not used up to now."""
        at_s, self._at_s = now_s if self._at_s is None else self._at_s, now_s
        for until_s, bytes_per_s in self._segments(at_s):
            if at_s >= now_s:
                return
            span_s = min(until_s, now_s) - at_s
            gained = math.inf if bytes_per_s is None else span_s * bytes_per_s
            self._saved_bytes = min(self._burst_bytes(bytes_per_s), self._saved_bytes + gained)
            at_s += span_s

    def _burst_bytes(self, bytes_per_s: float | None) -> float:
        return 0.0 if bytes_per_s is None else max(self._piece_bytes, BURST_S * bytes_per_s)
