"""Speeds follow what is measured, from any start, and stay positive."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.messages import Speed
from edge_agent.speed import SpeedMeter

START = Speed(
    prefill_fixed_s=0.02,
    prefill_tps=200.0,
    decode_tps=20.0,
    encode_elements_per_s=1e8,
    decode_elements_per_s=2e8,
)


def begun() -> SpeedMeter:
    meter = SpeedMeter()
    meter.begin(START)
    return meter


def speed(meter: SpeedMeter) -> Speed:
    assert meter.speed is not None
    return meter.speed


def test_before_the_first_measurement_nothing_is_claimed() -> None:
    meter = SpeedMeter()
    meter.prefill(10, 1.0)
    meter.decode(1.0)
    meter.encode(10, 1.0)
    meter.decode_payload(10, 1.0)
    assert meter.speed is None


@given(st.floats(1e-3, 1e3), st.integers(1, 2_000))
def test_a_machine_that_is_slower_by_a_factor_is_followed_in_both_terms(factor: float, tokens: int) -> None:
    meter = begun()
    seconds = (START.prefill_fixed_s + tokens / START.prefill_tps) * factor
    for _ in range(40):
        meter.prefill(tokens, seconds)
    assert speed(meter).prefill_fixed_s == pytest.approx(START.prefill_fixed_s * factor, rel=1e-3)
    assert speed(meter).prefill_tps == pytest.approx(START.prefill_tps / factor, rel=1e-3)
    assert speed(meter).decode_tps == START.decode_tps


@given(st.floats(1e-6, 1e3), st.integers(1, 10**9))
def test_rates_come_to_what_is_measured(seconds: float, elements: int) -> None:
    meter = begun()
    for _ in range(80):
        meter.decode(seconds)
        meter.encode(elements, seconds)
        meter.decode_payload(elements, seconds)
    assert speed(meter).decode_tps == pytest.approx(1 / seconds, rel=1e-3)
    assert speed(meter).encode_elements_per_s == pytest.approx(elements / seconds, rel=1e-3)
    assert speed(meter).decode_elements_per_s == pytest.approx(elements / seconds, rel=1e-3)
    assert (speed(meter).prefill_fixed_s, speed(meter).prefill_tps) == (START.prefill_fixed_s, START.prefill_tps)


def test_one_slow_run_moves_it_by_less_than_half_of_the_way() -> None:
    meter = begun()
    meter.decode(10 / START.decode_tps)
    assert START.decode_tps / 10**0.5 < speed(meter).decode_tps < START.decode_tps


@given(st.lists(st.tuples(st.integers(-5, 5), st.floats(-1, 0) | st.floats(1e-9, 1e5)), max_size=20))
def test_whatever_is_measured_the_speed_stays_one_that_can_be_published(runs: list[tuple[int, float]]) -> None:
    meter = begun()
    for amount, seconds in runs:
        meter.prefill(amount, seconds)
        meter.decode(seconds)
        meter.encode(amount, seconds)
    again = msgspec.convert(msgspec.to_builtins(speed(meter)), Speed)
    assert all(value > 0 for value in msgspec.structs.astuple(again))
