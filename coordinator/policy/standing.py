"""What of a plan stands when another is made of it: columns by link and by request, of which parts can be exchanged.

Links that share a receiver, a sender or a channel are of one part, whatever lies between them; nothing that is decided
of one part takes time or airtime from another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from coordinator.latency import Scenario
from coordinator.numbers import Flags, Floats, Ints
from coordinator.policy.shares import Allocation, Shares
from coordinator.table import Table, deadlines_of
from coordinator.timeline import Course, Timeline

_DECIDED = ("own", "token_bits", "encode_s", "decode_s", "rates")
_BY_LINK = ("sender_prefill_s", "encode_s", "transfer_s", "decode_s", "receiver_prefill_s", "arrive_s")


class Piece(NamedTuple):
    """One part, planned as a scenario of its own: which links and requests of the whole these are."""

    links: Ints
    requests: Ints
    allocation: Allocation


@dataclass(frozen=True, eq=False)
class Laid:
    """An allocation without its table. within_s: (R,) what is guaranteed to the part of each request."""

    rungs: Ints
    course: Course
    found: Timeline
    within_s: Floats

    @classmethod
    def of(cls, allocation: Allocation) -> Laid:
        """As it is."""
        within_s = np.full(len(allocation.found.request_e2e_s), allocation.within_s)
        return cls(allocation.rungs, allocation.course, allocation.found, within_s)

    @property
    def own(self) -> Floats:
        """(K,) tokens that receivers prefill."""
        return self.course.own

    @property
    def request_e2e_s(self) -> Floats:
        """(R,)."""
        return self.found.request_e2e_s

    def exchanged(self, pieces: Sequence[Piece]) -> Laid:
        """With these parts in their places."""
        if not pieces:
            return self
        links, requests = (np.concatenate([piece[place] for piece in pieces]) for place in (0, 1))
        others = [Laid.of(piece.allocation) for piece in pieces]

        def joined(places: Ints, whole: object, pieces: Sequence[object], name: str) -> Any:
            found = getattr(whole, name).copy()
            found[places] = np.concatenate([getattr(each, name) for each in pieces])
            return found

        courses, timelines = [each.course for each in others], [each.found for each in others]
        by_link = {name: joined(links, self.found, timelines, name) for name in _BY_LINK}
        by_request = joined(requests, self.found, timelines, "request_e2e_s")
        return Laid(
            joined(links, self, others, "rungs"),
            replace(self.course, **{name: joined(links, self.course, courses, name) for name in _DECIDED}),
            Timeline(**by_link, request_e2e_s=by_request),
            joined(requests, self, others, "within_s"),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Standing:
    """A plan before it is told: chosen (on the first rungs) and raised, with what both rest on.

    request: (K,); known: (K,); question_s: (R,); alone: (R,) of which requests the part was planned by itself; least_s:
    (R,) an E2E before which the part doesn't end, as far as the search can tell, rest_s: before which those planned
    as one don't; 0 where that isn't known.
    given_table, given_part: where they are at hand already.
    """

    scenario: Scenario
    request: Ints
    known: Flags
    question_s: Floats
    chosen: Laid
    raised: Laid
    alone: Flags
    least_s: Floats
    rest_s: float
    given_table: Table | None = field(default=None, repr=False)
    given_part: Ints | None = field(default=None, repr=False)

    @classmethod
    def of(cls, chosen: Allocation, raised: Allocation) -> Standing:
        """Of a scenario that was planned as one."""
        table = chosen.table
        requests = table.scenario.requests
        in_time = np.all(chosen.found.request_e2e_s <= table.deadlines_s)
        return cls(
            scenario=table.scenario,
            request=table.request,
            known=table.known,
            question_s=table.question_s,
            chosen=Laid.of(chosen),
            raised=Laid.of(raised),
            alone=np.zeros(len(requests), dtype=bool),
            least_s=np.zeros(len(requests)),
            rest_s=chosen.e2e_s if in_time else 0.0,
            given_table=table,
        )

    @cached_property
    def table(self) -> Table:
        """Of the whole scenario."""
        return self.given_table or Table(self.scenario)

    @cached_property
    def part(self) -> Ints:
        """(R,): which part each request is of, by the number of its first request."""
        return parts(self.table) if self.given_part is None else self.given_part

    @cached_property
    def deadlines_s(self) -> Floats:
        """(R,); infinite for a request without one."""
        return deadlines_of(self.scenario.requests)

    def allocation(self, laid: Laid) -> Allocation:
        """With its table again."""
        sent_bits = Shares(self.scenario, self.table).rows(laid.own[None, :], laid.rungs).sent_bits
        within_s = float(laid.within_s.max())
        return Allocation(self.table, laid.own, laid.rungs, laid.course, within_s, float(sent_bits[0]), laid.found)


def parts(table: Table) -> Ints:
    """(R,): of each request the lowest that it shares an agent or a channel with, over whatever others."""
    pair_request = table.request[table.pair_link]
    ways = (
        (table.request, table.senders.index, table.senders.count),
        (table.request, table.receivers.index, table.receivers.count),
        (pair_request, table.pair_channel, len(table.free)),
    )
    found = np.arange(len(table.scenario.requests))
    while True:
        before = found
        for request, group, count in ways:
            least = np.full(count, len(found))
            np.minimum.at(least, group, found[request])
            found = found.copy()
            np.minimum.at(found, request, least[group])
        found = found[found]
        if np.array_equal(found, before):
            return found
