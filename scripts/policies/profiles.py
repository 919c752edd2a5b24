"""Named speeds of devices, read from `profiles.toml`, where their sources stand."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

import msgspec
from msgspec import Struct

from broker_config.messages import CodecSpeed, Speed

FILE = Path(__file__).parent / "profiles.toml"


class Source(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where each speed comes from; "estimated" begins what was scaled from another device or model."""

    prefill: str
    decode: str
    coding: str


class Profile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device at SmolLM2-135M-Instruct. coding: by family of rungs, elements per second encoded and decoded."""

    title: str
    prefill_tps: float
    decode_tps: float
    coding: dict[str, tuple[float, float]]
    source: Source

    def speed(self, factor: float = 1.0) -> Speed:
        """As an agent would report it, all of it so many times as fast."""
        codecs = tuple(
            CodecSpeed(codec=family, encode_elements_per_s=encode * factor, decode_elements_per_s=decode * factor)
            for family, (encode, decode) in self.coding.items()
        )
        return Speed(
            prefill_fixed_s=0.0,
            prefill_tps=self.prefill_tps * factor,
            decode_tps=self.decode_tps * factor,
            encode_elements_per_s=min(each.encode_elements_per_s for each in codecs),
            decode_elements_per_s=min(each.decode_elements_per_s for each in codecs),
            codecs=codecs,
        )


@cache
def profiles() -> dict[str, Profile]:
    """All of the file, by name."""
    return msgspec.convert(tomllib.loads(FILE.read_text(encoding="utf-8")), dict[str, Profile])
