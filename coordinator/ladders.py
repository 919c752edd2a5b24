"""The ladders of all links as arrays: what a token's entries weigh and take at any choice of rungs, at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from broker_config.messages import Rung, codec_family
from coordinator.columns import Columns, columns_of
from coordinator.latency import EXACT_RUNG, Link, encode_s
from coordinator.numbers import Floats, Ints, numbered

NOTHING = Rung(name="", bits_per_element=0.0, kl=0.0, agreement=1.0)
"""What stands for the rungs of a link that has none."""


class Ladders:
    """Rungs by link and place, from the tightest on; a link without rungs has one that weighs nothing.

    top: (K,) the last place of each link; loss: (K, R) nats, of places beyond the last that of the last.
    """

    def __init__(self, links: Sequence[Link], columns: Columns | None = None) -> None:
        columns = columns or columns_of(links)
        self._set_rungs(columns.rungs)
        encodes, decodes = columns.all_speeds.coding_s(self._family_names)
        families, elements = self._families[self._of_link], columns.elements_per_token[:, None]
        self._terms = np.empty((3, *families.shape))
        np.multiply(elements, self._bits[self._of_link], out=self._terms[0])
        for terms, of_speed, speed in (
            (self._terms[1], encodes, columns.sender_speed),
            (self._terms[2], decodes, columns.receiver_speed),
        ):
            np.multiply(elements, of_speed[speed[:, None], families], out=terms)
        if set(columns.kept) - {None, EXACT_RUNG}:
            for index, link in enumerate(links):
                if link.cached and link.kept not in {None, EXACT_RUNG}:
                    self._terms[1, index] = self._out_of_kept(index, link)
        self._starts = np.arange(len(links)) * families.shape[1]

    def _set_rungs(self, by_link: Sequence[tuple[Rung, ...]]) -> None:
        which, tuples = numbered(list(map(id, by_link)), by_link)
        same, ladders = numbered([tuple(map(id, rungs)) for rungs in tuples], tuples)
        self._of_link = same[which]
        width = max(map(len, ladders), default=1) or 1
        filled = [(*rungs, *(rungs[-1:] or (NOTHING,)) * (width - len(rungs))) for rungs in ladders]
        self._names = [[rung.name for rung in row] for row in filled]
        terms = np.array([[(rung.bits_per_element, rung.kl) for rung in row] for row in filled], dtype=np.float64)
        self._bits, kl = terms.reshape(-1, width, 2).transpose(2, 0, 1)
        family = {name: codec_family(name) for row in self._names for name in row if name}
        self._family_names = sorted(set(family.values()))
        places = {name: self._family_names.index(of) for name, of in family.items()} | {"": len(self._family_names)}
        rows = [[places[name] for name in row] for row in self._names]
        self._families: Ints = np.array(rows, dtype=np.intp).reshape(-1, width)
        self.top: Ints = np.array([max(len(rungs) - 1, 0) for rungs in ladders], dtype=np.intp)[self._of_link]
        self.loss = kl[self._of_link]

    def coded(self, places: Ints) -> tuple[Floats, Floats, Floats]:
        """(bits, encoding seconds, decoding seconds) of a token's entries, of the shape of places, (..., K)."""
        bits, encode, decode = np.take(self._terms.reshape(3, -1), self._starts + places, axis=1)
        return bits, encode, decode

    @cached_property
    def worthwhile(self) -> Ints:
        """(C, K): of each link the places than which no tighter one codes as fast, from the tightest on.

        Links with fewer of them than others have the tightest several times.
        """
        _, encode, decode = self._terms.transpose(0, 2, 1)
        width = encode.shape[0]
        every = np.arange(width)[:, None]
        as_fast = (encode[:, None] <= encode) & (decode[:, None] <= decode)
        tighter = np.tri(width, k=-1, dtype=bool).T[:, :, None]
        worth = ~(as_fast & tighter).any(axis=0) & (every <= self.top)
        return np.sort(np.where(worth, every, 0), axis=0)[width - int(worth.sum(axis=0).max(initial=1)) :]

    def _out_of_kept(self, index: int, link: Link) -> Floats:
        """Seconds a token that encoding takes at each place of a link whose cache is kept coded, (R,)."""
        names = self._names[self._of_link[index]]
        return np.array(
            [encode_s(link.sender_speed, link.elements_per_token, name, link.kept) if name else 0.0 for name in names]
        )
