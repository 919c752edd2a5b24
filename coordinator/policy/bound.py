"""An E2E below which no plan of constant rates ends: the relaxed programme of `relaxed`, asked hopefully.

Everything is in a link's favour: its sender works for it alone, what comes last is its shortest slice, its rate is no
more than a line below what it is (tangents, where shares of a band or prefills that slow with length are curves). Of
its rungs each is a way to spare its receiver seconds for a rate:

    rung r     x tokens spare (prefill - decode_r)·x seconds at bits_r·x / (T - offset_r) bits per second, for every x
               that sender, link and decoder can bring by T

A plan takes one of them, the bound any mixture: the convex hull of all, so that what a link spares costs it more the
more it is. Receivers take the cheapest seconds of their links (fractional knapsack), and T is feasible iff what links
must carry fits. A link that is its receiver's only one takes a rung as it is, in whole slices.
"""

from __future__ import annotations

import numpy as np

from coordinator.numbers import Flags, Floats, Ints
from coordinator.policy.shares import Allocation, Shares
from coordinator.table import WHOLE

PRICINGS = 6
TOLERANCE = 1e-4
SEARCHES = 40
TOUCHED = 0.6
"""Where between nothing and the most a curve is touched by a tangent, beside its ends."""


def lower_bound(shares: Shares, best: Allocation) -> float:
    """An E2E below which no plan of constant rates on any allowed rung is. best: near which it is sharpest."""
    return min(best.e2e_s, Bound(shares, best).least_s(best.within_s * (1 + 1e-9)))


