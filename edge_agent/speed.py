"""An agent's own speed: measured at the start, moved by every piece of real work."""

from __future__ import annotations

import math

import msgspec

from broker_config.messages import CodecSpeed, Speed, codec_family
from edge_agent.prefill_time import PrefillTime
from edge_agent.surprise import Surprise

WEIGHT = 0.4
"""Weight of a new measurement: fast enough to follow throttling, slow enough to ride out one slow run."""
SLOWEST, FASTEST = 1e-9, 1e15
FAMILIES_KEPT = 16
CODINGS_BELIEVED = 3
"""The parts of one question are coded at the same time and slow each other: two odd ones may be one event."""


class Rate:
    """Something per second, as a moving average of logarithms."""

    def __init__(self, value: float, *, believed: int = 2) -> None:
        self.value = min(max(value, SLOWEST), FASTEST)
        self._surprise = Surprise(believed=believed)

    def measured(self, amount: float, seconds: float) -> None:
        """So much took so long."""
        jump, error = self._surprise.split(math.log(amount / seconds / self.value))
        self.value = min(max(self.value * math.exp(jump + WEIGHT * error), SLOWEST), FASTEST)


class Coding:
    """Elements per second, encoded and decoded, of one family of rungs."""

    def __init__(self, encode_elements_per_s: float, decode_elements_per_s: float) -> None:
        self.encode = Rate(encode_elements_per_s, believed=CODINGS_BELIEVED)
        self.decode = Rate(decode_elements_per_s, believed=CODINGS_BELIEVED)


class SpeedMeter:
    """Starts from a measured Speed; every piece of real work moves it."""

    def __init__(self) -> None:
        self.speed: Speed | None = None

    def begin(self, speed: Speed) -> Speed:
        """From now on this is the speed."""
        self._prefill = PrefillTime(speed.prefill_fixed_s, 1 / speed.prefill_tps, speed.prefill_s_per_token2)
        self._decode = Rate(speed.decode_tps)
        self._other = Coding(speed.encode_elements_per_s, speed.decode_elements_per_s)
        self._families = {
            each.codec: Coding(each.encode_elements_per_s, each.decode_elements_per_s) for each in speed.codecs
        }
        self.speed = speed
        return speed

    def prefill(self, tokens: int, seconds: float, *, behind: int = 0) -> None:
        """A prefill of `tokens` behind so many others (the prompt's prefix not counted) took `seconds`."""
        if self.speed is None or tokens < 1 or not _is_duration(seconds):
            return
        self._prefill.measured(tokens, behind, seconds)
        fixed_s, per_token_s, per_token2_s = self._prefill.terms
        self.speed = msgspec.structs.replace(
            self.speed, prefill_fixed_s=fixed_s, prefill_tps=1 / per_token_s, prefill_s_per_token2=per_token2_s
        )

    def decode(self, seconds: float) -> None:
        """One token was generated in `seconds`."""
        if self.speed is not None and _is_duration(seconds):
            self._decode.measured(1, seconds)
            self.speed = msgspec.structs.replace(self.speed, decode_tps=self._decode.value)

    def encode(self, elements: int, seconds: float, rung: str | None = None) -> None:
        """So many cache elements were coded in `seconds`, at this rung."""
        self._coded(elements, seconds, rung, encoded=True)

    def decode_payload(self, elements: int, seconds: float, rung: str | None = None) -> None:
        """So many cache elements were decoded in `seconds`, from this rung."""
        self._coded(elements, seconds, rung, encoded=False)

    def _coded(self, elements: int, seconds: float, rung: str | None, *, encoded: bool) -> None:
        if self.speed is None or elements < 1 or not _is_duration(seconds):
            return
        coding = self._other if rung is None else self._family(codec_family(rung))
        (coding.encode if encoded else coding.decode).measured(elements, seconds)
        self.speed = msgspec.structs.replace(
            self.speed,
            encode_elements_per_s=self._other.encode.value,
            decode_elements_per_s=self._other.decode.value,
            codecs=tuple(
                CodecSpeed(codec=name, encode_elements_per_s=of.encode.value, decode_elements_per_s=of.decode.value)
                for name, of in self._families.items()
            ),
        )

    def _family(self, name: str) -> Coding:
        """The figures of a family; one that is new starts from those of all others."""
        if name not in self._families and len(self._families) < FAMILIES_KEPT:
            self._families[name] = Coding(self._other.encode.value, self._other.decode.value)
        return self._families.get(name, self._other)


def _is_duration(seconds: float) -> bool:
    return 0 < seconds < math.inf
