"""How fast a transfer brings tokens, and how many it pays to compute meanwhile. Pure; times are passed in."""

from __future__ import annotations

from collections import deque

REMEMBERED = 8
"""So many arrivals back the rate goes: it follows a link that changes, and one late chunk does not turn it."""

LATE = 2.0
"""What has not come after so many times its usual time is late."""


class Arrivals:
    """The tokens of one transfer as they come. began_s: when the first could have come."""

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s
        self._came: deque[tuple[float, int]] = deque(maxlen=REMEMBERED)

    def came(self, tokens: int, now_s: float) -> None:
        """So many tokens are there."""
        self._came.append((now_s, tokens))

    @property
    def any(self) -> bool:
        """Whether anything has come."""
        return bool(self._came)

    @property
    def shown(self) -> bool:
        """Whether the rate is known: up to the first arrival there is also what the sender did before."""
        return len(self._came) > 1

    @property
    def last_s(self) -> float:
        """When something came last, or could have come."""
        return self._came[-1][0] if self._came else self._began_s

    def tps(self, now_s: float) -> float:
        """Tokens per second over the last arrivals; less and less once nothing comes where something should."""
        if not self._came:
            return 0.0
        last_s, tokens = self._came[-1]
        return min(self._measured(), tokens / max(1e-9, now_s - last_s))

    def late_s(self) -> float:
        """The time after which what comes next is late."""
        if not self._came:
            return self._began_s
        return self.last_s + LATE * self._came[-1][1] / self._measured()

    def _measured(self) -> float:
        first_s, _ = self._came[0]
        last_s, tokens = self._came[-1]
        if len(self._came) == 1:
            return tokens / max(1e-9, last_s - self._began_s)
        return (sum(each for _, each in self._came) - self._came[0][1]) / max(1e-9, last_s - first_s)


def worth_computing(gap: int, *, come_tps: float, own_tps: float) -> float:
    """How many of the next tokens are worth computing, where `gap` lack before the first that is there.

    While c tokens are computed, c·come_tps/own_tps come from the other end of the gap: c and these must fit into it.
    """
    return gap / (1 + come_tps / own_tps)
