"""JMSRA: joint media selection and resource allocation (methods, section 2; arXiv 2605.25422).

Low-complexity form, bi-directional greedy: from all tokens, and again from all caches, flip the medium of the link that
lowers the round's E2E most, until none lowers it; keep the better end. E2E within a search is the T of min-max
allocation; the ends, and the two all-one-medium starts, are then compared by what the evaluator says, so the result is
never worse than `token` or `kv` at the same rungs. Ties go to fewer bytes.

For one link that has the channel to itself the answer is closed (`cache_wins`); the tests hold it against the search.
"""

from __future__ import annotations

import numpy as np

from coordinator.numbers import Flags, Floats
from coordinator.policy.base import BinaryPolicy
from coordinator.policy.shares import Allocation, Shares

TIE_S = 1e-9
FEW_LINKS = 32
"""Up to so many another policy asks for the search too, whose time grows with the cube of links."""


class JmsraPolicy(BinaryPolicy):
    """Bi-directional greedy over media, min-max shares by bisection."""

    name = "jmsra"

    def media(self, shares: Shares) -> Flags:
        """The best of both greedy ends and both starts."""
        return best([shares.allocate(own) for own in binary_choices(shares, searched=True)]).carries


def binary_choices(shares: Shares, *, searched: bool) -> list[Floats]:
    """All tokens and all caches, and, if searched, both greedy ends: own tokens (K,), each choice once."""
    tokens, caches = np.zeros_like(shares.may_cache), shares.may_cache.copy()
    choices = [tokens, caches]
    if searched:
        choices += [greedy(shares, tokens), greedy(shares, caches)]
    distinct = {choice.tobytes(): shares.own_of(choice) for choice in choices}
    return list(distinct.values())


def best(allocations: list[Allocation]) -> Allocation:
    """The lowest E2E; among those within TIE_S of it the fewest bits, then the one that comes first."""
    lowest_s = min(allocation.e2e_s for allocation in allocations)
    tied = [allocation for allocation in allocations if allocation.e2e_s <= lowest_s + TIE_S]
    return min(tied, key=lambda allocation: allocation.bits)


def greedy(shares: Shares, start: Flags) -> Flags:
    """Flips the link that lowers the round's E2E most, until none does. Both directions of a flip are open."""
    cache, free = start, shares.named_order[shares.may_cache[shares.named_order]]
    tightest = shares.tightest()
    at_start = shares.least(shares.rows(shares.own_of(cache)[None, :], tightest))
    if not free.size or at_start is None:
        return cache
    now_s = at_start[1]
    while True:
        flips = np.repeat(cache[None, :], len(free), axis=0)
        flips[np.arange(len(free)), free] ^= True
        rows = shares.rows(shares.own_of(flips), tightest)
        found = shares.least(rows, below_s=now_s - TIE_S * max(1.0, now_s))
        if found is None:
            return cache
        tied, now_s = found
        cache = flips[tied[np.argmin(rows.sent_bits[tied])]]


def switching_rate(bits_kv: float, bits_nl: float, compute_kv_s: float, compute_nl_s: float) -> float | None:
    """R* in bits per second: the rate of one link at which cache and tokens take equally long. None: at no rate.

    R* = (bits_kv - bits_nl) / (compute_nl_s - compute_kv_s). Four cases, by what the cache costs beside the tokens:

    more bits, less compute   (the usual one) the cache wins iff the rate exceeds R*
    more bits, more compute   the cache never wins
    fewer bits, less compute  the cache always wins
    fewer bits, more compute  the cache wins iff the rate is below R*
    """
    more_bits, saved_s = bits_kv - bits_nl, compute_nl_s - compute_kv_s
    if more_bits * saved_s <= 0:
        return None
    return more_bits / saved_s


def cache_wins(rate_bps: float, *, bits_kv: float, bits_nl: float, compute_kv_s: float, compute_nl_s: float) -> bool:
    """Whether the cache of a lone link is faster than its tokens. A tie goes to the one with fewer bits."""
    threshold = switching_rate(bits_kv, bits_nl, compute_kv_s, compute_nl_s)
    if threshold is not None:
        return rate_bps > threshold if bits_kv > bits_nl else rate_bps <= threshold
    return (bits_kv, compute_kv_s) != (bits_nl, compute_nl_s) and bits_kv <= bits_nl and compute_kv_s <= compute_nl_s
