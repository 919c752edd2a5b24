"""The optimum policy: every link split where the round ends first (methods, section 2, "Beyond it").

A receiver prefills the first tokens of each context itself while the entries of the others are on their way; tokens
and cache are the ends of that. What is chosen of each link is a split and a rung, together: one that weighs little may
take long to code.

    one or two links   every split at a slice on every rung that is worth while, all at once
    up to 32           from JMSRA's ends, all of one medium and the relaxed programme (`relaxed`), on the tightest rungs
                       and on those that code fastest, slices are moved and rungs changed while that gains
    more               the best of the relaxed programme's splits, of those with nothing split, and of all of one medium

So it is never later than `token` and `kv`, nor than `jmsra` up to 32 links. Choices are compared by the min-max
allocation of rates, the best few by the evaluator. Of several deadlines the one missed by most counts first
(`deadlines`). Then rungs are raised with the time that is left, and idle shares given out (`conserve`).

Exact under A1-A5 but for whole tokens, and for one or two links in slices. Where it isn't, `Plan.bound_s` says below
which E2E no plan of constant rates is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from coordinator.latency import Scenario
from coordinator.numbers import Floats, Ints
from coordinator.policy.base import Plan, StagedPolicy
from coordinator.policy.bound import lower_bound
from coordinator.policy.deadlines import weighed
from coordinator.policy.jmsra import FEW_LINKS, binary_choices
from coordinator.policy.relaxed import Relaxed
from coordinator.policy.replanning import replanned
from coordinator.policy.shares import NO_RATES, Allocation, Rows, Shares
from coordinator.table import WHOLE, Table

LATER = (1.0, 1.003, 1.01, 1.03, 1.1, 1.3)
"""Splits are drawn for T so much later than the relaxed one: what rounding takes must be had back."""
LATER_OF_MANY = (1.003, 1.03)
ROUGHLY = 1e-3
"""To which of a T it is found out for many links."""
MOST_ROWS = 6_000
"""Times links: so many choices are tried one by one."""
HEARD_EARLIER, TRIED, WHOLE_TRIED = 0.15, 4, 16
"""A choice whose min-max T is later by no more than this may by the evaluator be earlier; so many of them are asked,
and of those that split nothing.
"""
LEAST_GAIN = 1e-6
EQUAL = 1e-9
WORK = 300_000
"""Choices times links that an improvement may look at."""
EXCHANGED = 12
"""Links whose splits are moved against another's."""
IMPROVED = 2
"""Of several starts the best are improved: without slices, where a search ends depends on where it began."""


class OptimumPolicy(StagedPolicy):
    """Splits and rungs by trying all of few, else by linear programme, rounding and moves; min-max shares."""

    name = "optimum"
    meets = True
    conserves = True

    def choose(self, shares: Shares) -> Allocation:
        """The best splits found; where all have deadlines that text keeps, text: lossless, in the fewest bytes.

        Of several deadlines those that are missed by most count first.
        """
        deadlines_s = shares.table.deadlines_s
        if np.isfinite(deadlines_s).all():
            text = shares.allocate(shares.table.tokens)
            if np.all(text.found.request_e2e_s <= deadlines_s):
                return text
        return _search(shares)

    def replan(self, scenario: Scenario, before: Plan) -> Plan:
        """The plan of a scenario that differs in few links from the one planned before; see `replanning`."""
        due = all(terms.deadline_s for terms in scenario.requests)
        thoroughly = self.choose if due else _search
        return replanned(self, scenario, before, _of_many, thoroughly) or self.plan(scenario)

    def bound_s(self, shares: Shares, chosen: Allocation) -> float:
        """See `lower_bound`."""
        return lower_bound(shares, chosen)


def _search(shares: Shares) -> Allocation:
    """The earliest, or where that misses deadlines what misses them by least."""
    return weighed(shares, optimum(shares), optimum)


