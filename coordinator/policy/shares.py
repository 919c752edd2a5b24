"""Shares of the channels for given splits: min-max E2E (methods, section 2; design, "Links and channels").

For a choice of how many tokens each receiver prefills itself, a round can end by T iff each link's bits arrive early
enough. That is up to five demands on a link's rate, each of so many bits between some moment and T:

    all     all slices, from when the sender has made the first
    whole   ids and slices, from the order on
    last    a slice, from when the sender has made the last one
    first   a slice, from when the first is made, early enough for the receiver to decode all that comes
    ids     the ids, early enough for the receiver to prefill its tokens, and all else that it has to do

    rate_i(T) = max over demands of bits / (T - offset),   offset = moment + ways + what the receiver does after it

T is feasible iff all rates exist and every channel holds them. What a channel must carry falls in T, and convexly; its
inverse is concave where shares are of time (airtime). So Newton's steps from below never pass the least T, and a few
reach it (`Shares.ends`), for many choices at once; those that cannot keep up are dropped on the way.
The capacity that is left when the tightest channel is full is then given out (`fill`), and the evaluator says what the
round takes: less than T where an earlier arrival lets the receiver start earlier.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from coordinator.latency import Decision, Prediction, Scenario
from coordinator.numbers import Flags, Floats, Ints
from coordinator.table import WHOLE, Table
from coordinator.timeline import Course, Timeline, predicted, timeline

GROWTHS = 40
NEWTON_STEPS = 100
"""Airtime takes about four, a band (fdma) ten."""
ROUNDING = 1e-12
LAST_BIT = 4e-16
LONGEST_S = 1e12
MANY_LINKS = 200
NO_RATES = "no rates for an unlimited round: a figure of the scenario is not finite"
MOST_GROWTH = 1e6
"""Of a rate, when a channel is given out."""


@dataclass(frozen=True)
class Rows:
    """M choices for the K links. bits, offset_s: (5, M, K) float64, by demand; one without bits only needs its time.

    held: (M,) bool, which of them the receivers' memories hold.
    """

    bits: Floats
    offset_s: Floats
    held: Flags

    def __getitem__(self, index: Flags | Ints | slice) -> Rows:
        return Rows(self.bits[:, index], self.offset_s[:, index], self.held[index])

    def needed(self, ends_s: Floats | float) -> tuple[Floats, Flags]:
        """The least rates that end links by these times, and which links none does, (M, K)."""
        gap = ends_s - self.offset_s
        rates = np.divide(self.bits, gap, out=np.zeros_like(gap), where=gap > 0).max(axis=0)
        return rates, ~np.all((gap > 0) | ((self.bits == 0) & (gap >= 0)), axis=0)

    def falling(self, ends_s: Floats) -> tuple[Floats, Floats]:
        """The same rates, for times after all offsets, and by which fraction a second they fall, (M, K) each."""
        gap = ends_s - self.offset_s
        wanted = np.divide(self.bits, gap, out=np.zeros_like(gap), where=gap > 0)
        rates = wanted.max(axis=0)
        gap = np.where(wanted == rates, gap, 0.0).max(axis=0)
        return rates, np.divide(1.0, gap, out=np.zeros_like(gap), where=rates > 0)

    @property
    def sent_bits(self) -> Floats:
        """What travels in all, (M,)."""
        return np.asarray(np.maximum(self.bits[1], self.bits[-1]).sum(axis=-1))


@dataclass(frozen=True)
class Timing:
    """What of M choices doesn't depend on how much a token weighs. offset_s: (5, M, K); sent, first: (M, K) tokens."""

    offset_s: Floats
    sent: Floats
    first: Floats

    def rows(self, table: Table, token_bits: Floats) -> Rows:
        """With what a token weighs, (K,) or (M, K)."""
        bits = np.empty_like(self.offset_s)
        bits[0] = self.sent * token_bits
        bits[1] = np.where(self.sent > 0, table.head_bits + bits[0], 0.0)
        bits[2] = bits[3] = np.where(self.sent > 0, self.first * token_bits, 0.0)
        bits[4] = table.head_bits
        held = np.all(table.receivers.sums(bits[0]) <= table.room_bits, axis=-1) if not table.roomy else True
        held = np.broadcast_to(held, len(self.sent))
        return Rows(bits if table.measured.all() else bits * table.measured, self.offset_s, held)


