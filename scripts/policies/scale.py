"""Seconds that planning takes on one core, by stage, for many links."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

from msgspec import Struct
from threadpoolctl import threadpool_limits

from coordinator.latency import TIE_FRACTION, Scenario
from coordinator.policy.bound import lower_bound
from coordinator.policy.optimum import OptimumPolicy
from coordinator.policy.raising import raise_rungs
from coordinator.policy.shares import Shares
from coordinator.table import Table
from scripts.policies.scenarios import Network, random_round

SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
NETWORKS = (Network.OWN, Network.CELL)
STAGES = ("table", "choice", "rungs", "bound", "plan", "again", "links")
LEFT = 2 / 3
"""Of its rate, to the link that changes."""
GROWTH = 1.5
"""What takes longer is not measured again: a stage is expected to take its last time × (more links)^GROWTH."""


class Timed(Struct, frozen=True, kw_only=True):
    """Process seconds of each stage at a number of links, the least of the repeats: what it takes if nobody else works
    on the machine. None: it would take longer than is allowed. plan_median_s: of the same repeats.

    plan: `OptimumPolicy.plan`, which is table, choice and rungs; again: `OptimumPolicy.replan` of that plan when one
    link's rate has changed; links: what a plan says of each, as values. These and the bound are worked out only where
    they are asked for.
    """

    network: Network
    links: int
    repeats: int
    seconds: dict[str, float | None]
    plan_median_s: float | None


def steps(sizes: tuple[int, ...]) -> int:
    """Rounds to plan."""
    return len(NETWORKS) * len(sizes)


def scale(sizes: tuple[int, ...], repeats: int, longest_s: float, hear: Callable[[str], None]) -> tuple[Timed, ...]:
    """One receiver per ten links, on links of their own and in cells; hear is told before each size.

    The more a round takes, the fewer repeats, at least one.
    """
    found: list[Timed] = []
    with threadpool_limits(1):
        for network in NETWORKS:
            last: Timed | None = None
            for links in sizes:
                hear(f"{links} links, {network.value}")
                last = _timed(network, links, repeats, longest_s, last)
                found.append(last)
    return tuple(found)


def _timed(network: Network, links: int, repeats: int, longest_s: float, last: Timed | None) -> Timed:
    scenario = replace(random_round(links, network, links), tie_fraction=TIE_FRACTION)
    allowed = {stage: _expected_s(stage, links, last) <= longest_s for stage in STAGES}
    runs: list[dict[str, float]] = []
    began_s = time.process_time()
    while not runs or (len(runs) < repeats and time.process_time() - began_s < longest_s / 4):
        gc.collect()
        runs.append(_stages(scenario, allowed))
    return Timed(
        network=network,
        links=links,
        repeats=len(runs),
        seconds={stage: min(run[stage] for run in runs) if stage in runs[0] else None for stage in STAGES},
        plan_median_s=median(run["plan"] for run in runs) if "plan" in runs[0] else None,
    )


def _expected_s(stage: str, links: int, last: Timed | None) -> float:
    if last is None:
        return 0.0
    before_s = last.seconds[stage]
    return float("inf") if before_s is None else before_s * float((links / last.links) ** GROWTH)


def with_slower_link(scenario: Scenario) -> Scenario:
    """The same when the link in the middle has lost a third of its rate."""
    index = len(scenario.links) // 2
    link = scenario.links[index]
    channels = tuple((name, bps * LEFT) for name, bps in link.channels)
    slower = replace(link, link_bps=link.link_bps * LEFT, channels=channels)
    return replace(scenario, links=(*scenario.links[:index], slower, *scenario.links[index + 1 :]))


def _stages(scenario: Scenario, allowed: dict[str, bool]) -> dict[str, float]:
    """Process seconds of the stages that are allowed; each needs what comes before it."""
    policy, seconds = OptimumPolicy(), {}

    def timed(stage: str, job: Callable[[], Any]) -> Any:
        before_s = time.process_time()
        result = job()
        seconds[stage] = time.process_time() - before_s
        return result

    if allowed["table"]:
        shares = Shares(scenario, timed("table", lambda: Table(scenario)))
        if allowed["choice"]:
            chosen = timed("choice", lambda: policy.choose(shares))
            if allowed["rungs"]:
                timed("rungs", lambda: raise_rungs(shares, chosen))
            if allowed["bound"]:
                timed("bound", lambda: lower_bound(shares, chosen))
    if allowed["plan"]:
        plan = timed("plan", lambda: policy.plan(scenario))
        if allowed["again"]:
            slower = with_slower_link(scenario)
            timed("again", lambda: policy.replan(slower, plan))
        if allowed["links"]:
            timed("links", lambda: plan.links)
    return seconds
