"""Quantization keeps every element within half a step, whatever the range."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_agent.errors import CacheInvalid, RecipeInvalid
from edge_agent.kv.quantize import dequantize, quantize

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
tensors = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=finite)


@given(tensors, st.integers(1, 8))
@example(np.array([-3.4e38, 3.4e38, 0], dtype=np.float32), 8)  # the range overflows float32
@example(np.array([3.4028235e38, 0], dtype=np.float32), 5)  # the step, rounded, times the levels overflows
@example(np.array([0, 1e-45, 7e-45], dtype=np.float32), 8)  # the step underflows float32
@example(np.array([1e5, 1e5 + 0.01, 1e5 + 1], dtype=np.float32), 8)  # the paper's zero point would cancel
def test_every_element_comes_back_within_half_a_step(x: np.ndarray, bits: int) -> None:
    back = dequantize(quantize(x, bits))
    assert back.dtype == np.float32
    assert back.shape == x.shape
    wide = x.astype(np.float64)
    step = (wide.max() - wide.min()) / (2**bits - 1)
    rounding = 4 * np.finfo(np.float32).eps * np.abs(wide).max() + 2e-45
    assert np.abs(back - wide).max() <= step / 2 * (1 + 1e-5) + rounding


@given(finite, st.integers(1, 8))
def test_a_constant_tensor_is_exact(value: float, bits: int) -> None:
    x = np.full((2, 3), value, dtype=np.float32)
    assert np.array_equal(dequantize(quantize(x, bits)), x)


@given(tensors, st.integers(1, 8))
def test_codes_are_those_of_the_papers_formula_in_float64(x: np.ndarray, bits: int) -> None:
    q = quantize(x, bits)
    wide, levels = x.astype(np.float64), 2**bits - 1
    spread = wide.max() - wide.min()
    if spread == 0:
        assert not q.codes.any()
        return
    exact = np.clip((wide - wide.min()) / (spread / levels), 0, levels)
    slack = 0.5 + 1e-3 + 8 * np.finfo(np.float32).eps * np.abs(wide).max() / (spread / levels)
    assert np.abs(q.codes - exact).max() <= slack


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_nan_or_an_infinity_is_refused(poison: float) -> None:
    with pytest.raises(CacheInvalid, match="NaN or an infinity"):
        quantize(np.array([1.0, poison], dtype=np.float32), 4)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_outside_1_to_8_are_refused(bits: int) -> None:
    with pytest.raises(RecipeInvalid, match=f"{bits} bits"):
        quantize(np.ones(3, dtype=np.float32), bits)


def test_nothing_quantizes_to_nothing() -> None:
    assert dequantize(quantize(np.zeros((2, 0, 3), dtype=np.float32), 4)).shape == (2, 0, 3)
