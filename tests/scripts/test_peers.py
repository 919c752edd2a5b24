"""Quantization by groups is what its authors define, and every byte of it is counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import CacheInvalid
from edge_agent.kv.cache import Float32
from scripts.peers.groups import GROUP, Along, Grouped, dequantize, grouped, quantize
from tests.scripts.caches import random_cache, random_tensor

ALONG: tuple[Along, ...] = ("tokens", "channels")


def _by_definition(x: Float32, sent: Grouped) -> np.ndarray:
    """Element by element in float64, by the scales and minima as stored, once those are the groups'."""
    lines = (x.swapaxes(1, 2) if sent.along == "tokens" else x).astype(np.float64)
    scales, minima = (stored.astype(np.float64).reshape(*lines.shape[:2], -1) for stored in (sent.scales, sent.minima))
    out = np.empty_like(lines)
    for at in np.ndindex(*scales.shape):
        place = (*at[:2], slice(at[2] * GROUP, (at[2] + 1) * GROUP))
        group, low, step = lines[place], minima[at], scales[at]
        assert low == pytest.approx(group.min(), rel=2**-10)
        assert step == pytest.approx((group.max() - group.min()) / (2**sent.bits - 1), rel=2**-10, abs=1e-6)
        out[place] = low + step * np.clip(np.round((group - low) / (step or 1.0)), 0, 2**sent.bits - 1)
    return out.swapaxes(1, 2) if sent.along == "tokens" else out


@given(
    seed=st.integers(0, 99),
    bits=st.sampled_from((2, 3, 4, 8)),
    along=st.sampled_from(ALONG),
    tokens=st.integers(1, 70),
    channels=st.integers(1, 70),
)
def test_groups_are_quantized_as_defined(seed: int, bits: int, along: Along, tokens: int, channels: int) -> None:
    x = random_tensor(seed, tokens=tokens, channels=channels)
    sent = quantize(x, bits, along)
    found, wanted = dequantize(sent), _by_definition(x, sent)
    assert found.shape == x.shape
    assert found.dtype == np.float32
    off = np.abs(found - wanted) > 1e-4  # float32 may round a code that is almost halfway to the other side
    assert off.sum() <= 1 + off.size / 100
    assert np.abs(found - x).max() <= 0.51 * (x.max() - x.min()) / (2**bits - 1) + np.abs(x).max() / 1000


@given(bits=st.integers(1, 8), along=st.sampled_from(ALONG))
def test_every_byte_of_scales_and_minima_is_counted(bits: int, along: Along) -> None:
    x = random_tensor(1)
    sent = quantize(x, bits, along)
    assert 8 * sent.nbytes / x.size == bits + 2 * 16 / GROUP
    assert sent.nbytes == len(sent.codes) + len(sent.scales.tobytes()) + len(sent.minima.tobytes())


@pytest.mark.parametrize("along", ALONG)
def test_what_differs_from_group_to_group_alone_costs_nothing(along: Along) -> None:
    axis = 1 + ALONG.index(along)
    shape = [2, 64, 32]
    shape[axis] = 1
    level = np.random.default_rng(3).integers(-500, 500, size=shape).astype(np.float32)
    x = np.ascontiguousarray(np.broadcast_to(level, (2, 64, 32)))
    assert np.array_equal(dequantize(quantize(x, 2, along)), x)


def test_kivi_groups_keys_along_tokens_and_values_along_channels() -> None:
    method = grouped("KIVI", bits=2, keys="tokens")
    assert [each.along for each in method.encode(random_cache())] == ["tokens", "channels"] * 2
    assert [each.along for each in grouped("llama.cpp", bits=4).encode(random_cache())] == ["channels"] * 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_what_fp16_does_not_hold_is_refused(bad: float) -> None:
    x = random_tensor(0)
    x[1, 2, 3] = bad
    with pytest.raises(CacheInvalid):
        quantize(x, 4, "channels")
