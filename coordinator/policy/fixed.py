"""The two fixed policies: every link as tokens, every link as cache (NL-only and KV-only of methods, section 2).

They run at the same quality floor, shares and evaluator as the others, so that a comparison is of media alone.
"""

from __future__ import annotations

import numpy as np

from coordinator.numbers import Flags
from coordinator.policy.base import BinaryPolicy
from coordinator.policy.shares import Shares


class TokenPolicy(BinaryPolicy):
    """All links as tokens."""

    name = "token"

    def media(self, shares: Shares) -> Flags:
        """No link carries a cache."""
        return np.zeros_like(shares.may_cache)


class CachePolicy(BinaryPolicy):
    """All links as cache, but those that have no rung or were not measured."""

    name = "kv"

    def media(self, shares: Shares) -> Flags:
        """Every link that may."""
        return shares.may_cache.copy()
