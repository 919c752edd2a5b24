"""The optimum policy: every link split where the round ends first (methods, section 2, "Beyond it").

A receiver prefills the first tokens of each context itself while the entries of the others are on their way; tokens
and cache are the ends of that. The split comes from the relaxed programme (`relaxed`), rounded to whole slices, and is
compared, by the min-max allocation of rates, with all tokens, all caches, and what JMSRA finds among these; on rounds
of few links the best is then improved by moving slices, alone and between two links, until nothing is gained. So it
is never later than any of those (of many links JMSRA's search takes too long: there it is later now and then). Then
rungs are raised with the time that is left.

Exact under A1-A5 but for whole tokens. Where it isn't, `Plan.bound_s` says below which E2E no plan of constant rates
is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from coordinator.numbers import Floats, Ints
from coordinator.policy.base import StagedPolicy
from coordinator.policy.jmsra import binary_choices
from coordinator.policy.relaxed import Relaxed
from coordinator.policy.shares import Allocation, Shares
from coordinator.table import WHOLE, Table

FEW_LINKS = 12
"""Up to so many, splits are improved by moves; JMSRA is asked too, whose search takes time with the cube of links."""
LATER = (1.0, 1.003, 1.01, 1.03, 1.1, 1.3)
"""Splits are drawn for T so much later than the relaxed one: what rounding takes must be had back."""
LATER_OF_MANY = (1.003, 1.03)
ROUGHLY, FINELY = 1e-4, 1e-7
"""Of many links, the shares of E2E to which choices are compared, and rates are worked out."""
LEAST_GAIN = 1e-6
EQUAL = 1e-9
MOVES = 400


class OptimumPolicy(StagedPolicy):
    """Splits by linear programme, rounding and moves; min-max shares by bisection."""

    name = "optimum"
    meets = True

    def choose(self, shares: Shares) -> Allocation:
        """The best splits found; where all have deadlines that text keeps, text: lossless, in the fewest bytes."""
        deadlines_s = [terms.deadline_s for terms in shares.scenario.requests]
        if None not in deadlines_s:
            text = shares.allocate(shares.table.tokens)
            if np.all(text.found.request_e2e_s <= np.array(deadlines_s, dtype=np.float64)):
                return text
        return optimum(shares)

    def bound_s(self, shares: Shares, chosen: Allocation) -> float:
        """See `lower_bound`."""
        return lower_bound(shares, chosen)


def optimum(shares: Shares, rungs: Ints | None = None) -> Allocation:
    """The earliest that was found, on these rungs (the tightest if none are named)."""
    rungs = shares.tightest() if rungs is None else rungs
    if shares.table.count > FEW_LINKS:
        return _of_many(shares, rungs)
    starts = [shares.allocate(own, rungs) for own in binary_choices(shares, searched=True)]
    drawn = draw(shares, rungs, min(start.within_s for start in starts), LATER)
    found = shares.least(shares.rows(drawn, rungs))
    if found is not None:
        starts.append(shares.allocate(drawn[found[0][0]], rungs))
    return improved(shares, earliest(starts))


def _of_many(shares: Shares, rungs: Ints) -> Allocation:
    """The best of all tokens, all caches and what is drawn; compared roughly, then worked out for one."""
    ends = np.array(binary_choices(shares, searched=False))
    upper_s = shares.surely_s(shares.rows(ends[:1], rungs))
    rows = np.concatenate([ends, draw(shares, rungs, upper_s, LATER_OF_MANY)])
    found = shares.least(shares.rows(rows, rungs), tolerance=ROUGHLY)
    return shares.allocate(rows[found[0][0] if found is not None else 0], rungs, tolerance=FINELY)


def earliest(allocations: list[Allocation]) -> Allocation:
    """The lowest E2E, of equals the fewest bits."""
    lowest_s = min(each.e2e_s for each in allocations)
    return min((each for each in allocations if each.e2e_s <= lowest_s * (1 + EQUAL)), key=lambda each: each.bits)


def draw(shares: Shares, rungs: Ints, early_s: float, later: Sequence[float]) -> Floats:
    """Splits for a T that the relaxed programme allows, and for somewhat later ones: (M, K) own tokens, rounded."""
    relaxed = Relaxed(shares, rungs, hopeful=False)
    _, least_s = relaxed.around_s(early_s * 1.5)
    table, rows = shares.table, []
    for factor in later:
        own = table.tokens - relaxed.needed(least_s * factor).cached
        rows += rounded(shares, own)
    return np.array(rows)


def rounded(shares: Shares, own: Floats) -> list[Floats]:
    """Splits at whole tokens, and where there are slices at both ends of the one that a split lies in."""
    table = shares.table
    own = np.where(table.may_cache, np.clip(np.round(own), 0.0, table.tokens), table.tokens)
    if table.slice_tokens == WHOLE:
        return [own]
    ways = (np.floor,) if table.count > FEW_LINKS else (np.floor, np.ceil, np.round)
    return [_sliced(table, own, way) for way in ways]


def _sliced(table: Table, own: Floats, way: Callable[[Floats], Floats]) -> Floats:
    """Splits moved to where a slice begins, this way; what is all text stays so."""
    size = table.slice_tokens
    return np.where(own < table.tokens, np.minimum(way(own / size) * size, table.tokens), own)


def improved(shares: Shares, best: Allocation) -> Allocation:
    """Slices moved while that ends the round earlier, large moves first."""
    table, own, now_s = shares.table, best.own, best.within_s
    least = 1.0 if table.slice_tokens == WHOLE else float(table.slice_tokens)
    step = least
    while step * 4 <= table.tokens.max():
        step *= 2
    for _ in range(MOVES):
        moved = _moved(shares, own, step)
        found = shares.least(shares.rows(moved, best.rungs), below_s=now_s * (1 - LEAST_GAIN))
        if found is not None:
            own, now_s = moved[found[0][0]], found[1]
        elif step <= least:
            break
        else:
            step = max(least, np.ceil(step / 2 / least) * least)
    return earliest([best, shares.allocate(own, best.rungs)])


def _moved(shares: Shares, own: Floats, step: float) -> Floats:
    """Every link's split moved by a step either way or to an end, and two links' against each other."""
    table = shares.table
    movable = np.flatnonzero(table.may_cache)
    moves: list[Floats] = []
    for link in movable:
        for change in (-step, step, -table.tokens[link], table.tokens[link]):
            moved = own.copy()
            moved[link] += change
            moves.append(moved)
        for other in movable:
            if other != link:
                moved = own.copy()
                moved[link] -= step
                moved[other] += step
                moves.append(moved)
    if not moves:
        return own[None, :]
    rows = np.clip(np.array(moves), 0.0, table.tokens)
    return np.unique(rows if table.slice_tokens == WHOLE else _sliced(table, rows, np.ceil), axis=0)


def lower_bound(shares: Shares, best: Allocation) -> float:
    """An E2E below which no plan of constant rates on any allowed rung is. best: near which it is sharpest."""
    hopeful = Relaxed(shares, shares.tightest(), hopeful=True, near_bps=best.course.rates[:, 0], near_own=best.own)
    return min(best.e2e_s, hopeful.around_s(best.within_s * (1 + 1e-9))[0])
