"""How many tokens of cache each link must carry for a round to end by T: a linear programme, solved by sorting.

Of link i's n tokens the sender's cache brings x, and the receiver prefills the others. In T, and with slices,

    receiver   Σ (prefill_i·(n_i - x_i) + decode_i·x_i) fits in what it has from the ids' arrival to T
    link       x_i is no more than sender, link and decoder can bring by T
    channel    Σ bits_i·x_i / (alone_i·(T - offset_i)) fits in what is free of it

Every token of cache spares its receiver gain_i = prefill_i - decode_i seconds and costs its channel a share, each token
the same: receivers take them from the links where that ratio is best (fractional knapsack), and T is feasible iff all
fits. Where links pass several shared channels, channels get prices that rise where they are too full.

It is asked with what each link's slice costs the others, so that its answer is a plan, exact but for whole slices and
the fixed part of a prefill. (`bound` asks the same with everything in a link's favour.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from coordinator.numbers import Flags, Floats, Ints
from coordinator.policy.shares import Shares
from coordinator.table import WHOLE

PRICINGS = 6
TOLERANCE = 1e-4
SEARCHES = 40
HARDLY = 0.02
"""While T changes by less, receivers take their tokens in the order found before."""


@dataclass(frozen=True)
class Needed:
    """What T asks for. cached: (K,) tokens of cache; fits: whether links, receivers and channels hold it."""

    cached: Floats
    fits: bool


class Programme:
    """What is asked of links at their rungs, (..., K), for one T after another; prefill_s: a token, (K,) seconds."""

    _made_s: Floats
    """By when a link ends at least of which all is sent when the last slice is made."""
    _earlier_s: Floats
    """How much earlier the first slice is made for each token more that travels."""

    def __init__(self, shares: Shares, rungs: Ints, prefill_s: Floats) -> None:
        table = self._table = shares.table
        self._bits, self._encode_s, self._decode_s = shares.coded(rungs)
        self._gain_s = prefill_s - self._decode_s
        self._open: Flags = table.may_cache & (self._gain_s > 0)
        self._streams = table.slice_tokens < WHOLE
        self._link_s = np.where(np.isfinite(table.most_bps), self._bits / table.most_bps, 0.0)
        """Seconds a token of cache takes on a link that has all to itself."""
        self._head_s = np.where(np.isfinite(table.most_bps), table.head_bits / table.most_bps, 0.0)
        self._slowly_s = np.zeros_like(self._bits) if self._streams else self._encode_s + self._decode_s
        """Seconds a token that coding takes while nothing is sent: none with slices."""
        self._prices = np.where(table.shared, 1.0, 0.0)
        opens: Flags = np.asarray(np.atleast_2d(self._open).any(axis=0))
        self._alone: Flags = opens & (table.receivers.sums(opens * 1.0)[table.receivers.index] == 1)
        """Links whose receivers get a cache from nobody else: for these whole slices are counted exactly."""
        self._one_price = table.one_shared_way(opens)

    def _most(self, within_s: float, window_s: Floats) -> Floats:
        """Tokens of cache, (..., K), that each link can bring if it has all that is free to itself."""
        takes_s = self._link_s + self._slowly_s - self._earlier_s
        most = np.divide(window_s, takes_s, out=np.full_like(window_s, np.inf), where=takes_s > 0)
        most = np.where((window_s > 0) | (takes_s < 0), most, 0.0)
        if self._streams:
            made_s = within_s - self._made_s
            coded = np.divide(made_s, self._encode_s, out=np.full_like(made_s, np.inf), where=self._encode_s > 0)
            most = np.where(made_s >= 0, np.minimum(most, coded), 0.0)
        return np.where(self._open, np.clip(most, 0.0, self._table.tokens), 0.0)

    def _held(self, used: Floats) -> bool | None:
        """Whether channels hold what is used of them; None: at other prices, which now hold, they may."""
        free = self._table.free
        over = used / np.maximum(free, 1e-12)
        if over.size == 0 or over.max() <= 1 + 1e-9:
            return True
        if self._one_price or np.vdot(self._prices, used) > np.vdot(self._prices, free) * (1 + 1e-9):
            return False
        self._prices = self._prices * np.clip(over, 0.25, 4.0)
        return None


def around_s(fits: Callable[[float], bool], high_s: float, tolerance: float = TOLERANCE) -> tuple[float, float]:
    """The last T that doesn't fit and the first that does, within a tolerance as a share of it, if high_s does."""
    low_s = 0.0
    for _ in range(SEARCHES):
        if high_s - low_s <= tolerance * high_s:
            break
        middle_s = (low_s + high_s) / 2
        low_s, high_s = (low_s, middle_s) if fits(middle_s) else (middle_s, high_s)
    return low_s, high_s


