"""What each policy makes of one round: E2E by the coordinator's evaluator, on the tightest rungs of the floor."""

from __future__ import annotations

from itertools import product

import numpy as np
from msgspec import Struct

from coordinator.latency import Scenario
from coordinator.numbers import Floats
from coordinator.policy.base import StagedPolicy
from coordinator.policy.fixed import CachePolicy, TokenPolicy
from coordinator.policy.jmsra import JmsraPolicy
from coordinator.policy.optimum import OptimumPolicy, starting_rungs
from coordinator.policy.shares import Allocation, Shares

MOST_EXHAUSTED = 10
"""Links up to which all media vectors are tried."""
NEAR = 1.02
"""Media vectors whose min-max T is within this of the least are compared by the evaluator as well, NEAREST of them."""
NEAREST = 16
BASELINES: tuple[StagedPolicy, ...] = (TokenPolicy(), CachePolicy(), JmsraPolicy())


class Compared(Struct, frozen=True, kw_only=True):
    """E2E in seconds of one round. binary: the best of all media vectors, None for more than MOST_EXHAUSTED links.

    splits: links that optimum splits; tokens, caches: those that it does not.
    """

    token: float
    kv: float
    jmsra: float
    binary: float | None
    optimum: float
    bound: float
    tokens: int
    caches: int
    splits: int


def compare(scenario: Scenario) -> Compared:
    """All of them, on the same shares."""
    shares = Shares(scenario)
    baselines = {policy.name: policy.choose(shares) for policy in BASELINES}
    policy = OptimumPolicy()
    chosen = policy.choose(shares)
    own, tokens = chosen.own, shares.table.tokens
    return Compared(
        **{name: found.e2e_s for name, found in baselines.items()},
        binary=best_binary_s(shares, list(baselines.values())),
        optimum=chosen.e2e_s,
        bound=policy.bound_s(shares, chosen),
        tokens=int(np.sum(own >= tokens)),
        caches=int(np.sum(own == 0)),
        splits=int(np.sum((own > 0) & (own < tokens))),
    )


def best_binary_s(shares: Shares, known: list[Allocation]) -> float | None:
    """The least E2E of any media vector: of the least min-max T over all of them, its neighbours, and what is known.

    On the tightest rungs, and on those of each link that code fastest.
    """
    if shares.table.count > MOST_EXHAUSTED:
        return None
    own, found = _media(shares), list(known)
    for rungs in starting_rungs(shares):
        ends_s = shares.ends(shares.rows(own, rungs), later=NEAR - 1)
        near = np.flatnonzero(ends_s <= ends_s.min() * NEAR)
        tried = dict.fromkeys([int(ends_s.argmin()), *near[:NEAREST].tolist()])
        found += [shares.allocate(own[row], rungs) for row in tried]
    return min(each.e2e_s for each in found)


def _media(shares: Shares) -> Floats:
    """Own tokens of every media vector, (M, K)."""
    vectors = np.array(list(product([False, True], repeat=shares.table.count)))
    return shares.own_of(np.unique(vectors & shares.may_cache, axis=0))
