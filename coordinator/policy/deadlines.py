"""Of several deadlines the one that is missed by most decides, before the end of the round does.

Min-max over E2E ends all requests at once, the urgent one as late as the one that has time. With what is left from
each deadline to the latest of them added to its request's E2E, the same search makes the largest lateness as small as
it can, and a request that has time gives way to one that has none. A request without a deadline is given one PATIENCE
times later than the round ends otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from coordinator.numbers import Floats
from coordinator.policy.jmsra import FEW_LINKS, binary_choices
from coordinator.policy.shares import Allocation, Shares
from coordinator.timeline import timeline

PATIENCE = 3.0


def weighed(shares: Shares, best: Allocation, search: Callable[[Shares], Allocation]) -> Allocation:
    """What search found best, what it finds if urgent requests count more, or all of one medium or JMSRA's mixture:
    whichever misses deadlines by least.
    """
    scenario = shares.scenario
    deadlines_s = shares.table.deadlines_s
    if len(set(deadlines_s.tolist())) == 1 or np.all(best.found.request_e2e_s <= deadlines_s):
        return best
    latest_s = max(float(deadlines_s[np.isfinite(deadlines_s)].max()), PATIENCE * best.e2e_s)
    spare_s = (latest_s - np.minimum(deadlines_s, latest_s)).tolist()
    links = tuple(
        replace(link, receiver_overhead_s=link.receiver_overhead_s + spare_s[link.request]) for link in scenario.links
    )
    found = search(Shares(replace(scenario, links=links)))
    timed = timeline(shares.table, found.course)
    urgent = replace(found, table=shares.table, found=timed, within_s=timed.e2e_s)
    searched = shares.table.count <= FEW_LINKS
    binary = (shares.allocate(own) for own in binary_choices(shares, searched=searched))
    return min((best, urgent, *binary), key=lambda each: missed(each.found.request_e2e_s, deadlines_s))


def missed(e2e_s: Floats, deadlines_s: Floats) -> tuple[float, float, float]:
    """What counts first: the most by which a deadline is missed, by how much all are, the end of the round."""
    late_s = np.maximum(e2e_s - deadlines_s, 0.0)
    return float(late_s.max()), float(late_s.sum()), float(e2e_s.max())
