"""The ladders of all links as arrays: what a token's entries weigh and take at any choice of rungs, at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from broker_config.messages import Rung, Speed, codec_family
from coordinator.latency import EXACT_RUNG, Link, decode_s, encode_s
from coordinator.numbers import Floats, Ints, column


class Ladders:
    """Rungs by link and place, from the tightest on; a link without rungs has one that weighs nothing.

    top: (K,) the last place of each link; loss: (K, R) nats, of places beyond the last that of the last.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        ladders = {tuple(map(id, link.rungs)): link.rungs for link in links}
        places = {key: index for index, key in enumerate(ladders)}
        self._of_link: Ints = np.array([places[tuple(map(id, link.rungs))] for link in links], dtype=np.intp)
        width = max((len(rungs) for rungs in ladders.values()), default=1) or 1
        filled = [
            [rungs[min(i, len(rungs) - 1)] if rungs else None for i in range(width)] for rungs in ladders.values()
        ]
        self._names = [[rung.name if rung else "" for rung in row] for row in filled]
        self._bits = _table([[rung.bits_per_element if rung else 0.0 for rung in row] for row in filled], width)
        kl = _table([[rung.kl if rung else 0.0 for rung in row] for row in filled], width)
        families = sorted({codec_family(name) for row in self._names for name in row if name})
        self._families = np.array(
            [[families.index(codec_family(name)) if name else len(families) for name in row] for row in self._names],
            dtype=np.intp,
        ).reshape(-1, width)
        self.top: Ints = np.array([max(len(rungs) - 1, 0) for rungs in ladders.values()], dtype=np.intp)[self._of_link]
        self.loss = kl[self._of_link]
        self._examples = [_example(filled, family) for family in families]
        self._elements = column([link.elements_per_token for link in links])
        self._encode_s = self._per_element([link.sender_speed for link in links], encoding=True)
        self._decode_s = self._per_element([link.receiver_speed for link in links], encoding=False)
        self._kept = [
            (index, self._out_of_kept(index, link))
            for index, link in enumerate(links)
            if link.cached and link.kept is not None and link.kept != EXACT_RUNG
        ]

    def coded(self, places: Ints) -> tuple[Floats, Floats, Floats]:
        """(bits, encoding seconds, decoding seconds) of a token's entries, of the shape of places, (..., K)."""
        links = np.arange(places.shape[-1])
        family = self._families[self._of_link, places]
        encode = self._elements * self._encode_s[links, family]
        for index, takes_s in self._kept:
            encode[..., index] = takes_s[places[..., index]]
        bits = self._elements * self._bits[self._of_link, places]
        return bits, encode, self._elements * self._decode_s[links, family]

    def worthwhile(self) -> Ints:
        """(C, K): of each link the places than which no tighter one codes as fast, from the tightest on.

        Links with fewer of them than others have the tightest several times.
        """
        width = int(self.top.max(initial=0)) + 1
        every = np.arange(width)[:, None]
        _, encode, decode = self.coded(np.minimum(every, self.top))
        as_fast = (encode[:, None] <= encode) & (decode[:, None] <= decode)
        tighter = np.tri(width, k=-1, dtype=bool).T[:, :, None]
        worth = ~(as_fast & tighter).any(axis=0) & (every <= self.top)
        return np.sort(np.where(worth, every, 0), axis=0)[width - int(worth.sum(axis=0).max(initial=1)) :]

    def _out_of_kept(self, index: int, link: Link) -> Floats:
        """Seconds a token that encoding takes at each place of a link whose cache is kept coded, (R,)."""
        names = self._names[self._of_link[index]]
        return column(
            [encode_s(link.sender_speed, link.elements_per_token, name, link.kept) if name else 0.0 for name in names]
        )

    def _per_element(self, speeds: Sequence[Speed | None], *, encoding: bool) -> Floats:
        """Seconds an element by link and family, (K, families + 1); nothing for no rung at all."""
        takes, families = encode_s if encoding else decode_s, len(self._examples)
        places: dict[int, int] = {}
        rows: list[list[float]] = []
        for speed in speeds:
            if id(speed) in places:
                continue
            places[id(speed)] = len(rows)
            if speed is not None and speed.codecs:
                rows.append([takes(speed, MANY, name) / MANY for name in self._examples] + [0.0])
            else:
                rows.append([takes(speed, MANY) / MANY] * families + [0.0])
        return _table(rows, families + 1)[[places[id(speed)] for speed in speeds]]


MANY = 1 << 20


def _example(rows: Sequence[Sequence[Rung | None]], family: str) -> str:
    return next(rung.name for row in rows for rung in row if rung and codec_family(rung.name) == family)


def _table(rows: Sequence[Sequence[float]], width: int) -> Floats:
    return np.array(rows, dtype=np.float64).reshape(-1, width)
