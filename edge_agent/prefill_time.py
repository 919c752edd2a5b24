"""Seconds of a prefill by its length, learned from prefills.

n tokens behind m take fixed + n·per_token + (n² + 2·n·m)·per_token2 seconds. The three are followed by an extended
Kalman filter on their logarithms: they stay positive, a figure is moved by as much as it counts in what was measured,
and what all have in common (a device that throttles) is believed to change sooner than what sets them apart, so that
where the data can't tell them apart they move by one factor.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edge_agent.surprise import LIMIT, Surprise

Floats = NDArray[np.float64]

NOISE = 0.12
"""Relative scatter of one measurement, where other work shares the machine."""
JITTER_S, MOST_JITTER = 0.005, 0.3
"""What comes to it for a short one: so many seconds, in relation to what it takes."""
COMMON, COMMON_DRIFT = 0.15, 0.07
"""How wrong the figures may be by one factor: at the start, and more with every measurement."""
APART: Floats = np.array([1.0, 0.2, 1.0])
"""The same for each by itself; a start tells the second best."""
APART_DRIFT = 0.05
LEAST_FIXED_TOKENS, LEAST_AT_TOKENS, LEAST_SHARE = 3.0, 1_000, 0.02
"""No figure counts as nothing, or it could not grow: fixed is three tokens' time at least, and the squared term 2 % of
a prefill of a thousand tokens."""
_SMALLEST, _LARGEST = math.log(1e-13), math.log(1e6)


class PrefillTime:
    """Starts from three figures in seconds: of a call, per token, per token squared."""

    def __init__(self, fixed_s: float, per_token_s: float, per_token2_s: float) -> None:
        per_token_s = min(max(per_token_s, 1e-12), 1e6)
        least = (LEAST_FIXED_TOKENS * per_token_s, per_token_s, LEAST_SHARE * per_token_s / LEAST_AT_TOKENS)
        start = np.maximum((fixed_s, per_token_s, per_token2_s), least)
        self._logs: Floats = np.clip(np.log(start), _SMALLEST, _LARGEST)
        self._spread: Floats = COMMON**2 + np.diag(APART**2)
        self._surprise = Surprise(counts=LIMIT / 2)

    @property
    def terms(self) -> tuple[float, float, float]:
        """fixed, per token, per token squared, in seconds; all above 0."""
        fixed, per_token, per_token2 = np.exp(self._logs)
        return float(fixed), float(per_token), float(per_token2)

    def seconds(self, tokens: int, behind: int = 0) -> float:
        """What is expected."""
        return float(_amounts(tokens, behind) @ np.exp(self._logs))

    def measured(self, tokens: int, behind: int, seconds: float) -> None:
        """A prefill of so many tokens behind so many took so long."""
        parts = _amounts(tokens, behind) * np.exp(self._logs)
        expected = float(parts.sum())
        jump, error = self._surprise.split(math.log(seconds / expected))
        counts = parts / expected
        self._spread = _bounded(self._spread + COMMON_DRIFT**2 + np.diag((APART_DRIFT * APART) ** 2))
        seen = self._spread @ counts
        noise = NOISE**2 + min(JITTER_S / expected, MOST_JITTER) ** 2
        gain = seen / (counts @ seen + noise)
        self._logs = np.clip(self._logs + jump + gain * error, _SMALLEST, _LARGEST)
        self._spread = self._spread - np.outer(gain, seen)
        self._spread = (self._spread + self._spread.T) / 2


def _amounts(tokens: int, behind: int) -> Floats:
    return np.array([1.0, tokens, tokens * (tokens + 2.0 * max(0, behind))])


def _bounded(spread: Floats) -> Floats:
    """No figure is less certain than at the start, however long nothing was heard of it."""
    limit = COMMON**2 + APART**2
    scale = np.sqrt(np.minimum(1.0, limit / np.diag(spread)))
    return np.asarray(spread * np.outer(scale, scale), dtype=np.float64)
