"""A plan made of the one before, where a few links are other than they were.

Links that share no agent and no channel, over whatever others, take nothing from each other. So only the parts that a
change touches are planned, each as a scenario of its own, and the round ends with the latest part. What the others
carry stays, as long as the round can't end before them:

    min-max   ends every part of a round that was planned as one no earlier than it must, by the T of its latest. Were
              that the changed one, which is earlier now, the others might be too, and all is planned anew. It wasn't
              if as it was it could have ended clearly earlier.
    a part    that by its former splits ends by then needs no search; one that doesn't is searched roughly, as in a
              round of many links, and one that is the latest even so as thoroughly as it is in a round of its own.
    rungs     are raised until the round's limit in what is planned; a part that ended by a later limit is raised
              anew, one that might climb further since the round takes longer now is left as it is.

All is planned anew if other requests or links are asked for, a link goes by other channels or is measured for the first
time, too many parts changed for that to be quicker, or a request that stays would miss its deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import compress
from operator import is_not

import numpy as np

from coordinator.latency import Link, Scenario
from coordinator.numbers import Flags, Ints
from coordinator.policy.base import Plan, StagedPolicy, plan_of
from coordinator.policy.deadlines import missed
from coordinator.policy.raising import raise_rungs
from coordinator.policy.shares import Allocation, Shares
from coordinator.policy.standing import Piece, Standing

Search = Callable[[Shares], Allocation]

CLEARLY = 0.03
"""Earlier than T by more than searches of many links are off."""
EQUAL = 1e-9
FEW_PARTS = 4
LINKS_A_PART = 256
"""Of many links: in the time that planning one part takes, so many are planned with all the others."""


def replanned(
    policy: StagedPolicy, scenario: Scenario, before: Plan, roughly: Search, thoroughly: Search
) -> Plan | None:
    """The plan of a scenario, made of the plan before; None where it must be made anew."""
    standing = before.standing
    if standing is None or before.policy != policy.name or not _comparable(scenario, standing.scenario):
        return None
    changed = _changed(scenario, standing)
    if changed is None:
        return None
    if not changed.size:
        return before
    return _Replanning(scenario, standing, changed, roughly, thoroughly).plan(policy)


def _comparable(scenario: Scenario, before: Scenario) -> bool:
    """Whether all but links and what is free of channels is the same."""
    return len(scenario.links) == len(before.links) and (
        replace(scenario, links=(), airtime_free={}) == replace(before, links=(), airtime_free={})
    )


def _changed(scenario: Scenario, standing: Standing) -> Ints | None:
    """Requests of which a link changed, or what is free of its channels; None if a link is another one."""
    links, before = scenario.links, standing.scenario.links
    others = compress(range(len(links)), map(is_not, links, before))
    changed = [index for index in others if links[index] != before[index]]
    if any(_who(links[index]) != _who(before[index]) for index in changed):
        return None
    free, freed = scenario.airtime_free, standing.scenario.airtime_free
    names = {name for name in {*free, *freed} if free.get(name, 1.0) != freed.get(name, 1.0)}
    if names:
        changed += [index for index, link in enumerate(links) if any(name in names for name, _ in link.channels)]
    return np.unique(standing.request[changed])


def _who(link: Link) -> tuple[object, ...]:
    """What makes it this link, and which others it shares something with."""
    ways = tuple(name for name, _ in link.channels) if link.link_bps > 0 else ()
    return link.request, link.sender, link.receiver, link.context_id, ways


class _Replanning:
    """One scenario and what stands of the plan before. changed: requests."""

    def __init__(
        self, scenario: Scenario, standing: Standing, changed: Ints, roughly: Search, thoroughly: Search
    ) -> None:
        self._scenario, self._standing = scenario, standing
        self._roughly, self._thoroughly = roughly, thoroughly
        self._parts = np.unique(standing.part[changed])
        self._stays: Flags = ~np.isin(standing.part, self._parts)
        self._before_s = standing.chosen.request_e2e_s
        self._due = bool(np.isfinite(standing.deadlines_s).all())
        """Whether deadlines are all that counts."""

    def plan(self, policy: StagedPolicy) -> Plan | None:
        """None if parts that stay may have to change too."""
        standing, rest = self._standing, self._stays & ~self._standing.alone
        if self._too_many(self._parts) or not self._stays[standing.request].any():
            return None
        if np.any(self._before_s[rest] > standing.deadlines_s[rest] * (1 + EQUAL)):
            return None
        rest_s = self._rest_s() if rest.any() else 0.0
        surely_s = max(rest_s, standing.least_s[self._stays].max())
        chosen = [self._chosen(part, surely_s) for part in self._parts]
        round_s = max(surely_s, *(piece.allocation.e2e_s for piece, _ in chosen))
        if not self._due and self._before_s[self._stays].max() > round_s * (1 + EQUAL):
            return None
        raised = [self._raised(piece, shares, round_s) for piece, shares in chosen]
        lowered = self._later_than(round_s)
        if self._too_many(lowered):
            return None
        raised += [self._again(part, round_s) for part in lowered]
        return self._plan(policy, [piece for piece, _ in chosen], raised, (rest_s, surely_s))

    def _too_many(self, parts: Ints) -> bool:
        """Whether planning all is quicker than planning so many by themselves."""
        return len(parts) > FEW_PARTS + len(self._scenario.links) // LINKS_A_PART

    def _rest_s(self) -> float:
        """Before which the parts that stay, of those planned as one, don't end; 0 if a changed one made them as late.

        It didn't if as it was it ended clearly earlier, or could have.
        """
        standing, rest_s = self._standing, self._standing.rest_s
        if self._due:
            return 0.0
        for part in self._parts:
            requests = standing.part == part
            if standing.alone[requests].any() or self._before_s[requests].max() * (1 + CLEARLY) < rest_s:
                continue
            was = self._roughly(Shares(self._of(standing.scenario, part)[0]))
            if was.e2e_s * (1 + CLEARLY) >= rest_s:
                return 0.0
        return rest_s

    def _of(self, scenario: Scenario, part: int) -> tuple[Scenario, Ints, Ints]:
        """A part as a scenario of its own, and its links and requests."""
        requests = np.flatnonzero(self._standing.part == part)
        links = np.flatnonzero(self._standing.part[self._standing.request] == part)
        number = {old: new for new, old in enumerate(requests.tolist())}
        made = tuple(replace(scenario.links[index], request=number[scenario.links[index].request]) for index in links)
        asked = tuple(scenario.requests[index] for index in requests)
        return replace(scenario, requests=asked, links=made), links, requests

    def _chosen(self, part: int, surely_s: float) -> tuple[Piece, Shares]:
        """The first choice by which the part ends no later than others do anyway, or the best of them."""
        scenario, links, requests = self._of(self._scenario, part)
        shares, deadlines_s = Shares(scenario), self._standing.deadlines_s[requests]
        tried: list[Allocation] = []
        for found in self._choices(shares, links):
            tried.append(found)
            ends_s = found.found.request_e2e_s
            if found.e2e_s <= surely_s * (1 + EQUAL) and np.all(ends_s <= deadlines_s):
                break
        best = min(tried, key=lambda each: missed(each.found.request_e2e_s, deadlines_s))
        return Piece(links, requests, best), shares

    def _choices(self, shares: Shares, links: Ints) -> Iterator[Allocation]:
        """From the quickest to the most thorough; where only deadlines count, the search that knows of them."""
        if not self._due:
            yield self._as_before(shares, links)
            yield self._roughly(shares)
        yield self._thoroughly(shares)

    def _as_before(self, shares: Shares, links: Ints) -> Allocation:
        """The splits that were, on the rungs that were if they are still allowed; text where no cache is."""
        table, chosen, before = shares.table, self._standing.chosen, self._standing.scenario.links
        own = np.where(shares.may_cache, np.minimum(chosen.own[links], table.tokens), table.tokens)
        was = np.array([before[index].tokens for index in links], dtype=np.float64)
        own = np.where(chosen.own[links] < was, own, table.tokens)
        rungs = [
            _place(link, before[index], int(chosen.rungs[index]))
            for index, link in zip(links.tolist(), shares.scenario.links, strict=True)
        ]
        return shares.allocate(own, np.where(own < table.tokens, rungs, 0))

    def _raised(self, piece: Piece, shares: Shares, round_s: float) -> Piece:
        """On higher rungs, unless the evaluator, which rates are not made by, sees it end beyond its limits."""
        base, deadlines_s = piece.allocation, self._standing.deadlines_s[piece.requests]
        raised = raise_rungs(shares, base, round_s)
        given_s = np.where(np.isinf(deadlines_s), round_s * (1 + self._scenario.tie_fraction), deadlines_s)
        limits_s = np.maximum(given_s, base.found.request_e2e_s) * (1 + EQUAL)
        return piece._replace(allocation=raised if np.all(raised.found.request_e2e_s <= limits_s) else base)

    def _later_than(self, round_s: float) -> Ints:
        """Parts that stay but were raised until later than what the round now allows."""
        standing = self._standing
        limit_s = round_s * (1 + self._scenario.tie_fraction) * (1 + EQUAL)
        late = self._stays & np.isinf(standing.deadlines_s) & (standing.raised.request_e2e_s > limit_s)
        return np.unique(standing.part[late])

    def _again(self, part: int, round_s: float) -> Piece:
        """A part that stays, raised anew from what was chosen of it."""
        scenario, links, requests = self._of(self._scenario, part)
        shares, chosen = Shares(scenario), self._standing.chosen
        return self._raised(
            Piece(links, requests, shares.allocate(chosen.own[links], chosen.rungs[links])), shares, round_s
        )

    def _plan(
        self, policy: StagedPolicy, chosen: Sequence[Piece], raised: Sequence[Piece], known_s: tuple[float, float]
    ) -> Plan:
        """known_s: before which the rest doesn't end, and all that stays."""
        before, (rest_s, surely_s) = self._standing, known_s
        known, question_s, least_s = before.known.copy(), before.question_s.copy(), before.least_s.copy()
        for piece in chosen:
            known[piece.links] = piece.allocation.table.known
            question_s[piece.requests] = piece.allocation.table.question_s
            late = piece.allocation.e2e_s > surely_s * (1 + EQUAL)
            least_s[piece.requests] = piece.allocation.e2e_s if late else 0.0
        return plan_of(
            policy,
            replace(
                before,
                scenario=self._scenario,
                known=known,
                question_s=question_s,
                chosen=before.chosen.exchanged(chosen),
                raised=before.raised.exchanged(raised),
                alone=before.alone | ~self._stays,
                least_s=least_s,
                rest_s=rest_s,
                given_table=None,
                given_part=before.part,
            ),
        )


def _place(link: Link, before: Link, place: int) -> int:
    """Of a rung that the link had, among those it has; the tightest if it is gone."""
    if link.rungs is before.rungs:
        return place
    names = [rung.name for rung in before.rungs[place : place + 1]]
    return next((at for at, rung in enumerate(link.rungs) if rung.name in names), 0)
