"""Means, intervals and rates are those of the records, over the same items for every method of a data set."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.evaluate.records import Record
from scripts.evaluate.summary import METRICS, RESAMPLES, Estimate, Row, estimate, paired, rows
from tests.scripts.evaluated import record

METHODS = ["text", "q6", "q4"]
values = st.lists(st.floats(-100, 100).map(lambda value: round(value, 3)), min_size=1, max_size=30)


@given(values)
def test_a_mean_lies_in_its_interval_and_the_interval_among_the_values(found: list[float]) -> None:
    made = estimate(found)
    assert made.mean == pytest.approx(statistics.fmean(found), abs=1e-9)
    assert min(found) - 1e-9 <= made.low <= made.mean <= made.high <= max(found) + 1e-9
    assert made.count == len(found)
    assert made == estimate(found)


@pytest.mark.parametrize("found", [[0.25], [0.1] * 7, [0.0, 0.0], [1e-300, 1e-300]])
def test_one_value_or_equal_ones_are_their_own_interval(found: list[float]) -> None:
    assert estimate(found) == Estimate(found[0], found[0], found[0], len(found))


def test_the_interval_is_that_of_a_bootstrap_written_out() -> None:
    numbers = np.random.default_rng(5)
    found = numbers.exponential(size=80)
    means = [numbers.choice(found, len(found)).mean() for _ in range(4 * RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    made = estimate(list(found))
    assert (made.low, made.high) == pytest.approx((low, high), abs=0.02)


def test_95_of_100_intervals_hold_the_true_mean_or_nearly_so() -> None:
    numbers = np.random.default_rng(6)
    made = [estimate(list(numbers.normal(3, 1, 60))) for _ in range(100)]
    assert 88 <= sum(each.low <= 3 <= each.high for each in made) <= 99


def test_only_items_that_all_methods_of_the_data_set_have_done_are_counted() -> None:
    records = [record(item, method, f1=f1) for item, method, f1 in [("1", "q6", 1), ("2", "q6", 0), ("1", "q4", 0.5)]]
    records += [record("1", "q6", "hotpotqa"), record("2", "q6", "hotpotqa"), record("9", "other")]
    found = rows(records, METHODS)
    assert [(row.dataset, row.method, row.items) for row in found] == [
        ("squad", "q6", 1),
        ("squad", "q4", 1),
        ("hotpotqa", "q6", 2),
    ]
    assert found[0].f1 == Estimate(1, 1, 1, 1)


def test_methods_without_a_common_item_have_no_row() -> None:
    assert rows([record("1", "q6"), record("2", "q4")], METHODS) == ()
    assert rows([], METHODS) == ()


def only(*records: Record) -> Row:
    (row,) = rows(records, METHODS)
    return row


def test_sizes_and_rates_are_of_sums_not_means_of_rates() -> None:
    row = only(
        record("1", elements=1_000, payload_bytes=500, fp16_bytes=2_000, exact_match=1.0, f1=1.0),
        record("2", elements=3_000, payload_bytes=3_500, fp16_bytes=6_000, exact_match=0.0, f1=0.5),
    )
    assert row.bits_per_element == 8.0
    assert row.ratio_fp16 == 2.0
    assert (row.payload_bytes, row.saved_bytes) == (4_000, 4_000)
    assert row.f1_per_mbit == pytest.approx(75 / (2_000 * 8 / 1e6))
    assert row.correct_per_s == pytest.approx(1 / 1.0)
    assert (row.encode_s, row.decode_s, row.context_s, row.answer_s) == pytest.approx((0.01, 0.02, 0, 0.47))


def test_what_sends_nothing_or_has_no_references_has_no_rates() -> None:
    row = only(record(method="text", elements=0, payload_bytes=0, exact_match=None, f1=None, completeness=None))
    assert (row.bits_per_element, row.ratio_fp16, row.f1_per_mbit, row.correct_per_s) == (None,) * 4
    assert (row.exact_match, row.f1, row.completeness) == (None,) * 3
    assert only(record(method="text", elements=0, payload_bytes=400)).bits_per_element is None
    assert only(record(encode_s=0.0, decode_s=0.0, answer_s=0.0)).correct_per_s is None


def test_questions_on_one_context_are_drawn_together() -> None:
    numbers = np.random.default_rng(5)
    contexts = [str(context) for context in range(20) for _ in range(10)]
    shared = np.repeat(numbers.normal(0, 1, 20), 10)  # what all questions on a context have in common
    apart, together = estimate(list(shared)), estimate(list(shared), contexts)
    assert together.mean == pytest.approx(apart.mean)
    assert together.high - together.low > 2 * (apart.high - apart.low)
    each = estimate(list(shared), [f"{index:03}" for index in range(len(shared))])
    assert (each.low, each.high) == pytest.approx((apart.low, apart.high))
    assert estimate([1.0, 2.0], ["a", "a"]) == Estimate(1.5, 1.5, 1.5, 2)


def test_a_metric_that_some_items_lack_is_estimated_over_the_others_and_says_how_many() -> None:
    row = only(record("1", answer_logprob=None, exact_match=None), record("2", answer_logprob=-0.75))
    assert row.answer_logprob == Estimate(-0.75, -0.75, -0.75, 1)
    assert row.exact_match == Estimate(1, 1, 1, 1)
    assert row.correct_per_s == pytest.approx(2.0)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 20)), min_size=1, max_size=8))
def test_every_number_of_a_row_is_finite(found: list[tuple[float, float]]) -> None:
    row = only(*(record(str(at), f1=f1, kl=kl, choice=f1) for at, (f1, kl) in enumerate(found)))
    for metric in METRICS:
        made: Any = getattr(row, metric)
        assert made.low <= made.mean <= made.high
        assert all(math.isfinite(number) for number in (made.mean, made.low, made.high))


def test_a_paired_difference_is_taken_item_by_item() -> None:
    better = [record(str(at), "q6", f1=at / 40 + 0.25) for at in range(30)]
    worse = [record(str(at), "q4", f1=at / 40) for at in reversed(range(31))]
    made = paired([*better, *worse], "f1", "q6", "q4")
    assert made.mean == pytest.approx(0.25)
    assert made.count == 30
    assert made.high - made.low < 1e-9
    assert paired([*better, *worse], "f1", "q4", "q6").mean == pytest.approx(-0.25)


def test_items_of_the_same_name_in_two_data_sets_are_not_paired() -> None:
    with pytest.raises(ValueError, match="no item has f1 under both q6 and q4"):
        paired([record("1", "q6"), record("1", "q4", "hotpotqa")], "f1", "q6", "q4")
    with pytest.raises(ValueError, match="no item has exact_match"):
        paired([record("1", "q6", exact_match=None), record("1", "q4")], "exact_match", "q6", "q4")