def optimum(shares: Shares) -> Allocation:
    """The earliest that was found."""
    few = every(shares, MOST_ROWS)
    if few is not None:
        return _exhausted(shares, *few)
    if shares.table.count > FEW_LINKS:
        return _of_many(shares)
    starts = [earliest([shares.allocate(own) for own in binary_choices(shares, searched=True)])]
    early_s = starts[0].within_s
    for rungs in starting_rungs(shares):
        drawn = draw(shares, rungs, early_s, LATER)
        starts.append(shares.allocate_rows(*soonest(shares, drawn, np.broadcast_to(rungs, drawn.shape))))
    if len(starts) > 2 and shares.table.count > 1:
        starts.append(_mixed(shares, *starts[1:]))
    starts.sort(key=lambda start: start.e2e_s)
    most = IMPROVED if shares.table.slice_tokens == WHOLE else 1
    return earliest([improved(shares, start) for start in starts[:most]])


def _mixed(shares: Shares, tightest: Allocation, fastest: Allocation) -> Allocation:
    """The best of some links on the one's rungs and the others on the other's, with the splits of either.

    Links take the faster rung in the order of what it saves of coding for what it weighs more.
    """
    table = shares.table
    (bits, *codes), (more_bits, *fewer) = shares.coded(tightest.rungs), shares.coded(fastest.rungs)
    saved_s = sum(code - few for code, few in zip(codes, fewer, strict=True))
    way_s = np.where(np.isfinite(table.most_bps), (more_bits - bits) / table.most_bps, 0.0)
    named = shares.named_order
    worth = np.divide(saved_s, way_s, out=np.zeros(table.count), where=way_s > 0)
    order = named[np.argsort(-worth[named], kind="stable")]
    rank = np.empty(table.count, dtype=np.intp)
    rank[order] = np.arange(table.count)
    fast = rank < np.arange(1, table.count)[:, None]
    own = [
        np.where(fast, fastest.own, tightest.own),
        *(np.broadcast_to(each.own, fast.shape) for each in (tightest, fastest)),
    ]
    rungs = np.tile(np.where(fast, fastest.rungs, tightest.rungs), (len(own), 1))
    return shares.allocate_rows(*soonest(shares, np.concatenate(own), rungs))


def starting_rungs(shares: Shares) -> list[Ints]:
    """The tightest rungs, and those of each link that code fastest."""
    table = shares.table
    places = table.ladders.worthwhile
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
    if np.log(counts + 1).sum() > np.log(most / table.count):
        return None
    worth = table.ladders.worthwhile
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


def _of_many(shares: Shares) -> Allocation:
    """The best of all tokens, all caches, what is drawn, and that with nothing split."""
    ends = np.array(binary_choices(shares, searched=False))
    found = soonest(shares, ends, np.zeros(ends.shape, dtype=np.intp))
    least_s, asked = found.within_s * LATER[-1], False
    for places in starting_rungs(shares):
        relaxed = Relaxed(shares, places)
        if asked and not relaxed.needed(least_s).fits:
            break
        least_s, asked = relaxed.least_s(least_s, ROUGHLY), True
        drawn = _drawn(shares, relaxed, least_s, LATER_OF_MANY)
        own = np.concatenate([drawn, shares.own_of(drawn[:1] * 2 < shares.table.tokens)])
        found = soonest(shares, own, np.broadcast_to(places, own.shape), found)
    return shares.allocate_rows(*found)


class Candidate(NamedTuple):
    """One choice with its rows, and when it ends at the latest (min-max T)."""

    rows: Rows
    own: Floats
    rungs: Ints
    within_s: float


def soonest(shares: Shares, own: Floats, rungs: Ints, unless: Candidate | None = None) -> Candidate:
    """Of these choices, (M, K) each, the first of least min-max T; the other if that is earlier."""
    rows = shares.rows(own, rungs)
    ends_s = shares.ends(rows, unless.within_s if unless else np.inf)
    best = ends_s.argmin()
    if np.isfinite(ends_s[best]):
        return Candidate(rows[best : best + 1], own[best], rungs[best], float(ends_s[best]))
    if unless is None:
        raise ArithmeticError(NO_RATES)
    return unless


def earliest(allocations: list[Allocation]) -> Allocation:
    """The lowest E2E, of equals the fewest bits."""
    lowest_s = min(each.e2e_s for each in allocations)
    return min((each for each in allocations if each.e2e_s <= lowest_s * (1 + EQUAL)), key=lambda each: each.bits)


def draw(shares: Shares, rungs: Ints, early_s: float, later: Sequence[float]) -> Floats:
    """Splits for a T that the relaxed programme allows, and for somewhat later ones: (M, K) own tokens, rounded."""
    relaxed = Relaxed(shares, rungs)
    return _drawn(shares, relaxed, relaxed.least_s(early_s * 1.5), later)


