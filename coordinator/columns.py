"""What links say, field by field: all that planning needs of them, taken in one pass over the objects."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from broker_config.messages import Rung, Speed
from coordinator.latency import Link
from coordinator.numbers import Flags, Floats, Ints, numbered

_NUMBERS = (
    "tokens",
    "elements_per_token",
    "bytes_per_token_id",
    "sender_rtt_s",
    "receiver_rtt_s",
    "receiver_overhead_s",
    "receiver_room_bytes",
    "cached",
    "generated",
    "request",
    "snr",
    "link_bps",
)
_OBJECTS = ("sender", "receiver", "channels", "rungs", "kept", "sender_speed", "receiver_speed")
_LINK_NUMBERS, _LINK_OBJECTS = attrgetter(*_NUMBERS), attrgetter(*_OBJECTS)
_SPEED = attrgetter(
    "prefill_tps",
    "decode_tps",
    "encode_elements_per_s",
    "decode_elements_per_s",
    "prefill_fixed_s",
    "prefill_s_per_token2",
)
_CODEC = attrgetter("encode_elements_per_s", "decode_elements_per_s")
_CODEC_NAME = attrgetter("codec")
_UNMEASURED = Speed(
    prefill_fixed_s=0.0, prefill_tps=0.0, decode_tps=0.0, encode_elements_per_s=0.0, decode_elements_per_s=0.0
)


class Speeds:
    """Seconds, (S,), of the distinct speeds of a scenario; 0 for what was not measured.

    prefill_s: (3, S) fixed, per token, per token²; generate_s: a token. usable: all is known that the model divides by.
    """

    def __init__(self, speeds: Sequence[Speed | None]) -> None:
        self._speeds = [_UNMEASURED if speed is None else speed for speed in speeds]
        terms = _rows(self._speeds, _SPEED, 6)
        known: Flags = terms[:4] > 0
        each_s = np.divide(1.0, terms[:4], out=np.zeros_like(terms[:4]), where=known)
        self.usable: Flags = known[0] & known[2] & known[3]
        self.prefill_s = np.array([terms[4], each_s[0], terms[5]]) * known[0]
        self.generate_s = each_s[1] * known[0]
        self._coding_s = each_s[2:]

    def coding_s(self, families: Sequence[str]) -> tuple[Floats, Floats]:
        """Seconds to encode and to decode an element of each family's rungs, (S, families + 1); 0 in the last column.

        A family that was not measured by itself takes what the speed says of all; if it was twice, the first counts.
        """
        found = np.repeat(self._coding_s[:, :, None], len(families) + 1, axis=2)
        by_speed = [speed.codecs for speed in self._speeds]
        codecs = list(chain.from_iterable(by_speed))
        if codecs:
            per_s = _rows(codecs, _CODEC, 2)
            known: Flags = np.all(per_s > 0, axis=0)
            rows = np.repeat(np.arange(len(by_speed)), list(map(len, by_speed)))
            places = {family: place for place, family in enumerate(families)}
            of_codec = map(places.get, map(_CODEC_NAME, codecs), repeat(len(families)))
            columns = np.fromiter(of_codec, dtype=np.intp, count=len(codecs))
            columns[~known] = len(families)
            each_s = np.divide(1.0, per_s, out=np.zeros_like(per_s), where=known)
            found[:, rows[::-1], columns[::-1]] = each_s[:, ::-1]
        found[:, :, -1] = 0.0
        return found[0], found[1]


class Columns(NamedTuple):
    """Fields of K links, named as in `Link`: float64 (K,), others one a link; speeds as places (K,) in all_speeds."""

    tokens: Floats
    elements_per_token: Floats
    bytes_per_token_id: Floats
    sender_rtt_s: Floats
    receiver_rtt_s: Floats
    receiver_overhead_s: Floats
    receiver_room_bytes: Floats
    cached: Floats
    generated: Floats
    request: Floats
    snr: Floats
    link_bps: Floats
    sender: list[str]
    receiver: list[str]
    channels: list[tuple[tuple[str, float], ...]]
    rungs: list[tuple[Rung, ...]]
    kept: list[str | None]
    sender_speed: Ints
    receiver_speed: Ints
    all_speeds: Speeds


def columns_of(links: Sequence[Link]) -> Columns:
    """Of all links."""
    objects = list(chain.from_iterable(map(_LINK_OBJECTS, links)))
    by_field: dict[str, Any] = {name: objects[place :: len(_OBJECTS)] for place, name in enumerate(_OBJECTS)}
    speeds = by_field.pop("sender_speed") + by_field.pop("receiver_speed")
    places, distinct = numbered(list(map(id, speeds)), speeds)
    sent, received = places[: len(links)], places[len(links) :]
    numbers = dict(zip(_NUMBERS, _rows(links, _LINK_NUMBERS, len(_NUMBERS)), strict=True))
    return Columns(**numbers, **by_field, sender_speed=sent, receiver_speed=received, all_speeds=Speeds(distinct))


def _rows(things: Sequence[object], fields: attrgetter[tuple[float, ...]], count: int) -> Floats:
    """So many fields that are numbers, (count, N)."""
    found = np.fromiter(chain.from_iterable(map(fields, things)), dtype=np.float64, count=count * len(things))
    return np.ascontiguousarray(found.reshape(-1, count).T)