@dataclass(frozen=True)
class Allocation:
    """One choice with its rates. own: (K,) tokens; within_s: the T that is guaranteed, or what comes of it."""

    table: Table
    own: Floats
    rungs: Ints
    course: Course
    within_s: float
    bits: float
    found: Timeline

    @property
    def e2e_s(self) -> float:
        """Of the round, as the evaluator sees it."""
        return self.found.e2e_s

    @property
    def carries(self) -> Flags:
        """(K,) bool: which links carry entries of a cache."""
        return np.asarray(self.own < self.table.tokens)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """By link."""
        links, steps = self.table.scenario.links, self.course.steps_s[1:].tolist()
        return tuple(
            Decision(
                own_tokens=int(own),
                rung=link.rungs[rung] if own < link.tokens else None,
                rate_bps=rates[0],
                later=tuple((at, to) for at, before, to in zip(steps, rates, rates[1:], strict=False) if to != before),
            )
            for link, own, rung, rates in zip(
                links, self.own.tolist(), self.rungs.tolist(), self.course.rates.tolist(), strict=True
            )
        )

    @property
    def prediction(self) -> Prediction:
        """The timeline as a value."""
        return predicted(self.table, self.found)


class Shares:
    """The questions a policy asks of a scenario. own: (M, K) tokens by row, rungs: (K,) or (M, K) places of rungs."""

    def __init__(self, scenario: Scenario, table: Table | None = None) -> None:
        self.scenario = scenario
        self.table = table or Table(scenario)
        self._coded: dict[bytes, tuple[Floats, Floats, Floats]] = {}
        self._tightest = np.zeros(self.table.count, dtype=np.intp)

    @property
    def may_cache(self) -> Flags:
        """(K,) bool: which links may carry entries."""
        return self.table.may_cache

    @cached_property
    def named_order(self) -> Ints:
        """(K,): the links by the names of their senders, those of one sender as they come: the same in any scenario
        that lists the same links. Of choices that are equally good the first by this order is taken.
        """
        links = self.scenario.links
        return np.array(sorted(range(len(links)), key=lambda index: links[index].sender), dtype=np.intp)

    def tightest(self) -> Ints:
        """The tightest allowed rung of every link."""
        return self._tightest

    def own_of(self, cache: Flags) -> Floats:
        """Tokens that receivers prefill if these links carry their whole cache and the others none, (..., K).

        Where a receiver's memory does not hold so many, the smallest caches come first.
        """
        own = np.where(cache & self.may_cache, 0.0, self.table.tokens)
        return own if self.table.roomy else np.where(own < self.within_room(own), self.table.tokens, own)

    def within_room(self, own: Floats, rungs: Ints | None = None) -> Floats:
        """The same splits (..., K), with so many tokens more prefilled that receivers can hold the rest."""
        table = self.table
        if table.roomy:
            return own
        token_bits = self.coded(self.tightest() if rungs is None else rungs)[0]
        bits = table.sent_tokens(own) * token_bits
        order = table.receivers.order(bits)
        left = np.maximum(table.room_bits[table.receivers.index] - table.receivers.before(bits, order), 0.0)
        size = 1.0 if table.slice_tokens == WHOLE else float(table.slice_tokens)
        most = np.divide(left, token_bits, out=np.full_like(left, np.inf), where=token_bits > 0)
        least = np.minimum(np.ceil(np.maximum(table.tokens - most, 0.0) / size) * size, table.tokens)
        return np.where(bits <= left, own, np.maximum(own, least))

    def roomy(self, own: Floats, rungs: Ints, raised: Ints, who: Flags) -> tuple[Flags, Flags]:
        """Which of `who` their receivers hold at raised rungs too, (K,): all together in their order, each alone."""
        table = self.table
        if table.roomy:
            return who, who
        sent = table.sent_tokens(own)
        now = sent * self.coded(rungs)[0]
        more = np.where(who, sent * self.coded(raised)[0] - now, 0.0)
        left = (table.room_bits - table.receivers.sums(now))[table.receivers.index]
        alone = more <= left
        before = table.receivers.before(np.where(alone, more, 0.0), table.receivers.together)
        together = alone & (before + more <= left)
        return who & together, who & alone

    def coded(self, rungs: Ints) -> tuple[Floats, Floats, Floats]:
        """(bits, encoding seconds, decoding seconds) of a token's entries, of the shape of rungs each."""
        if rungs.ndim > 1:
            return self.table.ladders.coded(rungs)
        key = rungs.tobytes()
        if key not in self._coded:
            self._coded[key] = self.table.ladders.coded(rungs)
        return self._coded[key]

    def rows(self, own: Floats, rungs: Ints) -> Rows:
        """Bits and offsets of these choices, own (M, K)."""
        token_bits, encode_token_s, decode_token_s = self.coded(rungs)
        return self.timing(own, encode_token_s, decode_token_s, self.texts(own)).rows(self.table, token_bits)

    def timing(
        self, own: Floats, encode_token_s: Floats, decode_token_s: Floats, texts: tuple[Floats, Floats]
    ) -> Timing:
        """When which slices are made, and what follows them. texts: of the same splits."""
        table = self.table
        sent, first, _, _, begin_s, made_s = table.making(own, encode_token_s)
        carries, decode_s = sent > 0, decode_token_s * sent
        order = self._order(begin_s)
        slices_s, decodes_s = self._behind(np.array([decode_token_s * first, decode_s]), order)
        back_s = table.back_s + table.after_s
        offset_s = np.empty((5, *sent.shape))
        moments = (begin_s + slices_s, table.order_s + slices_s, made_s + slices_s, begin_s + decodes_s)
        for demand, moment_s in enumerate(moments):
            offset_s[demand] = np.where(carries, moment_s, 0.0) + back_s
        text_s, last_text_s = texts
        offset_s[-1] = np.maximum(text_s + self._of_receiver(decode_s), last_text_s) + back_s
        return Timing(offset_s, sent, first)

    def texts(self, own: Floats) -> tuple[Floats, Floats]:
        """What prefills take from each link's ids on, and the last part of a text, from its readiness on: (M, K)."""
        table, at_once = self.table, self.table.text_at_once(own)
        prefill_s = table.prefill_s(own)
        text_s = np.broadcast_to(table.order_s + table.text_token_s * own * (1 - at_once), own.shape)
        works_s = text_s + self._behind(prefill_s, self._ids_order(text_s, own < table.tokens, prefill_s))
        ready_s = table.order_s + table.text_token_s * own
        return works_s, np.where(own > 0, ready_s + prefill_s * at_once, 0.0)

    def _of_receiver(self, work_s: Floats) -> Floats:
        """For each link what its receiver has of all its links."""
        receivers = self.table.receivers
        return work_s if receivers.alone else receivers.sums(work_s)[..., receivers.index]

    def _order(self, moment_s: Floats) -> Ints:
        """Links by receiver, of one receiver as something comes to it, of what comes at once the longest first."""
        return self.table.receivers.order(moment_s, self.table.longest_first)

    def _ids_order(self, text_s: Floats, carries: Flags, prefill_s: Floats) -> Ints:
        """In which a receiver's links owe it their ids: any order will do, and the first are needed the earliest.

        As the texts are there; of those that are there at once, first links whose rates are high anyway, for the cache
        behind the ids, then the longest prefill.
        """
        receivers, longest_s = self.table.receivers, prefill_s.max(initial=0.0)
        return receivers.order(text_s, receivers.order(np.where(carries, -2 * longest_s, 0.0) - prefill_s))

    def _behind(self, work_s: Floats, order: Ints) -> Floats:
        """What a receiver does from each link on, in an order."""
        if self.table.receivers.alone:
            return work_s
        return self.table.receivers.behind(work_s, order)

    def least(self, rows: Rows, below_s: float = np.inf, limits_s: Floats | None = None) -> tuple[Ints, float] | None:
        """The rows that can end earliest (several if they tie), and when; each link also by its limit, (K,).

        None if no row ends by below_s and limits.
        """
        ends_s = self.ends(rows, below_s, limits_s)
        earliest_s = float(ends_s.min(initial=np.inf))
        if not earliest_s < np.inf:
            return None
        return np.flatnonzero(ends_s <= earliest_s * (1 + ROUNDING)), earliest_s

    def ends(
        self, rows: Rows, below_s: float = np.inf, limits_s: Floats | None = None, *, later: float = 0.0
    ) -> Floats:
        """The least T of each row, (M,); infinite for one that doesn't end by below_s and limits.

        Of rows that end later than the earliest by more than a fraction `later` of it T may be infinite too.
        """
        found = np.full(rows.bits.shape[1], np.inf)
        at_s = self._surely_not_before_s(rows)
        left = rows.held & (at_s <= below_s)
        if limits_s is not None:
            left &= ~rows.needed(limits_s)[1].any(axis=-1)
        best_s = below_s
        for asked in self._turns(np.flatnonzero(left), at_s):
            active, current, now_s = asked, rows[asked], at_s[asked]
            for _ in range(NEWTON_STEPS):
                if not active.size:
                    break
                next_s = self._newton(current, now_s, limits_s)
                ended = next_s <= now_s
                if ended.any():
                    found[active[ended]] = now_s[ended]
                    best_s = min(best_s, float(now_s[ended].min()) * (1 + later))
                left = ~ended & (next_s <= best_s * (1 + ROUNDING)) & (next_s < LONGEST_S)
                active, current, now_s = active[left], current[left], next_s[left]
        return np.where(found <= below_s, found, np.inf)

    def _turns(self, rows: Ints, at_s: Floats) -> list[Ints]:
        """Of many links the row that may be the earliest comes first: most others need but a look then."""
        if len(rows) < 2 or self.table.count < MANY_LINKS:
            return [rows]
        first = at_s[rows].argmin()
        return [rows[first : first + 1], np.delete(rows, first)]

    def _surely_not_before_s(self, rows: Rows) -> Floats:
        """(M,): what each link takes that has all to itself; and what all take whose bits pass a channel together."""
        table = self.table
        alone_s = np.divide(rows.bits, table.most_bps, out=np.zeros_like(rows.bits), where=rows.bits > 0)
        ends_s = rows.offset_s * (1 + LAST_BIT) + alone_s
        link_s = ends_s.max(axis=0)
        at_s = link_s.max(axis=-1)
        if table.fdma or not table.shared.any():
            return np.asarray(at_s)
        # Jensen: Σ a / (T - o) ≥ (Σ a)² / Σ a·(T - o)
        bits = np.where(ends_s == link_s, rows.bits, 0.0).max(axis=0)
        offset_s = link_s - np.divide(bits, table.most_bps, out=np.zeros_like(bits), where=bits > 0)
        all_s, weighed = table.used(bits) / table.free, table.used(bits * offset_s) / table.free
        together_s = all_s + np.divide(weighed, all_s, out=np.zeros_like(all_s), where=all_s > 0)
        return np.asarray(np.maximum(at_s, together_s.max(axis=-1) * (1 - ROUNDING)))

    def _newton(self, rows: Rows, at_s: Floats, limits_s: Floats | None) -> Floats:
        """A later time that is no later than any by which a row ends, (M,), or the same one if it ends by it."""
        table = self.table
        within_s = at_s[:, None] if limits_s is None else np.minimum(at_s[:, None], limits_s)
        rates, falls = rows.falling(within_s)
        if limits_s is not None:
            falls = np.where(at_s[:, None] < limits_s, falls, 0.0)
        pair_rates = rates[..., table.pair_link]
        shares, slope = table.steepness(pair_rates)
        used = table.by_channel(shares)
        over = used / table.free - 1
        full = over > ROUNDING
        if not full.any():
            return at_s
        slopes = table.by_channel(slope * pair_rates * falls[..., table.pair_link])
        wanted = np.where(full, over * (table.free if table.fdma else used), 0.0)
        steps = np.divide(wanted, slopes, out=np.where(full, np.inf, 0.0), where=full & (slopes > 0))
        step_s = steps.max(axis=-1)
        return np.asarray(np.where(step_s > 0, np.maximum(at_s + step_s, at_s * (1 + LAST_BIT)), at_s))

    def allocate(self, own: Floats, rungs: Ints | None = None) -> Allocation:
        """Min-max rates for one choice, (K,), with what they predict. Without rungs: the tightest."""
        found = self.allocate_within(own, self.tightest() if rungs is None else rungs)
        if found is None:
            raise ArithmeticError(NO_RATES)
        return found

    def allocate_within(self, own: Floats, rungs: Ints, limits_s: Floats | None = None) -> Allocation | None:
        """The same, each link's receiver done by the link's limit (K,). None if that cannot be."""
        rows = self.rows(own[None, :], rungs)
        found = self.least(rows, limits_s=limits_s)
        return None if found is None else self.allocate_rows(rows, own, rungs, found[1], limits_s)

    def allocate_rows(
        self, rows: Rows, own: Floats, rungs: Ints, within_s: float, limits_s: Floats | None = None
    ) -> Allocation:
        """The same of one row (`rows` of own and rungs) that is known to end by then."""
        ends_s = within_s if limits_s is None else np.minimum(within_s, limits_s)
        rates = self.fill(rows.needed(ends_s)[0][0])
        course = Course(own, *self.coded(rungs), rates[:, None])
        timed = timeline(self.table, course)
        return Allocation(self.table, own, rungs, course, max(within_s, timed.e2e_s), float(rows.sent_bits[0]), timed)

    def affordable(self, rates: Floats, wanted: Floats, who: Flags) -> tuple[Flags, Flags]:
        """Which of `who` may go from these rates to those they want, (K,): all together in their order, each alone."""
        table = self.table
        now = table.shares_of_pairs(rates[table.pair_link])
        more = np.where(np.isfinite(wanted), wanted, 0.0)[table.pair_link]
        more = np.where(np.isfinite(wanted)[table.pair_link], table.shares_of_pairs(more) - now, np.inf)
        more = np.where(who[table.pair_link], np.maximum(more, 0.0), 0.0)
        left = table.free * (1 + ROUNDING) - table.used(rates)
        alone = more <= left[table.pair_channel]
        upto = np.cumsum(np.where(alone, more, 0.0))
        upto -= (upto - np.where(alone, more, 0.0))[table.channel_starts][table.pair_channel]
        together = alone & (upto <= left[table.pair_channel])
        return who & table.all_of_pairs(together), who & table.all_of_pairs(alone)

    def fill(self, rates: Floats, who: Flags | None = None) -> Floats:
        """Gives out what is left, to these links: all grow alike, until a channel is full; then those not passing it.

        In each turn every channel that is the tightest of all its growing links is filled.
        """
        table, rates = self.table, rates.copy()
        growing = (rates > 0) & table.measured & (True if who is None else who)
        while growing.any():
            room = self._room(rates, growing)
            level = table.least_on_way(room)
            moving = growing[table.pair_link]
            reached = np.where(moving, level[table.pair_link], np.inf)
            tightest = np.minimum.reduceat(reached, table.channel_starts) >= room * (1 - ROUNDING)
            filled = np.zeros(table.count, dtype=bool)
            filled[table.pair_link[moving & tightest[table.pair_channel]]] = True
            if not filled.any():
                break
            rates[filled] *= 1 + level[filled]
            growing &= ~filled
        return rates

    def _room(self, rates: Floats, growing: Flags) -> Floats:
        """By what share the growing rates may grow before each channel is full; infinite where none does."""
        table = self.table
        used = table.used(np.where(growing, rates, 0.0))
        if not table.fdma:
            left = np.maximum(table.free - table.used(rates), 0.0)
            return np.divide(left, used, out=np.full_like(left, np.inf), where=used > 0)
        pair_rates, moving = rates[table.pair_link], growing[table.pair_link]
        growth = np.zeros_like(used)
        for _ in range(GROWTHS):  # Newton's: what a band is used grows convexly, so all but the first are too large
            shares, slope = table.steepness(pair_rates * np.where(moving, 1 + growth[table.pair_channel], 1.0))
            slopes = table.by_channel(np.where(moving, slope * pair_rates, 0.0))
            over = table.by_channel(shares) - table.free
            step = np.divide(over, slopes, out=np.zeros_like(over), where=slopes > 0)
            growth = np.clip(growth - step, 0.0, MOST_GROWTH)
            if np.all(np.abs(step) <= ROUNDING * (1 + growth)):
                break
        return np.where(used > 0, growth * (1 - ROUNDING), np.inf)