def _drawn(shares: Shares, relaxed: Relaxed, least_s: float, later: Sequence[float]) -> Floats:
    rows: list[Floats] = []
    for factor in later:
        rows += rounded(shares, shares.table.tokens - relaxed.needed(least_s * factor).cached)
    return shares.within_room(np.array(rows), relaxed.rungs)


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
    """Slices moved and rungs changed while that ends the round earlier, by one link's, and else by two links'."""
    table, own, rungs, now_s = shares.table, best.own, best.rungs, best.within_s
    steps = [1.0 if table.slice_tokens == WHOLE else float(table.slice_tokens)]
    while steps[0] * 4 <= table.tokens.max():
        steps.insert(0, steps[0] * 2)
    work = 0
    while work < WORK:
        for step in (None, *steps):
            choices = _moved(shares, own, rungs, steps) if step is None else _exchanged(shares, own, rungs, step)
            work += choices[0].size
            found = shares.least(shares.rows(*choices), below_s=now_s * (1 - LEAST_GAIN))
            if found is not None:
                (own, rungs), now_s = (each[found[0][0]] for each in choices), found[1]
                break
        else:
            break
    return earliest([best, shares.allocate(own, rungs)])


def _moved(shares: Shares, own: Floats, rungs: Ints, steps: Sequence[float]) -> tuple[Floats, Ints]:
    """Every link's split moved by any step or to an end, on each of its rungs: own tokens and rungs, (M, K) each."""
    table = shares.table
    worth = table.ladders.worthwhile
    either = [*steps, *(-step for step in steps)]
    moves: list[Floats] = [own[None, :]]
    places: list[Ints] = [rungs[None, :]]
    for link in np.flatnonzero(table.may_cache):
        ends = [0.0, table.tokens[link], own[link]]
        splits = np.array([*ends, *(own[link] + step for step in either)])
        for place in {*worth[:, link].tolist(), int(rungs[link])}:
            moved, placed = np.repeat(own[None, :], len(splits), axis=0), np.repeat(rungs[None, :], len(splits), axis=0)
            moved[:, link], placed[:, link] = splits, place
            moves.append(moved)
            places.append(placed)
    return _distinct(shares, np.concatenate(moves), np.concatenate(places))


def _exchanged(shares: Shares, own: Floats, rungs: Ints, step: float) -> tuple[Floats, Ints]:
    """Two links' splits moved against each other; of many links those that alone would cost least."""
    less, more = (_stepped(shares, own, rungs, change) for change in (-step, step))
    pairs = [(one, other) for one in less for other in more if one != other]
    moved = np.repeat(own[None, :], len(pairs) + 1, axis=0)
    for row, (one, other) in zip(moved[1:], pairs, strict=True):
        row[one] -= step
        row[other] += step
    return _distinct(shares, moved, np.broadcast_to(rungs, moved.shape))


def _stepped(shares: Shares, own: Floats, rungs: Ints, change: float) -> list[int]:
    """The links whose splits may be moved by this, or those of them for which the round ends earliest then."""
    table = shares.table
    links = shares.named_order[table.may_cache[shares.named_order]]
    if len(links) <= EXCHANGED:
        return [int(link) for link in links]
    moved = np.repeat(own[None, :], len(links), axis=0)
    moved[np.arange(len(links)), links] += change
    rows, places = np.clip(moved, 0.0, table.tokens), np.broadcast_to(rungs, moved.shape)
    ends_s = shares.ends(shares.rows(rows, places), later=np.inf)
    return [int(link) for link in links[np.argsort(ends_s, kind="stable")[:EXCHANGED]]]


def _distinct(shares: Shares, own: Floats, rungs: Ints) -> tuple[Floats, Ints]:
    """Each choice once, in whole slices, without a rung where nothing travels."""
    table, order = shares.table, shares.named_order
    rows = np.clip(own, 0.0, table.tokens)
    rows = rows if table.slice_tokens == WHOLE else _sliced(table, rows, np.ceil)
    placed = np.where(rows < table.tokens, rungs, 0)
    distinct = np.unique(np.concatenate([rows[:, order], placed[:, order]], axis=1), axis=0)
    back = np.argsort(order)
    return distinct[:, back], distinct[:, table.count + back].astype(np.intp)
