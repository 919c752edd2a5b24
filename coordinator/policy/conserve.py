"""Shares that lie idle given to others: rates in steps, never later than the constant ones they come from.

Min-max shares hold for the whole round. But a sender that still prefills or encodes sends nothing, nor does one that is
done, and what they leave of their channels can go to those that send. A link sends

    header and ids    from the order on
    slices            from when the first is made, and its ids are through, until the last one is

At each of these moments (K links: 2K steps at most) every link that sends keeps its constant rate, and what the others
leave is given out: by `Shares.fill` to all alike, or first to those behind whose arrival most is still to be done. That
is the earliest due first, which ends a single channel's round as early as any schedule may but for what the constant
rates keep of it. Of the two the earlier is taken.

So at every moment a link sends at its constant rate at least, and none is later (an earlier arrival is never a later
end: `timeline`). Rates never fall below the constant one, for links that should be done or not begun neither: what is
predicted is off by a tenth and more, and a link that has not ended when it should goes on as if nothing had been given
away. Its channel is then asked for more than it holds, until it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from coordinator.numbers import Flags, Floats
from coordinator.policy.shares import ROUNDING, Allocation, Shares
from coordinator.table import Table
from coordinator.timeline import Course, timeline

MOST_LINKS = 32
"""More keep constant rates: an order names no more than 64 steps."""
LEAST_GAIN = 0.01
"""Of the round's E2E; for less it is not worth rates that change."""
SHORT = 0.005
"""Of the round: steps are no closer. A link that begins until the next one counts as sending."""
SENT = 1e-9
"""Of what a link sends, so much is left when it is done, by rounding."""


def conserve(shares: Shares, constant: Allocation, *, least_gain: float = LEAST_GAIN) -> Allocation:
    """The same splits on the same rungs, no request later; with constant rates if the round gains less than that."""
    wanted_s = constant.e2e_s * (1 - least_gain)
    if not in_steps(shares.table.count) or _alone_s(shares, constant) >= wanted_s:
        return constant
    found = [_timed(shares, constant, ways) for ways in _ways(shares, constant)]
    limits_s = constant.found.request_e2e_s * (1 + ROUNDING)
    held = [each for each in found if np.all(each.found.request_e2e_s <= limits_s)]
    best = min(held, key=lambda each: each.e2e_s, default=constant)
    return best if best.e2e_s < wanted_s else constant


def in_steps(links: int) -> bool:
    """Whether rates of so many links may change."""
    return 1 < links <= MOST_LINKS


def _alone_s(shares: Shares, constant: Allocation) -> float:
    """When the round ended if every link had all that is free to itself: no rates end it earlier."""
    rates = np.where(shares.table.measured, shares.table.most_bps, 0.0)
    return timeline(shares.table, replace(constant.course, rates=rates[:, None])).e2e_s


def _ways(shares: Shares, constant: Allocation) -> Iterator[Sequence[Flags]]:
    """In which order links are given what is left, each turn those that are named."""
    everyone = np.ones(shares.table.count, dtype=bool)
    yield (everyone,)
    tails_s = tails(shares, constant)
    distinct = np.unique(tails_s)[::-1]
    if len(distinct) > 1:
        yield [*(tails_s == each for each in distinct), everyone]


def tails(shares: Shares, allocation: Allocation) -> Floats:
    """What min-max shares let follow each link's last bit, (K,) seconds: its way, and what its receiver still does."""
    offset_s = shares.rows(allocation.own[None, :], allocation.rungs).offset_s[:, 0]
    begin_s = shares.table.making(allocation.own, allocation.course.encode_s).begin_s
    return np.asarray(np.where(allocation.carries, offset_s[0] - begin_s, offset_s[-1] - shares.table.order_s))


def _timed(shares: Shares, constant: Allocation, turns: Sequence[Flags]) -> Allocation:
    course = _course(shares, constant, turns)
    return replace(constant, course=course, found=timeline(shares.table, course))


