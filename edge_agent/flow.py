"""A transfer under way, seen from one end: how much has moved, and how fast when only the network holds it back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile

WINDOW_S = 0.5
LEAST_WINDOW_S = 0.4
LONGEST_WINDOW_S = 3.0
LEAST_SAMPLES = 6
"""Where so few reports came within WINDOW_S, those of a longer time are taken."""
LEAST_INTERVALS = 3
"""Between reports, or LONGEST_WINDOW_S: of fewer, chunks of others that came between change the rate by half."""
BACKLOG_BYTES, BACKLOG_CHUNKS = 192 * 1024, 3
"""So much that was made and has not arrived, whichever is less, keeps a link busy; or it may wait for the encoder."""
KEEPS_PACE = 0.8
"""A transfer this near to its pace is held back by that, not by the link."""

Sample = tuple[float, int, bool]
"""When, how much had moved by then, and whether more was there to be sent."""


class Flow:
    """One direction of one transfer, in chunks of so many bytes. pace: asked for its share now (None: unpaced).

    Whoever sends says what was `made`, and when that is all; both ends say what has `moved`, as a running total.
    """

    def __init__(
        self,
        transfer: str = "",
        *,
        chunk_bytes: int = BACKLOG_BYTES,
        pace: Callable[[], float | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.transfer, self._pace, self._clock = transfer, pace, clock
        self._backlog_bytes = min(BACKLOG_BYTES, BACKLOG_CHUNKS * chunk_bytes)
        self.moved_bytes = 0
        self._made_bytes = 0
        self._all_made = False
        self._samples: deque[Sample] = deque()

    def made(self, total_bytes: int, *, all_of_it: bool = False) -> None:
        """So much of the payload was handed over to be sent."""
        self._made_bytes = max(self._made_bytes, total_bytes)
        self._all_made = self._all_made or all_of_it

    def moved(self, total_bytes: int) -> None:
        """So much of it has arrived."""
        now_s = self._clock()
        self.moved_bytes = max(self.moved_bytes, total_bytes)
        self._samples.append((now_s, self.moved_bytes, self._busy))
        while len(self._samples) > LEAST_SAMPLES and (
            self._samples[1][0] < now_s - WINDOW_S or self._samples[0][0] < now_s - LONGEST_WINDOW_S
        ):
            self._samples.popleft()

    def repaced(self) -> None:
        """It has another pace from now on: how fast it was before says nothing of that."""
        self._samples.clear()

    @property
    def pace_bps(self) -> float | None:
        """Its share now; None: unpaced."""
        return self._pace()

    @property
    def rate_bps(self) -> float | None:
        """At which it moved in the last half second, whatever held it back; None while it rests on too little.

        Silence counts once it is longer than twice the usual time between two reports.
        """
        return _rate_bps(tuple(self._samples), self._clock())

    @property
    def goodput_bps(self) -> float | None:
        """The same of the time since when more was always there to be sent; None if the link may have waited."""
        busy = tuple(reversed(tuple(takewhile(lambda sample: sample[2], reversed(self._samples)))))
        return _rate_bps(busy, self._clock()) if self._busy else None

    @property
    def link_bps(self) -> float | None:
        """The rate of the link, as far as a transfer tells: not if it was paced and kept its pace."""
        goodput_bps, pace_bps = self.goodput_bps, self.pace_bps
        kept = goodput_bps is not None and pace_bps is not None and goodput_bps >= KEEPS_PACE * pace_bps
        return None if kept else goodput_bps

    @property
    def _busy(self) -> bool:
        return self._all_made or self._made_bytes - self.moved_bytes >= self._backlog_bytes


def _rate_bps(samples: Sequence[Sample], now_s: float) -> float | None:
    if len(samples) < 2:
        return None
    (first_s, first_bytes, _), (last_s, last_bytes, _) = samples[0], samples[-1]
    usual_s = (last_s - first_s) / (len(samples) - 1)
    until_s = now_s if now_s - last_s > max(2 * usual_s, WINDOW_S / 5) else last_s
    if until_s - first_s < (LONGEST_WINDOW_S if len(samples) <= LEAST_INTERVALS else LEAST_WINDOW_S):
        return None
    return 8 * (last_bytes - first_bytes) / (until_s - first_s)
