"""The fitted transform: uncorrelated components that cost alike, from sums that anybody can check."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.messages import Rung
from edge_agent.kv.cache import Layer
from scripts.prepare_model import fitting, ladder
from scripts.prepare_model.fitting import Moments
from tests import tiny
from tests.scripts.followed import costs

LAYERS, HEADS, DIM, ROWS = 2, 2, 3, 4_000
WIDTH = 2 * HEADS * DIM


@pytest.fixture(scope="module")
def fitted() -> tuple[Moments, np.ndarray, np.ndarray]:
    """Moments of correlated rows with a mean, (layers, rows, width), and of gradients at them."""
    rng = np.random.default_rng(3)
    mix = rng.standard_normal((2, LAYERS, WIDTH, WIDTH))
    rows = (rng.standard_normal((LAYERS, ROWS, WIDTH)) @ mix[0] + 2.0).astype(np.float32)
    gradients = (rng.standard_normal((LAYERS, ROWS, WIDTH)) @ mix[1]).astype(np.float32)
    moments = Moments(LAYERS, WIDTH)
    for layer in range(LAYERS):
        for part in (slice(0, 1_500), slice(1_500, ROWS)):
            moments.add(layer, rows[layer, part])
            moments.add_gradients(layer, gradients[layer, part])
    moments.rows, moments.samples = ROWS, 100
    return moments, rows, gradients


def analysis(moments: Moments) -> np.ndarray:
    found = moments.fit()
    return found.analysis.astype(np.float64) * found.scale[:, None, :]


def test_components_are_uncorrelated_and_as_spread_as_is_said(
    fitted: tuple[Moments, np.ndarray, np.ndarray],
) -> None:
    moments, rows, _ = fitted
    transform = moments.fit()
    for layer, matrix in enumerate(analysis(moments)):
        components = (rows[layer] - transform.mean[layer]) @ matrix
        covariance = np.cov(components.T)
        np.testing.assert_allclose(np.sqrt(np.diag(covariance)), transform.deviation[layer], rtol=5e-3)
        apart = covariance / np.outer(transform.deviation[layer], transform.deviation[layer])
        assert np.abs(apart - np.diag(np.diag(apart))).max() < 0.02  # half precision of what is stored
        assert (np.diff(transform.deviation[layer]) <= 0).all()


def test_an_error_of_one_step_costs_alike_in_every_component(
    fitted: tuple[Moments, np.ndarray, np.ndarray],
) -> None:
    moments, _, gradients = fitted
    for layer, matrix in enumerate(analysis(moments)):
        costs = gradients[layer].T.astype(np.float64) @ gradients[layer] / moments.samples
        half = WIDTH // 2
        smoothed = np.zeros_like(costs)
        for at in (slice(0, half), slice(half, WIDTH)):
            smoothed[at, at] = costs[at, at] + fitting.SMOOTHING * np.trace(costs[at, at]) / half * np.eye(half)
        back = np.linalg.inv(matrix)  # a step of a component, as an error of the row
        per_step = back @ smoothed @ back.T
        np.testing.assert_allclose(per_step, per_step[0, 0] * np.eye(WIDTH), atol=0.02 * per_step[0, 0])


def test_layers_share_one_measure_of_cost(fitted: tuple[Moments, np.ndarray, np.ndarray]) -> None:
    """Twice the gradients in one layer alone make its components twice as many steps wide."""
    moments, rows, gradients = fitted
    other = Moments(LAYERS, WIDTH)
    for layer, times in enumerate((1, 2)):
        other.add(layer, rows[layer])
        other.add_gradients(layer, times * gradients[layer])
    other.rows, other.samples = moments.rows, moments.samples
    before, after = moments.fit().deviation, other.fit().deviation
    ratio = (after[1] / after[0]) / (before[1] / before[0])
    np.testing.assert_allclose(ratio, 2.0, rtol=1e-3)


def test_the_finest_level_takes_the_bits_it_is_meant_to(fitted: tuple[Moments, np.ndarray, np.ndarray]) -> None:
    deviation = fitted[0].fit().deviation.astype(np.float64)
    bits = 0.5 * np.log2(1 + 2 * np.pi * np.e * deviation**2)
    assert bits.mean() == pytest.approx(fitting.FINEST_BITS, abs=0.01)


def test_entries_come_back_through_a_fitted_transform(fitted: tuple[Moments, np.ndarray, np.ndarray]) -> None:
    moments, rows, _ = fitted
    transform = moments.fit()
    for layer in range(LAYERS):
        halves = rows[layer, :50].reshape(50, 2, HEADS, DIM).transpose(1, 2, 0, 3)
        entries = Layer(halves[0], halves[1], np.arange(50, dtype=np.int32))
        keys, values = transform.entries(layer, transform.symbols(layer, entries, 0), 0, HEADS)
        wrong = np.sqrt(np.mean((keys - entries.keys) ** 2 + (values - entries.values) ** 2))
        assert wrong < 0.2 * rows[layer].std()


def test_a_layer_that_no_answer_depends_on_is_fitted_all_the_same() -> None:
    moments = Moments(1, WIDTH)
    moments.add(0, np.random.default_rng(0).standard_normal((50, WIDTH)).astype(np.float32))
    moments.rows, moments.samples = 50, 1
    assert np.isfinite(analysis(moments)).all()


def test_nothing_can_be_fitted_to_nothing() -> None:
    with pytest.raises(ValueError, match="no passage"):
        Moments(1, WIDTH).fit()


def rung(name: str, bits: float, kl: float, agreement: float) -> Rung:
    return Rung(name=name, bits_per_element=bits, kl=kl, agreement=agreement)


def test_the_front_holds_what_nothing_beats() -> None:
    kept = ladder.front(
        [rung("a", 32, 0, 1), rung("b", 8, 0.01, 0.9), rung("c", 4, 0.009, 0.95), rung("d", 2, 0.1, 0.8)]
    )
    assert [each.name for each in kept] == ["a", "c", "d"]
    kept = ladder.front([rung("b", 8, 0.01, 0.96), rung("c", 4, 0.009, 0.95)])
    assert [each.name for each in kept] == ["b", "c"]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_whatever_left_the_front_is_beaten_by_something_in_it(figures: list[tuple[int, int, int]]) -> None:
    rungs = [rung(f"r{i}", bits, kl / 10, agreement / 10) for i, (bits, kl, agreement) in enumerate(figures)]
    kept = ladder.front(rungs)
    assert kept
    for gone in set(rungs) - set(kept):
        assert any(
            by.bits_per_element <= gone.bits_per_element and by.kl <= gone.kl and by.agreement >= gone.agreement
            for by in kept
        )
    assert [each.bits_per_element for each in kept] == sorted((each.bits_per_element for each in kept), reverse=True)


@pytest.mark.parametrize("source", [pytest.param(tiny.tiny_source, marks=pytest.mark.slow), tiny.tiny_gemma_source])
def test_gradients_say_what_errors_cost(source: Callable[[], Path]) -> None:
    """Also in layers whose sliding window is shorter than the context, and along directions without phase."""
    for cost in costs(source()):
        assert cost.measured == pytest.approx(cost.predicted, rel=0.35, abs=1e-9), cost
