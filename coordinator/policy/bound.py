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

from coordinator.groups import Groups
from coordinator.numbers import Floats, Ints
from coordinator.policy.relaxed import PRICINGS, Programme, around_s
from coordinator.policy.shares import Allocation, Shares

TOUCHED = 0.6
"""Where between nothing and the most a curve is touched by a tangent, beside its ends."""


def lower_bound(shares: Shares, best: Allocation) -> float:
    """An E2E below which no plan of constant rates on any allowed rung is. best: near which it is sharpest."""
    return min(best.e2e_s, Bound(shares, best).least_s(best.within_s * (1 + 1e-9)))


class Bound(Programme):
    """One scenario. (C, K) is by rung that is worth while, and link."""

    def __init__(self, shares: Shares, near: Allocation) -> None:
        table, tokens = shares.table, np.maximum(shares.table.tokens, 1.0)
        prefill_s = table.prefill_s(table.tokens) / tokens + table.prefill_square_s * (2 * near.own - table.tokens)
        super().__init__(shares, table.ladders.worthwhile, prefill_s)
        self._prefills_s = prefill_s * table.tokens - table.prefill_square_s * near.own**2
        """Of all of a link's tokens, by the tangent at what it prefills in the plan."""
        self._set_offsets(tokens)
        self._slope, self._intercept = table.tangents(near.course.rates[:, 0])

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
        # Of a text in several slices, prefill flows with the text from its beginning on.
        text_s = np.maximum(np.where(table.tokens <= slice_, table.text_token_s * slice_, 0.0) - self._head_s, 0.0)
        self._ids_s = table.receivers.least(table.order_s + after_s + text_s + self._head_s)
        self._sure_s = self._chain_s(slice_) + table.order_s + after_s

    def _chain_s(self, slice_: Floats) -> Floats:
        """What each link takes at least if there is nothing but itself, as text or with its shortest slice of cache."""
        table = self._table
        text_s = np.maximum(self._head_s, table.text_token_s * table.tokens)
        text_s = text_s + table.prefill_s(table.tokens) * table.text_at_once(table.tokens)
        made_s = np.maximum(self._head_s, table.produce_s(table.tokens) + self._encode_s * slice_)
        cache_s = (made_s + self._link_s * slice_ + self._decode_s * slice_).min(axis=0)
        return np.asarray(np.where(table.may_cache, np.minimum(text_s, cache_s), text_s))

    def least_s(self, high_s: float) -> float:
        """The last T that doesn't fit, within TOLERANCE, if high_s does."""
        return around_s(self.fits, high_s)[0]

    def fits(self, within_s: float) -> bool:
        """Whether all could end by within_s."""
        table, receivers = self._table, self._table.receivers
        if np.any(within_s < self._sure_s * (1 - 1e-12)):
            return False
        wanted_s = receivers.sums(self._prefills_s) + self._ids_s - within_s
        window_s = within_s - self._offset_s
        most = self._most(within_s, window_s)
        if np.any(receivers.sums((self._gain_s * most).max(axis=0)) < wanted_s * (1 - 1e-12)):
            return False
        alone_bps = self._rates_alone(within_s, wanted_s, window_s, most)
        if np.any(alone_bps == np.inf) or not self._decodes(within_s, wanted_s, most):
            return False
        hull = Hull(*self._points(window_s, most))
        for _ in range(PRICINGS):
            rates = np.where(self._alone, alone_bps, hull.cheapest(receivers.index, wanted_s, self._weights()))
            shares = self._intercept + self._slope * rates[table.pair_link]
            held = self._held(table.by_channel(shares))
            if held is not None:
                return held
        return True  # no prices prove that channels can't hold it

    def _weights(self) -> Floats:
        """What a bit per second of each link costs at the channels' prices."""
        table = self._table
        price = self._slope * self._prices[table.pair_channel]
        return np.asarray(np.bincount(table.pair_link, weights=price, minlength=table.count), dtype=np.float64)

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
        first_s = table.receivers.least(self._first_s.min(axis=0))
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
        turns, count = self._sides_s.shape
        sides_s, receivers = self._sides_s.ravel(), Groups(np.tile(receiver, turns), len(wanted_s))
        order = np.lexsort(((self._steepness * weights).ravel(), receivers.index))
        still_s = wanted_s[receivers.index] - receivers.before(sides_s, order)
        cost = np.clip(still_s, 0.0, sides_s) * self._steepness.ravel()
        return np.asarray(cost.reshape(turns, count).sum(axis=0))