class Relaxed(Programme):
    """One scenario at one choice of rungs, (K,)."""

    def __init__(self, shares: Shares, rungs: Ints) -> None:
        table = shares.table
        self._prefill_s = table.prefill_s(table.tokens) / np.maximum(table.tokens, 1.0)
        super().__init__(shares, rungs, self._prefill_s)
        self.rungs = rungs
        self._order: Ints | None = None
        self._ordered_s = self._within_s = 1.0
        self._set_offsets()
        self._slope = table.tangents(np.zeros(table.count))[0]

    def _set_offsets(self) -> None:
        table, slice_ = self._table, self._slice()
        after_s = table.back_s + table.after_s
        work_s = np.where(self._open, table.produce_s(table.tokens) + self._encode_s * table.tokens, 0.0)
        start_s = table.order_s + table.before_at_sender(work_s)
        tail_s = table.receivers.sums(np.where(self._open, self._decode_s * slice_, 0.0))[table.receivers.index]
        begin_s = start_s + table.produce_s(slice_) + self._encode_s * slice_
        self._set_production(start_s + self._encode_s * slice_ + tail_s + after_s, slice_)
        self._made_s = start_s + table.produce_s(table.tokens) + self._link_s * slice_ + tail_s + after_s
        ids_s = table.order_s + after_s + table.text_token_s * slice_ + self._head_s
        self._ids_s = -table.receivers.least(-ids_s)
        self._first_s = table.receivers.least(np.where(self._open, begin_s + self._link_s * slice_ + after_s, np.inf))

    def _set_production(self, others_s: Floats, slice_: Floats) -> None:
        """A cache that is still to be made can be sent from its first slice on: the more of it, the earlier."""
        table = self._table
        if not self._streams:
            self._offset_s, self._earlier_s = others_s + table.produce_s(table.tokens), np.zeros(table.count)
            return
        made_s = table.produce_fixed_s + table.produce_token_s * (table.tokens + slice_)
        self._earlier_s = table.produce_token_s
        self._offset_s = others_s + np.where(table.cached, 0.0, made_s)

    def _slice(self) -> Floats:
        """Tokens of the slice that must be made, sent and decoded while nothing else can be; without slices none."""
        if not self._streams:
            return np.zeros(self._table.count)
        return np.asarray(np.minimum(np.maximum(self._table.tokens, 1.0), self._table.slice_tokens))

    def least_s(self, high_s: float, tolerance: float = TOLERANCE) -> float:
        """The least T that fits, within a tolerance as a share of it, if it is no more than high_s."""
        return around_s(lambda within_s: self.needed(within_s).fits, high_s, tolerance)[1]

    def needed(self, within_s: float) -> Needed:
        """The cheapest tokens of cache with which all end by within_s."""
        table, self._within_s = self._table, within_s
        wanted_s = table.receivers.sums(self._prefill_s * table.tokens) + self._ids_s - within_s
        window_s = within_s - self._offset_s
        most = self._most(within_s, window_s)
        if np.any(table.receivers.sums(self._gain_s * most) < wanted_s * (1 - 1e-12)):
            return Needed(most, fits=False)
        share_s = self._bits / np.maximum(window_s + (self._earlier_s - self._slowly_s / 2) * most, 1e-12)
        cached = most
        for _ in range(PRICINGS):
            cached = self._cheapest(wanted_s, most, self._costs(share_s))
            cached = np.where(self._alone, table.sent_tokens(np.maximum(table.tokens - cached, 0.0)), cached)
            if np.any(cached > most * (1 + 1e-9)):
                return Needed(cached, fits=False)
            decoding_s = table.receivers.sums(self._decode_s * cached)
            if np.any(decoding_s > np.maximum(within_s - self._first_s, 0.0) + 1e-12):
                return Needed(cached, fits=False)
            held = self._held(table.used(self._rates(cached, window_s)))
            if held is not None:
                return Needed(cached, fits=held)
        return Needed(cached, fits=False)

    def _ordered(self, ratio: Floats) -> Ints:
        """Links by receiver, the cheapest first; while one T is searched for, an order that has hardly changed."""
        if self._order is None or abs(self._within_s / self._ordered_s - 1) > HARDLY:
            self._order = self._table.receivers.order(ratio)
            self._ordered_s = self._within_s
        return self._order

    def _rates(self, cached: Floats, window_s: Floats) -> Floats:
        left_s = window_s + (self._earlier_s - self._slowly_s) * cached
        bits = np.where(self._open, cached * self._bits, 0.0)
        return np.divide(bits, left_s, out=np.zeros_like(bits), where=(bits > 0) & (left_s > 0))

    def _costs(self, share_s: Floats) -> Floats:
        """What a token of cache costs each link at the channels' prices."""
        table = self._table
        costs = share_s[table.pair_link] * self._slope * self._prices[table.pair_channel]
        return np.asarray(np.bincount(table.pair_link, weights=costs, minlength=table.count), dtype=np.float64)

    def _cheapest(self, wanted_s: Floats, most: Floats, costs: Floats) -> Floats:
        """Of each receiver the tokens that spare it so many seconds at the least cost, the last one in part."""
        receivers = self._table.receivers
        gains_s = self._gain_s * most
        # those that can't be used by then would cost so much that the others' ratios were lost beside theirs
        usable = self._open & (most > 0)
        order = self._ordered(np.divide(costs, self._gain_s, out=np.zeros_like(costs), where=usable))
        still_s = wanted_s[receivers.index] - receivers.before(gains_s, order)
        taken_s = np.clip(still_s, 0.0, np.maximum(gains_s, 0.0))
        sparing = self._open & (taken_s > 0)
        return np.asarray(np.divide(taken_s, self._gain_s, out=np.zeros_like(taken_s), where=sparing))
