"""Shares of the channels for given media: min-max E2E by bisection (methods, section 2; design, "Links and channels").

Airtime model: for every channel c, Σ_i rate_i / alone_ic ≤ free_c. For a fixed choice of media a round can end by T iff
each link arrives early enough. A receiver works serially, so its parts get deadlines: token parts first (their bits are
few and their work is much), then caches in the order in which they are ready; the k-th may arrive at T less the work
from k on, the questions, and half a round trip. With that,

    rate_i(T) = bits_i / (T - offset_i),    offset_i = ready + transfer overheads + receiver work from i on + question

T is feasible iff all rates exist and every channel holds them; the rates fall in T, so bisection finds the least T.
The airtime that is left when the tightest channel is full is then given out (`fill`), and the evaluator says what the
round takes: never more than T, and less where an earlier arrival lets the receiver start earlier.

Many choices of media are searched at once: `least` bisects on one T for all of them and drops what cannot keep up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.latency import (
    Decision,
    Prediction,
    Scenario,
    decode_s,
    encode_s,
    evaluate,
    ids_bits,
    prefill_s,
    question_s,
)

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

BISECTIONS = 60
ROUNDING = 1e-12
LONGEST_S = 1e9


@dataclass(frozen=True)
class Rows:
    """M choices of media for the K links. bits, offset_s: (M, K) float64."""

    bits: Floats
    offset_s: Floats

    def __getitem__(self, index: Flags | NDArray[np.intp]) -> Rows:
        return Rows(self.bits[index], self.offset_s[index])


@dataclass(frozen=True)
class Allocation:
    """One choice of media with its rates. within_s is the T that bisection guarantees, prediction what comes of it."""

    cache: Flags
    rungs: tuple[int, ...]
    decisions: tuple[Decision, ...]
    within_s: float
    bits: float
    prediction: Prediction


class Shares:
    """A scenario as arrays, for the questions a policy asks of it. cache: (M, K) bool, rungs: (K,) index per link."""

    def __init__(self, scenario: Scenario) -> None:
        links = scenario.links
        self.scenario = scenario
        self.may_cache: Flags = np.array([link.may_cache for link in links], dtype=bool)
        self._measured: Flags = np.array([link.measured for link in links], dtype=bool)
        elements = [link.tokens * link.elements_per_token for link in links]
        self._elements = np.array(elements, dtype=np.float64)
        self._header_bits = np.array([ids_bits(link, 0, scenario.header_bytes) for link in links])
        self._ids_bits = np.array([ids_bits(link, link.tokens, scenario.header_bytes) for link in links])
        self._order_s = np.array([link.sender_rtt_s / 2 for link in links])
        self._back_s = np.array([(link.sender_rtt_s + link.receiver_rtt_s) / 2 for link in links])
        self._sender_prefill_s = np.array(
            [0.0 if link.cached else prefill_s(link.sender_speed, link.tokens) for link in links]
        )
        self._prefill_s = np.array([prefill_s(link.receiver_speed, link.tokens) for link in links])
        self._senders_share = len({link.sender for link in links}) < len(links)
        self._before_at_sender = np.array(
            [[float(a.sender == b.sender and j <= i) for j, b in enumerate(links)] for i, a in enumerate(links)]
        ).T
        self._set_receivers()
        self._set_channels()

    def _set_receivers(self) -> None:
        """Blocks of links by receiver, and what follows the parts there: all questions of the receiver."""
        links = self.scenario.links
        names = sorted({link.receiver for link in links})
        self._receiver = np.array([names.index(link.receiver) for link in links], dtype=np.intp)
        blocks = np.sort(self._receiver)
        self._block_end = np.searchsorted(blocks, blocks, side="right")
        questions = dict.fromkeys(names, 0.0)
        for index, terms in enumerate(self.scenario.requests):
            if terms.receiver in questions:
                questions[terms.receiver] += question_s(self.scenario, index)
        self._after_s = np.array(
            [questions[link.receiver] + link.receiver_rtt_s / 2 + link.receiver_overhead_s for link in links]
        )

    def _set_channels(self) -> None:
        links = self.scenario.links
        names = sorted({name for link in links for name, _ in link.channels})
        self._free = np.array([self.scenario.airtime_free.get(name, 1.0) for name in names])
        self._airtime: Floats = np.zeros((len(links), len(names)))
        for index, link in enumerate(links):
            if link.measured:
                for name, alone_bps in link.channels:
                    self._airtime[index, names.index(name)] += 1 / alone_bps

    def tightest(self) -> tuple[int, ...]:
        """The tightest allowed rung of every link."""
        return (0,) * len(self.scenario.links)

    def rows(self, cache: Flags, rungs: tuple[int, ...]) -> Rows:
        """Bits and offsets of these choices of media."""
        width = np.array(
            [
                link.rungs[rung].bits_per_element if link.rungs else 0.0
                for link, rung in zip(self.scenario.links, rungs, strict=True)
            ]
        )
        bits = np.where(cache, self._header_bits + self._elements * width, self._ids_bits) * self._measured
        encode, decode = self._coding_s(rungs)
        sender_work = np.where(cache, self._sender_prefill_s + encode, 0.0)
        if self._senders_share:
            sender_work = np.where(cache, sender_work @ self._before_at_sender, 0.0)
        ready = self._order_s + sender_work
        work = np.where(cache, decode, self._prefill_s)
        receiver = np.broadcast_to(self._receiver, cache.shape)
        order = np.lexsort((ready, cache, receiver), axis=-1)
        upto = np.cumsum(np.take_along_axis(work, order, axis=-1), axis=-1)
        before = np.concatenate([np.zeros((len(cache), 1)), upto], axis=-1)
        tail = np.empty_like(work)
        np.put_along_axis(tail, order, before[:, self._block_end] - before[:, :-1], axis=-1)
        return Rows(bits, ready + self._back_s + tail + self._after_s)

    def _coding_s(self, rungs: tuple[int, ...]) -> tuple[Floats, Floats]:
        """Seconds of coding each link's whole cache at these rungs, at the sender and at the receiver, (K,) each."""
        coding = [
            (
                encode_s(link.sender_speed, size, name, link.kept if link.cached else None),
                decode_s(link.receiver_speed, size, name),
            )
            for link, size, name in (
                (link, link.tokens * link.elements_per_token, link.rungs[rung].name if link.rungs else None)
                for link, rung in zip(self.scenario.links, rungs, strict=True)
            )
        ]
        encode, decode = np.array(coding, dtype=np.float64).reshape(-1, 2).T
        return encode, decode

    def rates(self, rows: Rows, within_s: float, limits_s: Floats | None = None) -> tuple[Floats, Flags]:
        """The least rates (M, K) that end each row by within_s (each link also by its limit), and which rows may."""
        ends = within_s if limits_s is None else np.minimum(within_s, limits_s)
        gap = ends - rows.offset_s
        possible = np.all((gap > 0) | ((rows.bits == 0) & (gap >= 0)), axis=-1)
        rates = np.divide(rows.bits, gap, out=np.zeros_like(gap), where=gap > 0)
        return rates, possible & np.all(rates @ self._airtime <= self._free * (1 + ROUNDING), axis=-1)

    def least(
        self, rows: Rows, below_s: float = np.inf, limits_s: Floats | None = None
    ) -> tuple[NDArray[np.intp], float] | None:
        """The rows that can end earliest (several if they tie), and when. None if no row ends by below_s and limits."""
        low = float(rows.offset_s.max(axis=-1).min())
        high = float(self._upper_s(rows).min()) if below_s == np.inf else below_s
        feasible = self.rates(rows, high, limits_s)[1]
        if below_s == np.inf and limits_s is not None and self.rates(rows, np.inf, limits_s)[1].any():
            # What some links must have early, others wait for: longer than if nothing were limited.
            while not feasible.any() and high < LONGEST_S:
                high *= 2
                feasible = self.rates(rows, high, limits_s)[1]
        if not feasible.any():
            return None
        active = np.flatnonzero(feasible)
        rows = rows[active]
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if not low < middle < high:
                break
            feasible = self.rates(rows, middle, limits_s)[1]
            if feasible.any():
                high = middle
                if not feasible.all():
                    active, rows = active[feasible], rows[feasible]
            else:
                low = middle
        return active, high

    def _upper_s(self, rows: Rows) -> Floats:
        """A T at which each row is surely feasible: if every link had only the gap of the latest one."""
        gap = np.max(rows.bits @ self._airtime / self._free, axis=-1, initial=0.0)
        latest = rows.offset_s.max(axis=-1)
        return np.asarray(latest + gap + 1e-9 * (latest + gap), dtype=np.float64)

    def allocate(self, cache: Flags, rungs: tuple[int, ...] | None = None) -> Allocation:
        """Min-max rates for one choice of media, (K,) bool, with what they predict. Without rungs: the tightest."""
        rungs = self.tightest() if rungs is None else rungs
        unlimited = np.full(len(cache), np.inf)
        found = self.allocate_within(cache, rungs, unlimited)
        if found is None:
            raise ArithmeticError("no rates for an unlimited round: a figure of the scenario is not finite")
        return found

    def allocate_within(self, cache: Flags, rungs: tuple[int, ...], limits_s: Floats) -> Allocation | None:
        """The same, each link's receiver done by the link's limit (K,). None if that cannot be."""
        rows = self.rows(cache[None, :], rungs)
        found = self.least(rows, limits_s=limits_s)
        if found is None:
            return None
        within_s = found[1]
        rates = self.fill(self.rates(rows, within_s, limits_s)[0][0])
        decisions = tuple(
            Decision(
                own_tokens=0 if as_cache else link.tokens,
                rung=link.rungs[rung] if as_cache else None,
                rate_bps=float(rate),
            )
            for link, as_cache, rung, rate in zip(self.scenario.links, cache, rungs, rates, strict=True)
        )
        prediction = evaluate(self.scenario, decisions)
        return Allocation(cache, rungs, decisions, within_s, float(rows.bits.sum()), prediction)

    def fill(self, rates: Floats) -> Floats:
        """Gives out what is left: all rates grow alike, until a channel is full; then those that do not pass it."""
        rates = rates.copy()
        growing = rates > 0
        for _ in range(len(self._free)):
            moving = np.where(growing, rates, 0.0) @ self._airtime
            if not np.any(moving > 0):
                break
            left = np.maximum(self._free - rates @ self._airtime, 0.0)
            room = np.divide(left, moving, out=np.full_like(left, np.inf), where=moving > 0)
            rates[growing] *= 1 + room.min()
            growing &= ~np.any(self._airtime[:, room <= room.min() + ROUNDING] > 0, axis=-1)
        return rates
