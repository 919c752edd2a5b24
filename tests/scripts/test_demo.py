"""The demo's play, apart from the stage."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from scripts.demo.script import POLICIES, in_turn


def test_no_policy_is_always_behind_the_same_one_or_in_the_same_place() -> None:
    """What a question leaves to be done slows the next: over four questions each pays for every other once."""
    orders = [in_turn(question) for question in range(4)]
    assert all(sorted(order) == sorted(POLICIES) for order in orders)
    assert set(Counter(pair for order in orders for pair in pairwise(order)).values()) == {1}
    assert all(len(set(place)) == len(POLICIES) for place in zip(*orders, strict=True))
    assert in_turn(5) == in_turn(1)
