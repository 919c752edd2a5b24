"""Bits go to the layers that need them, in the paper's shares."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import RecipeInvalid
from edge_agent.kv.allocation import allocate

sensitivities = st.lists(st.floats(0, 1e6), min_size=1, max_size=64)


@given(sensitivities, st.integers(4, 8))
def test_thirty_forty_thirty(sensitivity: list[float], target: int) -> None:
    bits = allocate(sensitivity, target)
    outer = round(0.3 * len(sensitivity))
    assert Counter(bits) == Counter([8] * outer + [4] * outer + [target] * (len(sensitivity) - 2 * outer))


@given(sensitivities, st.integers(4, 8))
def test_no_layer_has_fewer_bits_than_a_less_sensitive_one(sensitivity: list[float], target: int) -> None:
    bits = allocate(sensitivity, target)
    order = sorted(range(len(bits)), key=lambda layer: -sensitivity[layer])
    assert all(bits[one] >= bits[other] for one, other in pairwise(order) if sensitivity[one] > sensitivity[other])


@pytest.mark.parametrize(("target", "mean"), [(4, 5.2), (6, 6.0), (8, 6.8)])
def test_mean_bits_of_thirty_layers(target: int, mean: float) -> None:
    assert sum(allocate(list(range(30)), target)) / 30 == pytest.approx(mean)


def test_among_equals_the_earlier_layer_gets_more() -> None:
    assert allocate([1.0] * 10, 6) == (8, 8, 8, 6, 6, 6, 6, 4, 4, 4)


@pytest.mark.parametrize("target", [3, 9])
def test_a_target_outside_its_bounds_is_refused(target: int) -> None:
    with pytest.raises(RecipeInvalid, match=f"target {target}"):
        allocate([1.0, 2.0], target)