def _course(shares: Shares, constant: Allocation, turns: Sequence[Flags]) -> Course:
    """Step by step, each at the moment when the rates of the last one have a link begin or end."""
    least = rates = constant.course.rates[:, 0]
    sending, short_s, now_s = _Sending(shares.table, constant.course), SHORT * constant.e2e_s, 0.0
    steps_s, columns = [0.0], [rates]
    most = 2 * shares.table.count
    while len(steps_s) < most:
        moments_s = sending.moments(rates, now_s)
        later_s = moments_s[moments_s > now_s]
        next_s = max(float(later_s.min(initial=np.inf)), now_s + short_s)
        if not np.any(moments_s[-1] > next_s):
            break
        sending.go_on(rates, now_s, next_s)
        now_s = next_s
        until_s = now_s + short_s if len(steps_s) < most - 1 else np.inf
        active = sending.active(rates, now_s, until_s)
        rates = _given_out(shares, least, active, turns)
        if not np.array_equal(rates, columns[-1]):
            steps_s.append(now_s)
            columns.append(rates)
    return replace(constant.course, rates=np.stack(columns, axis=1), steps_s=np.array(steps_s))


def _given_out(shares: Shares, least: Floats, active: Flags, turns: Sequence[Flags]) -> Floats:
    """The least rates, and to those that send what the others leave."""
    rates = np.where(active, least, 0.0)
    for who in turns:
        rates = shares.fill(rates, who)
    return np.where(active, rates, least)


class _Sending:
    """What every link has still to send: (3, K) bits of header and ids, of all slices, and of the last one once made.

    As `timeline` counts them, which has bits on their way only from the moments in starts_s on.
    """

    def __init__(self, table: Table, course: Course) -> None:
        sent, first, _, _, begin_s, made_s = table.making(course.own, course.encode_s)
        all_bits, last_bits = sent * course.token_bits, first * course.token_bits
        self._left = np.stack([table.head_bits, all_bits, last_bits]) * table.measured
        self._nothing = SENT * self._left
        self._starts_s = np.stack([table.order_s, begin_s, made_s])

    def moments(self, rates: Floats, now_s: float) -> Floats:
        """When at these rates ids are through, slices begin and all is sent, (3, K); of what is past, now or before."""
        text_s, all_s, last_s = self._starts(rates, now_s) + self._takes(rates)
        end_s = np.where(self._slices, np.maximum(all_s, last_s), np.where(self._left[0] > 0, text_s, now_s))
        begin_s = np.where(self._slices, np.maximum(self._starts_s[1], text_s), now_s)
        return np.stack([np.where(self._left[0] > 0, text_s, now_s), begin_s, end_s])

    def active(self, rates: Floats, now_s: float, until_s: float) -> Flags:
        """(K,): which send anything between now and then."""
        begins_s = self.moments(rates, now_s)[1]
        return np.asarray((self._left[0] > 0) | (self._slices & (begins_s < until_s)))

    def go_on(self, rates: Floats, now_s: float, next_s: float) -> None:
        """Until then, at these rates."""
        spans_s = np.maximum(next_s - self._starts(rates, now_s), 0.0)
        left = self._left - spans_s * rates
        self._left = np.where(left > self._nothing, left, 0.0)

    @property
    def _slices(self) -> Flags:
        return np.asarray(np.any(self._left[1:] > 0, axis=0))

    def _takes(self, rates: Floats) -> Floats:
        return np.asarray(np.divide(self._left, rates, out=np.zeros_like(self._left), where=self._left > 0))

    def _starts(self, rates: Floats, now_s: float) -> Floats:
        """From when on each goes on."""
        starts_s = np.maximum(self._starts_s, now_s)
        starts_s[1] = np.maximum(starts_s[1], starts_s[0] + self._takes(rates)[0])
        return np.asarray(starts_s)