class Bound:
    """One scenario. (C, K) is by rung that is worth while, and link."""

    def __init__(self, shares: Shares, near: Allocation) -> None:
        table = self._table = shares.table
        self._bits, self._encode_s, self._decode_s = shares.coded(table.ladders.worthwhile())
        self._streams = table.slice_tokens < WHOLE
        tokens = np.maximum(table.tokens, 1.0)
        prefill_s = table.prefill_s(table.tokens) / tokens + table.prefill_square_s * (2 * near.own - table.tokens)
        self._prefills_s = prefill_s * table.tokens - table.prefill_square_s * near.own**2
        """Of all of a link's tokens, by the tangent at what it prefills in the plan."""
        self._gain_s = prefill_s - self._decode_s
        self._open: Flags = table.may_cache & (self._gain_s > 0)
        opens = self._open.any(axis=0)
        self._alone: Flags = opens & (table.receivers.sums(opens * 1.0)[table.receivers.index] == 1)
        self._link_s = np.where(np.isfinite(table.most_bps), self._bits / table.most_bps, 0.0)
        """Seconds a token of cache takes on a link that has all to itself."""
        self._slowly_s = np.zeros_like(self._bits) if self._streams else self._encode_s + self._decode_s
        """Seconds a token that coding takes while nothing is sent."""
        self._set_offsets(tokens)
        self._slope, self._intercept = table.tangents(near.course.rates[:, 0])
        self._prices = np.where(table.shared, 1.0, 0.0)
        self._one_price = table.one_shared_way(opens)

    def _set_offsets(self, tokens: Floats) -> None:
        table, slice_ = self._table, np.zeros(self._table.count)
        if self._streams:
            slice_ = tokens - (np.ceil(tokens / table.slice_tokens) - 1) * table.slice_tokens
        after_s = table.back_s + table.after_s
        tail_s = self._decode_s * slice_
        others_s = table.order_s + self._encode_s * slice_ + tail_s + after_s
        if self._streams:
            made_s = table.produce_fixed_s + table.produce_token_s * (table.tokens + slice_ - table.slice_tokens)
            self._offset_s = others_s + np.where(table.cached, 0.0, made_s)
            self._earlier_s = table.produce_token_s
        else:
            self._offset_s = others_s + table.produce_s(table.tokens)
            self._earlier_s = np.zeros(table.count)
        self._made_s = table.order_s + table.produce_s(table.tokens) + self._link_s * slice_ + tail_s + after_s
        begin_s = table.order_s + table.produce_s(slice_) + self._encode_s * slice_
        self._first_s = np.where(self._open, begin_s + self._link_s * slice_ + after_s, np.inf)
        head_s = np.where(np.isfinite(table.most_bps), table.head_bits / table.most_bps, 0.0)
        # Of a text in several slices, prefill flows with the text from its beginning on.
        text_s = np.maximum(np.where(table.tokens <= slice_, table.text_token_s * slice_, 0.0) - head_s, 0.0)
        self._ids_s = self._earliest(table.order_s + after_s + text_s + head_s)
        self._sure_s = self._chain_s(head_s, slice_) + table.order_s + after_s

    def _chain_s(self, head_s: Floats, slice_: Floats) -> Floats:
        """What each link takes at least if there is nothing but itself, as text or with its shortest slice of cache."""
        table = self._table
        text_s = np.maximum(head_s, table.text_token_s * table.tokens)
        text_s = text_s + table.prefill_s(table.tokens) * table.text_at_once(table.tokens)
        made_s = np.maximum(head_s, table.produce_s(table.tokens) + self._encode_s * slice_)
        cache_s = (made_s + self._link_s * slice_ + self._decode_s * slice_).min(axis=0)
        return np.asarray(np.where(table.may_cache, np.minimum(text_s, cache_s), text_s))

    def _earliest(self, by_link: Floats) -> Floats:
        found = np.full(self._table.receivers.count, np.inf)
        np.minimum.at(found, self._table.receivers.index, by_link)
        return found

    def least_s(self, high_s: float) -> float:
        """The last T that doesn't fit, within TOLERANCE, if high_s does."""
        low_s = 0.0
        for _ in range(SEARCHES):
            if high_s - low_s <= TOLERANCE * high_s:
                break
            middle_s = (low_s + high_s) / 2
            low_s, high_s = (low_s, middle_s) if self.fits(middle_s) else (middle_s, high_s)
        return low_s

    def fits(self, within_s: float) -> bool:
        """Whether all could end by within_s."""
        table, receivers = self._table, self._table.receivers
        if np.any(within_s < self._sure_s * (1 - 1e-12)):
            return False
        wanted_s = receivers.sums(self._prefills_s) + self._ids_s - within_s
        window_s = within_s - self._offset_s
        most = np.where(self._open, np.clip(self._most(within_s, window_s), 0.0, table.tokens), 0.0)
        if np.any(receivers.sums((self._gain_s * most).max(axis=0)) < wanted_s * (1 - 1e-12)):
            return False
        alone_bps = self._rates_alone(within_s, wanted_s, window_s, most)
        if np.any(alone_bps == np.inf) or not self._decodes(within_s, wanted_s, most):
            return False
        hull = Hull(*self._points(window_s, most))
        for _ in range(PRICINGS):
            rates = np.where(self._alone, alone_bps, hull.cheapest(receivers.index, wanted_s, self._weights()))
            shares = self._intercept + self._slope * rates[table.pair_link]
            used = np.bincount(table.pair_channel, weights=shares, minlength=len(table.free))
            over = used / np.maximum(table.free, 1e-12)
            if over.size == 0 or over.max() <= 1 + 1e-9:
                return True
            if self._one_price or np.vdot(self._prices, used) > np.vdot(self._prices, table.free) * (1 + 1e-9):
                return False
            self._prices = self._prices * np.clip(over, 0.25, 4.0)
        return True  # no prices prove that channels can't hold it

    def _weights(self) -> Floats:
        """What a bit per second of each link costs at the channels' prices."""
        table = self._table
        price = self._slope * self._prices[table.pair_channel]
        return np.asarray(np.bincount(table.pair_link, weights=price, minlength=table.count), dtype=np.float64)

    def _most(self, within_s: float, window_s: Floats) -> Floats:
        """Tokens of cache that each link can bring at each rung if it has all that is free to itself."""
        takes_s = self._link_s + self._slowly_s - self._earlier_s
        most = np.divide(window_s, takes_s, out=np.full_like(window_s, np.inf), where=takes_s > 0)
        most = np.where((window_s > 0) | (takes_s < 0), most, 0.0)
        if not self._streams:
            return most
        made_s = within_s - self._made_s
        coded = np.divide(made_s, self._encode_s, out=np.full_like(made_s, np.inf), where=self._encode_s > 0)
        return np.where(made_s >= 0, np.minimum(most, coded), 0.0)

    def _points(self, window_s: Floats, most: Floats) -> tuple[Floats, Floats]:
        """Seconds spared and the rates they take, (Q, K) each: corners of what lies below each rung's curve."""
        if self._streams:
            left_s = np.maximum(window_s + self._earlier_s * most, 1e-12)
            return self._gain_s * most, self._bits * most / left_s
        touched = [most * 0.0, most * TOUCHED, most]
        lefts_s = [np.maximum(window_s - self._slowly_s * tokens, 1e-12) for tokens in touched]
        rates = [self._bits * tokens / each_s for tokens, each_s in zip(touched, lefts_s, strict=True)]
        slopes = [self._bits * np.maximum(window_s, 1e-12) / each_s**2 for each_s in lefts_s]
        tokens = [most]
        heights = [rates[-1]]
        for i, j in ((0, 1), (1, 2)):
            behind = rates[i] - slopes[i] * touched[i] - rates[j] + slopes[j] * touched[j]
            turn = slopes[j] - slopes[i]
            at = np.divide(behind, turn, out=touched[i].copy(), where=turn > 1e-9 * slopes[j])
            at = np.clip(at, touched[i], touched[j])
            tokens.append(at)
            heights.append(rates[i] + slopes[i] * (at - touched[i]))
        return np.concatenate([self._gain_s * each for each in tokens]), np.concatenate(heights)

    def _rates_alone(self, within_s: float, wanted_s: Floats, window_s: Floats, most: Floats) -> Floats:
        """(K,): the least rates of links that are their receivers' only ones, infinite if no rung will do."""
        table = self._table
        spare_s = np.where(self._alone, np.maximum(wanted_s[table.receivers.index], 0.0), 0.0)
        cached = np.divide(spare_s, self._gain_s, out=np.zeros_like(self._gain_s), where=self._open)
        # In whole slices, where what rounding adds to one begins no other.
        cached = np.where(cached > 0, table.sent_tokens(np.maximum(table.tokens - cached + 1e-6, 0.0)), 0.0)
        left_s = window_s + (self._earlier_s - self._slowly_s) * cached
        able = self._open & (cached <= most * (1 + 1e-9)) & (left_s > 0)
        able &= self._decode_s * cached <= np.maximum(within_s - self._first_s, 0.0) + 1e-12
        rates = np.divide(self._bits * cached, left_s, out=np.full_like(left_s, np.inf), where=able)
        return np.where(spare_s > 0, rates.min(axis=0), 0.0)

    def _decodes(self, within_s: float, wanted_s: Floats, most: Floats) -> bool:
        """Whether receivers can decode as much as they must, after the first slice has come."""
        table = self._table
        first_s = self._earliest(self._first_s.min(axis=0))
        hull = Hull(self._gain_s * most, self._decode_s * most)
        decoding_s = table.receivers.sums(hull.cheapest(table.receivers.index, wanted_s, np.ones(table.count)))
        return bool(np.all(decoding_s <= np.maximum(within_s - first_s, 0.0) + 1e-12))


