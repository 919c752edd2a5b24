"""The token bucket that gives a channel its rate and shares it fairly."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque

_BITS = 8

QUANTUM_S = 0.004
"""One turn is this long, so a small message waits for one turn of each other connection and no more."""

SMALLEST_QUANTUM_BYTES = 1_500
LARGEST_QUANTUM_BYTES = 65_536

BURST_S = 0.01
"""What an idle channel may save up."""

LATE_S = 0.25
"""What a busy channel may catch up: a timer that fires late is the emulator's fault, not the link's."""


class Bucket:
    """A rate in bits per second, shared in turns by everyone who calls `take`.

    The rate can be changed at any moment and is in force at once, for those who already wait too. 0 is an outage:
    nothing passes until it changes. Turns are first come, first served, one quantum each: connections that always have
    more to send go round-robin. Belongs to one event loop.
    """

    def __init__(self, rate_bps: float) -> None:
        """Raises ValueError if the rate is negative or not finite."""
        self._rate_bps = _checked(rate_bps)
        self._credit_bits = _burst_bits(rate_bps)
        self._updated_s = time.monotonic()
        self._granted_s = -math.inf
        self._unyielded_bytes = 0
        self._queue: deque[tuple[asyncio.Future[int], int]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def rate_bps(self) -> float:
        """The rate now."""
        return self._rate_bps

    @property
    def quantum_bytes(self) -> int:
        """The most that one turn grants at the rate of now."""
        return _quantum_bytes(self._rate_bps)

    def set_rate(self, rate_bps: float) -> None:
        """Change the rate. Raises ValueError if it is negative or not finite."""
        rate_bps = _checked(rate_bps)
        self._accrue()
        self._rate_bps = rate_bps
        self._credit_bits = min(self._credit_bits, _burst_bits(rate_bps))
        self._serve()

    async def take(self, wanted_bytes: int) -> int:
        """Wait for a turn; return how many bytes may pass now: at least 1, at most wanted_bytes and one quantum."""
        if wanted_bytes < 1:
            raise ValueError(f"a turn is for at least 1 byte, not {wanted_bytes}")
        if not self._queue:
            self._accrue()
            granted = self._grant(wanted_bytes)
            if granted:
                await self._let_others_come(granted)
                return granted
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._queue.append((turn, wanted_bytes))
        if len(self._queue) == 1:
            self._serve()
        try:
            return await turn
        except asyncio.CancelledError:
            self._serve()
            raise

    async def _let_others_come(self, granted: int) -> None:
        """Yield after each quantum, or one connection spends all the credit before another has asked for its turn."""
        self._unyielded_bytes += granted
        if self._unyielded_bytes >= self.quantum_bytes:
            self._unyielded_bytes = 0
            await asyncio.sleep(0)

    def _serve(self) -> None:
        """Give turns as far as the credit goes, then come back when it suffices for the next."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._accrue()
        while self._queue:
            turn, wanted_bytes = self._queue[0]
            granted = 0 if turn.done() else self._grant(wanted_bytes)
            if granted:
                turn.set_result(granted)
            elif not turn.done():
                self._come_back(wanted_bytes)
                return
            self._queue.popleft()

    def _grant(self, wanted_bytes: int) -> int:
        """Spend credit on one turn; 0 if there is not enough."""
        granted = min(wanted_bytes, self.quantum_bytes)
        if self._rate_bps == 0 or self._credit_bits < (granted - 1) * _BITS:
            return 0
        self._credit_bits -= granted * _BITS
        self._granted_s = self._updated_s
        return granted

    def _come_back(self, wanted_bytes: int) -> None:
        if self._rate_bps == 0:
            return
        missing_bits = min(wanted_bytes, self.quantum_bytes) * _BITS - self._credit_bits
        self._timer = asyncio.get_running_loop().call_later(missing_bits / self._rate_bps, self._serve)

    def _accrue(self) -> None:
        """Earn credit for the time since the last call, up to what a busy or an idle channel may hold."""
        now_s = time.monotonic()
        most_bits = _burst_bits(self._rate_bps)
        if self._queue:
            most_bits = max(most_bits, self._rate_bps * LATE_S)
        elif now_s - self._granted_s <= BURST_S:
            most_bits = max(most_bits, self._credit_bits)
        self._credit_bits = min(self._credit_bits + (now_s - self._updated_s) * self._rate_bps, most_bits)
        self._updated_s = now_s


def _checked(rate_bps: float) -> float:
    if not math.isfinite(rate_bps) or rate_bps < 0:
        raise ValueError(f"a rate is a number of bits per second, 0 or more, not {rate_bps}")
    return rate_bps


def _quantum_bytes(rate_bps: float) -> int:
    return int(min(max(rate_bps * QUANTUM_S / _BITS, SMALLEST_QUANTUM_BYTES), LARGEST_QUANTUM_BYTES))


def _burst_bits(rate_bps: float) -> float:
    return max(rate_bps * BURST_S, _quantum_bytes(rate_bps) * _BITS)
