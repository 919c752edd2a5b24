"""Speeds follow what is measured, from any start, and stay positive."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.messages import Speed
from coordinator.latency import prefill_s
from edge_agent.speed import FAMILIES_KEPT, SpeedMeter
from edge_agent.surprise import LIMIT, Surprise

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


@given(st.floats(1e-3, 1e3), st.integers(60, 2_000))
def test_a_machine_that_is_slower_by_a_factor_is_followed_at_other_lengths_too(factor: float, tokens: int) -> None:
    meter = begun()
    for _ in range(40):
        meter.prefill(tokens, factor * prefill_s(START, tokens))
    assert prefill_s(speed(meter), tokens) == pytest.approx(factor * prefill_s(START, tokens), rel=1e-3)
    for other in (tokens // 2, 2 * tokens):
        assert prefill_s(speed(meter), other) == pytest.approx(factor * prefill_s(START, other), rel=0.2)
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
        meter.prefill(amount, seconds, behind=10 * amount)
        meter.decode(seconds)
        meter.encode(amount, seconds)
        meter.decode_payload(amount, seconds, "klt5")
    again = msgspec.convert(msgspec.to_builtins(speed(meter)), Speed)
    figures = [value for value in msgspec.structs.astuple(again) if isinstance(value, float)]
    assert again == speed(meter)
    assert all(0 <= value < math.inf for value in figures)
    assert min(again.prefill_tps, again.decode_tps, again.encode_elements_per_s, again.decode_elements_per_s) > 0


def test_each_family_of_rungs_has_a_speed_of_its_own_and_the_others_keep_theirs() -> None:
    meter = begun()
    for _ in range(20):
        meter.encode(10**6, 0.1, "klt5")
        meter.decode_payload(10**6, 0.05, "klt3-h50")
        meter.encode(10**6, 0.001, "q8")
    by_family = {each.codec: each for each in speed(meter).codecs}
    assert set(by_family) == {"klt", "q"}
    assert by_family["klt"].encode_elements_per_s == pytest.approx(1e7, rel=1e-3)
    assert by_family["klt"].decode_elements_per_s == pytest.approx(2e7, rel=1e-3)
    assert by_family["q"].encode_elements_per_s == pytest.approx(1e9, rel=1e-3)
    assert by_family["q"].decode_elements_per_s == START.decode_elements_per_s
    assert speed(meter).encode_elements_per_s == START.encode_elements_per_s


def test_more_families_than_a_message_holds_share_the_common_figure() -> None:
    meter = begun()
    for number in range(30):
        meter.encode(10**6, 0.01, "x" * (number % 15 + 1) + ("y" if number >= 15 else ""))
    assert len(speed(meter).codecs) == FAMILIES_KEPT
    assert msgspec.convert(msgspec.to_builtins(speed(meter)), Speed) == speed(meter)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=30))
def test_no_error_is_taken_over_beyond_what_was_measured(errors: list[float]) -> None:
    surprise = Surprise()
    for error in errors:
        jump, rest = surprise.split(error)
        assert abs(rest) <= LIMIT
        assert abs(jump + rest) <= abs(error) + 1e-12
        assert jump * error >= 0


def test_the_second_surprise_in_one_direction_is_believed_and_one_in_another_is_not() -> None:
    surprise = Surprise()
    assert surprise.split(2.0) == (0.0, LIMIT)
    assert surprise.split(-1.0) == (0.0, -LIMIT)
    assert surprise.split(-1.5) == (-1.0, -LIMIT)
    assert surprise.split(0.1) == (0.0, 0.1)
    assert surprise.split(-1.0) == (0.0, -LIMIT)


def test_who_is_harder_to_convince_needs_more_of_them() -> None:
    surprise = Surprise(believed=3, counts=0.1)
    found = [surprise.split(error) for error in (1.0, 2.0, 3.0, 3.0, 2.0, 0.1, -2.0)]
    assert found == [(0, 0.1), (0, 0.1), (1.0, LIMIT), (0, 0.1), (0, 0.1), (0, 0.1), (0, -0.1)]