class Hull:
    """What each link's seconds cost at least: from nothing through corners (Q, K), along their lower convex hull."""

    def __init__(self, gains_s: Floats, costs: Floats) -> None:
        at_s, at_cost = np.zeros(gains_s.shape[1]), np.zeros(gains_s.shape[1])
        sides: list[tuple[Floats, Floats]] = []
        for _ in gains_s:
            more_s = gains_s - at_s
            steep = np.divide(costs - at_cost, more_s, out=np.full_like(more_s, np.inf), where=more_s > 1e-15)
            least = steep.argmin(axis=0)[None]
            side_s = np.take_along_axis(more_s, least, axis=0)[0]
            steepness = np.take_along_axis(steep, least, axis=0)[0]
            some = np.isfinite(steepness)
            if not some.any():
                break
            side_s = np.where(some, side_s, 0.0)
            steepness = np.where(some, steepness, 0.0)
            sides.append((side_s, steepness))
            at_s, at_cost = at_s + side_s, at_cost + side_s * steepness
        self._sides_s = np.array([side for side, _ in sides]).reshape(-1, gains_s.shape[1])
        self._steepness = np.array([each for _, each in sides]).reshape(-1, gains_s.shape[1])

    def cheapest(self, receiver: Ints, wanted_s: Floats, weights: Floats) -> Floats:
        """What each link's cheapest seconds cost, (K,), if its receiver wants so many of all its links.

        receiver: (K,) places in wanted_s; weights: (K,) what a unit of each link's cost counts when they are compared.
        """
        count = self._sides_s.shape[1]
        sides_s, owner = self._sides_s.ravel(), np.tile(receiver, len(self._sides_s))
        order = np.lexsort(((self._steepness * weights).ravel(), owner))
        sorted_s = sides_s[order]
        upto_s = np.cumsum(sorted_s) - sorted_s
        starts = np.flatnonzero(np.diff(owner[order], prepend=-1))
        base_s = np.repeat(upto_s[starts], np.diff(np.append(starts, len(order))))
        taken_s = np.empty_like(sides_s)
        taken_s[order] = np.clip(wanted_s[owner[order]] - (upto_s - base_s), 0.0, sorted_s)
        cost = taken_s * self._steepness.ravel()
        return np.asarray(np.bincount(np.tile(np.arange(count), len(self._sides_s)), weights=cost, minlength=count))
