"""Moving averages of an agent's own speed."""

from __future__ import annotations

import msgspec

from broker_config.messages import Speed

WEIGHT = 0.4
"""Weight of a new measurement: fast enough to follow throttling, slow enough to ride out one slow run."""


class SpeedMeter:
    """Starts from a measured Speed; every piece of real work moves it."""

    def __init__(self) -> None:
        self.speed: Speed | None = None

    def begin(self, speed: Speed) -> Speed:
        self.speed = speed
        return speed

    def prefill(self, tokens: int, seconds: float) -> None:
        """A prefill of `tokens` took `seconds`: both terms of the linear model move by the same factor."""
        if self.speed is None or tokens < 1 or seconds <= 0:
            return
        predicted = self.speed.prefill_fixed_s + tokens / self.speed.prefill_tps
        factor = (seconds / predicted) ** WEIGHT
        self.speed = msgspec.structs.replace(
            self.speed,
            prefill_fixed_s=self.speed.prefill_fixed_s * factor,
            prefill_tps=self.speed.prefill_tps / factor,
        )

    def decode(self, seconds: float) -> None:
        """One token was generated in `seconds`."""
        self._move("decode_tps", 1, seconds)

    def encode(self, elements: int, seconds: float) -> None:
        """So many cache elements were coded in `seconds`."""
        self._move("encode_elements_per_s", elements, seconds)

    def decode_payload(self, elements: int, seconds: float) -> None:
        """So many cache elements were decoded in `seconds`."""
        self._move("decode_elements_per_s", elements, seconds)

    def _move(self, field: str, amount: int, seconds: float) -> None:
        if self.speed is None or amount < 1 or seconds <= 0:
            return
        old: float = getattr(self.speed, field)
        factor = (amount / seconds / old) ** WEIGHT
        self.speed = msgspec.structs.replace(self.speed, **{field: old * factor})
