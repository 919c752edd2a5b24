"""The optimum policy: every link split where the round ends first (methods, section 2, "Beyond it").

A receiver prefills the first tokens of each context itself while the entries of the others are on their way; tokens
and cache are the ends of that. The split comes from the relaxed programme (`relaxed`), rounded to whole slices, and is
compared, by the min-max allocation of rates, with all tokens, all caches, and what JMSRA finds among these; on rounds
of few links the best is then improved by moving slices, alone and between two links, until nothing is gained. So it
is never later than any of those (of many links JMSRA's search takes too long: there it is later now and then). Then
rungs are raised with the time that is left, and what links leave idle of their shares goes to others (`conserve`).

Exact under A1-A5 but for whole tokens. Where it isn't, `Plan.bound_s` says below which E2E no plan of constant rates
is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from coordinator.numbers import Floats, Ints
from coordinator.policy.base import StagedPolicy
from coordinator.policy.bound import lower_bound
from coordinator.policy.jmsra import binary_choices
from coordinator.policy.relaxed import Relaxed
from coordinator.policy.shares import Allocation, Shares
from coordinator.table import WHOLE, Table

FEW_LINKS = 12
"""Up to so many, splits are improved by moves; JMSRA is asked too, whose search takes time with the cube of links."""
LATER = (1.0, 1.003, 1.01, 1.03, 1.1, 1.3)
"""Splits are drawn for T so much later than the relaxed one: what rounding takes must be had back."""
LATER_OF_MANY = (1.003, 1.03)
MOST_ROWS = 6_000
"""Times links: so many choices are tried one by one."""
HEARD_EARLIER, TRIED, WHOLE_TRIED = 0.15, 4, 16
"""A choice whose min-max T is later by no more than this may by the evaluator be earlier; so many of them are asked,
and of those that split nothing.
"""
LEAST_GAIN = 1e-6
EQUAL = 1e-9
MOVES = 400
IMPROVED = 2
"""Of several starts the best are improved: where a search ends depends on where it began."""


class OptimumPolicy(StagedPolicy):
    """Splits by linear programme, rounding and moves; min-max shares by bisection."""

    name = "optimum"
    meets = True
    conserves = True

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


def optimum(shares: Shares) -> Allocation:
    """The earliest that was found."""
    few = every(shares, MOST_ROWS)
    if few is not None:
        return _exhausted(shares, *few)
    if shares.table.count > FEW_LINKS:
        return _of_many(shares, shares.tightest())
    starts = [earliest([shares.allocate(own) for own in binary_choices(shares, searched=True)])]
    early_s = starts[0].within_s
    for rungs in starting_rungs(shares):
        drawn = draw(shares, rungs, early_s, LATER)
        starts.append(shares.allocate(drawn[shares.ends(shares.rows(drawn, rungs)).argmin()], rungs))
    starts.sort(key=lambda start: start.e2e_s)
    return earliest([improved(shares, start) for start in starts[:IMPROVED]])


def starting_rungs(shares: Shares) -> list[Ints]:
    """The tightest rungs, and those of each link that code fastest."""
    table = shares.table
    places = table.ladders.worthwhile()
    _, encode_s, decode_s = shares.coded(places)
    fastest = np.take_along_axis(places, (encode_s + decode_s).argmin(axis=0)[None], axis=0)[0]
    return [shares.tightest()] if np.array_equal(fastest, places[0]) else [places[0], fastest]


def _exhausted(shares: Shares, own: Floats, rungs: Ints) -> Allocation:
    """The earliest of all these, (M, K) each, by the evaluator."""
    ends_s = shares.ends(shares.rows(own, rungs), later=HEARD_EARLIER)
    order = np.argsort(ends_s, kind="stable")
    whole = np.all((own == 0) | (own == shares.table.tokens), axis=-1)
    near = order[ends_s[order] <= ends_s[order[0]] * (1 + HEARD_EARLIER)]
    tried = [*near[:TRIED], *near[whole[near]][:WHOLE_TRIED]]
    found = [shares.allocate(own[row], rungs[row]) for row in dict.fromkeys(tried)]
    return earliest([*found, *(shares.allocate(own) for own in binary_choices(shares, searched=False))])


def every(shares: Shares, most: int) -> tuple[Floats, Ints] | None:
    """Own tokens and rungs, (M, K) each, of all splits at slices on all rungs worth while; None if M·K exceeds most."""
    table = shares.table
    if table.slice_tokens == WHOLE:
        return None
    counts = np.where(table.may_cache, np.ceil(table.tokens / table.slice_tokens), 0.0)
    if table.count * np.prod(counts + 1) > most:
        return None
    worth = table.ladders.worthwhile()
    options: list[tuple[Floats, Ints]] = []
    for link, count in enumerate(counts.astype(int).tolist()):
        places = np.unique(worth[:, link]) if count else worth[:0, link]
        starts = np.tile(np.arange(count) * table.slice_tokens, len(places))
        own = np.append(starts, table.tokens[link])
        options.append((own, np.append(np.repeat(places, count), 0)))
    rows = int(np.prod([len(own) for own, _ in options]))
    if table.count * rows > most:
        return None
    chosen = np.indices([len(own) for own, _ in options]).reshape(table.count, -1)
    columns = [(own[index], places[index]) for (own, places), index in zip(options, chosen, strict=True)]
    return np.stack([own for own, _ in columns], axis=1), np.stack([places for _, places in columns], axis=1)


def _of_many(shares: Shares, rungs: Ints) -> Allocation:
    """The best of all tokens, all caches and what is drawn."""
    ends = np.array(binary_choices(shares, searched=False))
    early_s = shares.ends(shares.rows(ends, rungs)).min()
    rows = np.concatenate([ends, draw(shares, rungs, early_s, LATER_OF_MANY)])
    return shares.allocate(rows[shares.ends(shares.rows(rows, rungs)).argmin()], rungs)


def earliest(allocations: list[Allocation]) -> Allocation:
    """The lowest E2E, of equals the fewest bits."""
    lowest_s = min(each.e2e_s for each in allocations)
    return min((each for each in allocations if each.e2e_s <= lowest_s * (1 + EQUAL)), key=lambda each: each.bits)


def draw(shares: Shares, rungs: Ints, early_s: float, later: Sequence[float]) -> Floats:
    """Splits for a T that the relaxed programme allows, and for somewhat later ones: (M, K) own tokens, rounded."""
    relaxed = Relaxed(shares, rungs)
    least_s = relaxed.least_s(early_s * 1.5)
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
    """Slices moved and rungs changed while that ends the round earlier, large moves first."""
    table, own, rungs, now_s = shares.table, best.own, best.rungs, best.within_s
    least = 1.0 if table.slice_tokens == WHOLE else float(table.slice_tokens)
    step = least
    while step * 4 <= table.tokens.max():
        step *= 2
    for _ in range(MOVES):
        moved, placed = _moved(shares, own, rungs, step)
        found = shares.least(shares.rows(moved, placed), below_s=now_s * (1 - LEAST_GAIN))
        if found is not None:
            own, rungs, now_s = moved[found[0][0]], placed[found[0][0]], found[1]
        elif step <= least:
            break
        else:
            step = max(least, np.ceil(step / 2 / least) * least)
    return earliest([best, shares.allocate(own, rungs)])


def _moved(shares: Shares, own: Floats, rungs: Ints, step: float) -> tuple[Floats, Ints]:
    """Every link's split moved by a step either way or to an end, on each of its rungs, and two links' against each
    other: own tokens and rungs, (M, K) each.
    """
    table = shares.table
    movable = np.flatnonzero(table.may_cache)
    worth = table.ladders.worthwhile()
    moves: list[Floats] = [own]
    places: list[Ints] = [rungs]
    for link in movable:
        for place in {*worth[:, link].tolist(), int(rungs[link])}:
            for change in (-step, step, -table.tokens[link], table.tokens[link], 0.0):
                moved, placed = own.copy(), rungs.copy()
                moved[link] += change
                placed[link] = place
                moves.append(moved)
                places.append(placed)
        for other in movable:
            if other != link:
                moved = own.copy()
                moved[link] -= step
                moved[other] += step
                moves.append(moved)
                places.append(rungs)
    rows = np.clip(np.array(moves), 0.0, table.tokens)
    rows = rows if table.slice_tokens == WHOLE else _sliced(table, rows, np.ceil)
    placed = np.where(rows < table.tokens, np.array(places), 0)
    distinct = np.unique(np.concatenate([rows, placed], axis=1), axis=0)
    return distinct[:, : table.count], distinct[:, table.count :].astype(np.intp)
