"""Rungs climb with the time that is left: quality, after E2E and before bytes (methods, section 2, "Order of aims").

The same rule for every policy. Links are asked all at once: what they need at higher rungs, what their channels have,
what others of their agents then need; and at last the evaluator.
"""

from __future__ import annotations

from itertools import count

import numpy as np

from coordinator.groups import Groups
from coordinator.numbers import Flags, Floats, Ints
from coordinator.policy.shares import ROUNDING, Allocation, Rows, Shares, Timing

KEPT, KEPT_AT_MOST = 0.25, 0.005
"""Of the time that is left while rungs climb, and of the limit: what the evaluator may see beyond min-max T."""
SINGLY = 8
"""So many times links that end too late by the evaluator go back by one step, then by ever more."""
SLIGHTLY = 1e-4
"""By so much what min-max shares allow may end later by the evaluator, as it does without any raising."""


def raise_rungs(shares: Shares, base: Allocation, round_s: float = 0.0) -> Allocation:
    """The same media on the most faithful rungs that time allows.

    A request with a deadline that it meets may take until the deadline; one that misses it takes no longer than now;
    without a deadline all may take `tie_fraction` longer than the round takes now. The links with the largest loss
    climb first (ties: in the order of the scenario), each as long as its channels hold what it takes more and others of
    its agents can pay for it. round_s: what the round takes of which these links are a part.
    """
    limits_s = _limits(shares, base, round_s)
    spare_s = np.maximum(limits_s - base.found.request_e2e_s[shares.table.request], 0.0)
    within_s = limits_s - np.minimum(KEPT * spare_s, KEPT_AT_MOST * limits_s)
    ladders, links = shares.table.ladders, np.arange(shares.table.count)
    needs, rungs, steps = _Needs(shares, base.own, within_s), base.rungs, [base.rungs]
    if needs.lacking(rungs).any():  # several requests of one receiver, or receivers of one channel, need all of it
        needs = _Needs(shares, base.own, limits_s)
    rates = needs.at(rungs)
    climbing = base.carries & (rungs < ladders.top)
    while climbing.any():
        loss = ladders.loss[links, rungs]
        lossiest = climbing & (loss == loss[climbing].max())
        higher = needs.climbed(rungs, rates, lossiest)
        higher, rates = needs.paid(rungs, higher)
        climbing &= (~lossiest | (higher > rungs)) & (higher < ladders.top)
        if np.any(higher > rungs):
            steps.append(higher)
        rungs = higher
    return _highest(shares, base, steps, needs, limits_s)


class _Needs:
    """The rates that end links by their limits, (K,), on these splits: what doesn't change with rungs is kept."""

    def __init__(self, shares: Shares, own: Floats, limits_s: Floats) -> None:
        self._shares, self._own, self.limits_s = shares, own[None, :], limits_s
        self._texts = shares.texts(self._own)
        self._coding: Floats = np.empty(0)
        self._timing: Timing | None = None
        self._asked: Ints = np.empty(0, dtype=np.intp)
        self._rates: Floats = np.empty(0)

    def at(self, rungs: Ints) -> Floats:
        """The least; infinite where none does. Often asked twice of the same rungs, one time after the other."""
        if not np.array_equal(self._asked, rungs):
            rates, late = self._rows(rungs).needed(self.limits_s)
            self._asked, self._rates = rungs, np.where(late[0], np.inf, rates[0])
        return self._rates

    def allocation(self, rungs: Ints) -> Allocation | None:
        """Min-max rates within the limits, if there are any."""
        rows = self._rows(rungs)
        found = self._shares.least(rows, limits_s=self.limits_s)
        return found and self._shares.allocate_rows(rows, self._own[0], rungs, found[1], self.limits_s)

    def _rows(self, rungs: Ints) -> Rows:
        token_bits, encode_s, decode_s = self._shares.coded(rungs)
        coding = np.stack([encode_s, decode_s])
        if self._timing is None or not np.array_equal(self._coding, coding):
            self._coding, self._timing = coding, self._shares.timing(self._own, encode_s, decode_s, self._texts)
        return self._timing.rows(self._shares.table, token_bits)

    def lacking(self, rungs: Ints) -> Flags:
        """(K,): the links that no rate ends in time, and those that pass a channel which doesn't hold all rates."""
        table, rates = self._shares.table, self.at(rungs)
        lacking = np.isinf(rates)
        over = table.used(np.where(lacking, 0.0, rates)) > table.free * (1 + ROUNDING)
        lacking[table.pair_link[over[table.pair_channel]]] = True
        return lacking

    def climbed(self, rungs: Ints, rates: Floats, who: Flags) -> Ints:
        """The rungs when of `who` those climb by one, in their order, whose channels and receivers hold it.

        rates: what links have at these rungs.
        """
        raised = np.where(who, rungs + 1, rungs)
        wanted = self.at(raised)
        while who.any():
            held, held_alone = self._shares.roomy(self._own[0], rungs, raised, who)
            fit, alone = self._shares.affordable(rates, wanted, held_alone)
            fit &= held
            if not fit.any():
                break
            rungs, rates = np.where(fit, raised, rungs), np.where(fit, wanted, rates)
            who = alone & held_alone & ~fit
        return rungs

    def paid(self, rungs: Ints, higher: Ints) -> tuple[Ints, Floats]:
        """Of rungs that rise from one that there are rates for those for which there still are, with the rates.

        What a link takes more of an agent, others of it may have to pay: where they can't, half of those don't rise.
        """
        table = self._shares.table
        while True:
            lacking, rising = self.lacking(higher), higher > rungs
            if not lacking.any() or not rising.any():
                return higher, self.at(higher)
            stay = np.zeros_like(rising)
            for group in (table.receivers, table.senders):
                concerned = rising & (group.sums(lacking * 1.0) > 0)[group.index]
                before = group.before(concerned.astype(np.float64), group.together)
                stay |= concerned & (before >= np.floor(group.sums(concerned * 1.0) / 2)[group.index])
            higher = np.where(stay if stay.any() else rising, rungs, higher)


def _highest(shares: Shares, base: Allocation, steps: list[Ints], needs: _Needs, limits_s: Floats) -> Allocation:
    """The last of these steps, or where the evaluator sees a receiver end after its limit one before it.

    steps: all rungs after each, the first those of base.
    """
    table, last, back = shares.table, len(steps) - 1, 1
    by_request_s = Groups(table.request, len(base.found.request_e2e_s)).least(limits_s)
    every, links = np.array(steps), np.arange(table.count)
    at = np.full(table.count, last)
    for turn in count(1):
        if not at.any():
            break
        found = needs.allocation(every[at, links])
        if found is None:
            at = at - back
        else:
            late = found.found.request_e2e_s > by_request_s * (1 + SLIGHTLY)
            if not late.any():
                return found
            late_links = table.receivers.sums(late[table.request] * 1.0)[table.receivers.index] > 0
            at = np.where(late_links, at - back, at) if at[late_links].any() else at - back
        at, back = np.maximum(at, 0), 1 if turn < SINGLY else 2 * back
    return base


def _limits(shares: Shares, base: Allocation, round_s: float) -> Floats:
    """Per link, until when its receiver must have ended all its requests (the earliest limit of them)."""
    scenario, table = shares.scenario, shares.table
    tied_s = max(base.e2e_s, round_s) * (1 + scenario.tie_fraction)
    own_s = np.where(np.isinf(table.deadlines_s), tied_s, np.maximum(table.deadlines_s, base.found.request_e2e_s))
    return np.asarray(table.receivers.least(own_s[table.request])[table.receivers.index])
