"""Layers are chosen by attention and a Gaussian prior as Q-KVComm's equations say, in our reading of the first."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import CacheInvalid, RecipeInvalid
from edge_agent.kv.cache import Cache, Layer
from edge_agent.kv.selection import (
    SINK_TOKENS,
    Selection,
    attention_on_context,
    best_layers,
    gaussian_prior,
    layer_scores,
)

figures = st.lists(st.floats(0, 1), min_size=1, max_size=40)


def with_mass(shares: list[list[float]]) -> Cache:
    """A cache of one KV head and one dimension whose entries got these shares of attention, by layer."""
    layers = []
    for row in shares:
        nothing = np.zeros((1, len(row), 1), dtype=np.float32)
        mass = np.array([row], dtype=np.float32)
        layers.append(Layer(nothing, nothing, np.arange(len(row), dtype=np.int32), mass))
    return Cache(tuple(layers))


@pytest.mark.parametrize("layers", [1, 2, 18, 30])
def test_the_prior_is_the_papers_gaussian(layers: int) -> None:
    found = gaussian_prior(layers, 0.5, 0.25)
    mu, sigma = 0.5 * layers, 0.25 * layers
    assert found == pytest.approx([math.exp(-((depth - mu) ** 2) / (2 * sigma**2)) for depth in range(layers)])


def test_the_sinks_attention_does_not_count() -> None:
    cache = with_mass([[0.9, 0, 0, 0, 0.05, 0.01], [0.1, 0, 0, 0, 0.05, 0.03]])
    assert attention_on_context(cache) == pytest.approx([0.06, 0.08])


def test_sinks_are_known_by_their_position_in_the_context_not_in_a_part_of_it() -> None:
    cache = with_mass([[0.1] * 8]).between(SINK_TOKENS - 1, 8)
    assert attention_on_context(cache) == pytest.approx([0.4])


def test_heads_are_averaged() -> None:
    nothing = np.zeros((2, 5, 1), dtype=np.float32)
    mass = np.array([[0, 0, 0, 0, 0.2], [0, 0, 0, 0, 0.6]], dtype=np.float32)
    cache = Cache((Layer(nothing, nothing, np.arange(5, dtype=np.int32), mass),))
    assert attention_on_context(cache) == pytest.approx([0.4])


def test_a_cache_without_attention_is_refused_by_name() -> None:
    cache = with_mass([[0.1] * 5])
    bare = Cache((Layer(cache.layers[0].keys, cache.layers[0].values, cache.layers[0].positions),))
    with pytest.raises(CacheInvalid, match="layer 0"):
        attention_on_context(bare)


@given(figures, st.floats(0, 1))
def test_scores_are_the_weighted_sum_of_scaled_attention_and_prior(attention: list[float], alpha: float) -> None:
    low, high = min(attention), max(attention)
    scaled = [(each - low) / (high - low) if high > low else 0.0 for each in attention]
    prior = gaussian_prior(len(attention), 0.5, 0.25)
    found = layer_scores(np.array(attention), Selection(alpha=alpha))
    assert found == pytest.approx([alpha * a + (1 - alpha) * p for a, p in zip(scaled, prior, strict=True)])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40), st.floats(0.1, 10), st.floats(0, 5))
def test_the_scale_of_attention_does_not_matter(attention: list[float], factor: float, offset: float) -> None:
    one = layer_scores(np.array(attention), Selection())
    other = layer_scores(np.array(attention) * factor + offset, Selection())
    if np.ptp(attention) > 1e-6:
        assert other == pytest.approx(one, abs=1e-6)


@given(figures, st.floats(0.01, 1))
def test_the_best_share_of_the_layers_is_sent_and_no_worse_one(scores: list[float], ratio: float) -> None:
    found = best_layers(scores, ratio)
    assert len(found) == max(1, round(ratio * len(scores)))
    assert all(a < b for a, b in pairwise(found))
    left = [score for layer, score in enumerate(scores) if layer not in found]
    assert min(scores[layer] for layer in found) >= max(left, default=0.0)


def test_the_papers_share_of_thirty_layers_is_twenty_one() -> None:
    assert len(best_layers(gaussian_prior(30, 0.5, 0.25), 0.7)) == 21


def test_with_the_prior_alone_the_middle_is_sent() -> None:
    scores = layer_scores(np.arange(10, dtype=np.float64), Selection(alpha=0))
    assert best_layers(scores, 0.5) == (3, 4, 5, 6, 7)


@pytest.mark.parametrize("wrong", [{"ratio": 0}, {"ratio": 1.1}, {"alpha": -0.1}, {"alpha": 2}, {"prior_spread": 0}])
def test_shares_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeInvalid):
        Selection(**wrong)
