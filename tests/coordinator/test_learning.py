"""What is learned from outcomes: on synthetic truths it is found within stated bounds, and nonsense does no harm."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.messages import CoordinatorPresence, SendOutcome, Stages
from coordinator.learning import (
    LARGEST_FACTOR,
    LARGEST_OVERHEAD_S,
    LEAST_BYTES,
    LEAST_FACTOR,
    LEAST_OBSERVATIONS,
    MOST_LINKS,
    MOST_RECEIVERS,
    REMEMBERED,
    Learned,
    Learning,
    achieved,
    quantile,
)
from coordinator.policy import LinkPlan
from coordinator.round import Round
from tests.coordinator.builders import digest, instance
from tests.coordinator.site import answered, sent
from tests.coordinator.test_round import OTHER, PLAN, round_of

LINK = ("pi-1", "jetson-1")
ALONE = replace(PLAN, share_bps=2e7, predicted=Stages(transfer_s=2.03), planned_bytes=5_000_000)
"""Nobody shares its channel: 2 s of transfer, and 30 ms of round trips."""
MEGABYTES_5 = 5_000_000


def delivered(**changes: Any) -> SendOutcome:
    fields: dict[str, Any] = {
        "request": instance(1),
        "transfer": digest(7)[:16],
        "agent": "pi-1",
        "state": "delivered",
        "payload_bytes": MEGABYTES_5,
        "wire_bytes": MEGABYTES_5,
        "transfer_s": 2.03,
    }
    return SendOutcome(**(fields | changes))


def ended(learning: Learning, *links: LinkPlan, ratios: tuple[float, ...] = (1.0,), **changes: Any) -> Round:
    """A round whose transfers reached so much of what was measured, learned from."""
    factor = learning.link_factors.get(LINK, 1.0)
    planned = [
        replace(
            link,
            share_bps=factor * link.share_bps,
            link_bps=factor * link.link_bps,
            predicted=Stages(transfer_s=8 * link.planned_bytes / (factor * link.share_bps) + 0.03),
        )
        for link in links
    ]
    round_ = round_of(*planned, factors=learning.link_factors, overhead_s=learning.overheads_s.get("jetson-1", 0.0))
    for link, (agent, order), ratio in zip(planned, round_.send_orders(60.0), ratios, strict=True):
        rate_bps = ratio * link.share_bps / factor
        rate_bps = min(rate_bps, order.rate_bps) if order.rate_bps else rate_bps
        moving_s = 8 * MEGABYTES_5 / rate_bps
        round_.take_send(sent(order, agent, payload_bytes=MEGABYTES_5, transfer_s=moving_s + 0.03, encode_s=0.01))
    round_.take_answer(answered(round_.answer_order(60.0)), 104.0)
    report = round_.report("answered")
    learning.take(round_, msgspec.structs.replace(report, **{"e2e_s": 5.0, "predicted_e2e_s": 5.0, **changes}))
    return round_


def test_before_three_transfers_a_link_is_believed_as_measured() -> None:
    learning = Learning()
    for _ in range(LEAST_OBSERVATIONS - 1):
        ended(learning, ALONE, ratios=(0.5,))
    assert learning.link_factors == {}
    ended(learning, ALONE, ratios=(0.5,))
    assert learning.link_factors == {LINK: pytest.approx(0.5, rel=0.02)}


@pytest.mark.parametrize("truth", [0.3, 0.6, 0.9, 1.1])
def test_a_rate_that_is_reached_in_part_is_planned_with_a_low_quantile_of_what_is(truth: float) -> None:
    """15 % of scatter: the quantile of 0.3 lies 8 % below the median; 90 % of learned factors lie within 15 % of it."""
    found = []
    for seed in range(60):
        dice, learning = np.random.default_rng(seed), Learning(0.3)
        for _ in range(24):
            ended(learning, ALONE, ratios=(truth * float(np.exp(dice.normal(0, 0.15))),))
        found.append(learning.link_factors[LINK] / truth)
    assert 0.85 < np.median(found) < 0.97
    assert np.mean(np.abs(np.array(found) / 0.92 - 1) < 0.15) > 0.9


def test_a_link_that_changed_is_believed_after_a_few_transfers_and_one_that_stalled_once_is_not() -> None:
    learning = Learning()
    for _ in range(REMEMBERED):
        ended(learning, ALONE, ratios=(1.0,))
    ended(learning, ALONE, ratios=(0.21,))
    assert learning.link_factors[LINK] == pytest.approx(1.0, rel=0.01)
    for _ in range(5):
        ended(learning, ALONE, ratios=(0.5,))
    assert learning.link_factors[LINK] == pytest.approx(0.5, rel=0.05)


def test_a_paced_link_that_keeps_its_pace_recovers_what_was_lost_and_claims_no_more() -> None:
    learning = Learning()
    for _ in range(6):
        ended(learning, PLAN, OTHER, ratios=(0.5, 1.0))
    assert learning.link_factors[LINK] == pytest.approx(0.5, rel=0.1)
    for _ in range(40):
        ended(learning, PLAN, OTHER, ratios=(3.0, 3.0))
    assert learning.link_factors == {LINK: pytest.approx(1.0), ("pi-2", "jetson-1"): pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("outcome", "link"),
    [
        (delivered(state="expired"), ALONE),
        (delivered(payload_bytes=LEAST_BYTES - 1), ALONE),
        (delivered(transfer_s=0.0), ALONE),
        (delivered(transfer_s=0.04), ALONE),  # most of it round trips
        (delivered(encode_s=1.5), ALONE),
        (delivered(prefill_s=1.5), replace(ALONE, own_tokens=100)),
        (delivered(), replace(ALONE, share_bps=0.0)),
    ],
)
def test_a_transfer_that_was_short_failed_or_waited_for_its_sender_says_nothing(
    outcome: SendOutcome, link: LinkPlan
) -> None:
    assert achieved(link, outcome, paced=False, factor=1.0) is None
    assert achieved(ALONE, delivered(prefill_s=1.5), paced=False, factor=1.0) == pytest.approx(1.0)


def test_a_share_that_rises_under_way_is_taken_at_its_mean() -> None:
    rising = replace(ALONE, share_bps=5e6, predicted=Stages(transfer_s=2.0))
    assert achieved(rising, delivered(transfer_s=2.5), paced=False, factor=1.0) == pytest.approx(0.8)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.floats(0, 1))
def test_a_quantile_is_one_of_the_values_and_rises_with_the_share(values: list[float], share: float) -> None:
    found = quantile(values, share)
    assert found in values
    assert quantile(values, 0) == min(values) <= found <= quantile(values, 1) == max(values)


def test_recent_values_weigh_more() -> None:
    assert quantile([1.0] * 8 + [0.5] * 3, 0.3) == 0.5
    assert quantile([0.5] * 3 + [1.0] * 8, 0.3) == 1.0
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_the_constant_that_a_receiver_needs_is_found_and_not_learned_twice() -> None:
    learning, dice = Learning(), np.random.default_rng(0)
    for _ in range(40):
        used_s = learning.overheads_s.get("jetson-1", 0.0)
        e2e_s = 5.0 + 0.12 + float(dice.normal(0, 0.02)) + (3.0 if dice.random() < 0.1 else 0.0)
        ended(learning, ALONE, predicted_e2e_s=5.0 + used_s, e2e_s=e2e_s)
    assert learning.overheads_s == {"jetson-1": pytest.approx(0.12, abs=0.02)}


def test_rounds_that_failed_fell_back_or_were_planned_blindly_teach_neither_overhead_nor_error() -> None:
    learning = Learning()
    for changes in ({"state": "failed"}, {"fallbacks": 1}, {"e2e_s": None}, {"e2e_s": 0.0}):
        for _ in range(5):
            ended(learning, ALONE, **changes)
    assert (learning.overheads_s, learning.errors()) == ({}, ())
    local = round_of()
    assert not learning.take(local, local.report("answered"))


def test_errors_are_kept_by_policy_as_median_and_bias() -> None:
    learning = Learning()
    for e2e_s in (4.0, 5.0, 10.0):
        ended(learning, ALONE, policy="kv", e2e_s=e2e_s)
    ended(learning, ALONE, policy="jmsra", e2e_s=20.0)
    jmsra, kv = learning.errors()
    assert (jmsra.policy, jmsra.rounds, jmsra.median_error, jmsra.median_bias) == ("jmsra", 1, 0.75, -0.75)
    assert (kv.policy, kv.rounds, kv.median_error, kv.median_bias) == ("kv", 3, 0.25, 0.0)


ABSURD = st.sampled_from([0.0, 1e-300, 1e-9, 1.0, 1e9, 1e15])


@given(
    st.lists(st.tuples(ABSURD, ABSURD, ABSURD, ABSURD, st.integers(0, 2**48)), max_size=8),
    st.floats(0, 1),
    st.sampled_from([0.0, 1e-6, 1.0, 1e15]),
)
def test_whatever_outcomes_say_what_is_learned_stays_in_its_bounds(
    rounds: list[tuple[float, float, float, float, int]], share: float, rate_bps: float
) -> None:
    learning = Learning(share)
    for transfer_s, encode_s, e2e_s, predicted_s, size in rounds:
        link = replace(ALONE, share_bps=rate_bps, link_bps=rate_bps, predicted=Stages(transfer_s=predicted_s))
        round_ = round_of(link, factors=learning.link_factors)
        ((agent, order),) = round_.send_orders(60.0)
        round_.take_send(sent(order, agent, payload_bytes=size, transfer_s=transfer_s, encode_s=encode_s))
        report = round_.report("answered")
        learning.take(round_, msgspec.structs.replace(report, e2e_s=e2e_s, predicted_e2e_s=predicted_s))
    assert all(LEAST_FACTOR <= factor <= LARGEST_FACTOR for factor in learning.link_factors.values())
    assert all(0 <= overhead_s <= LARGEST_OVERHEAD_S for overhead_s in learning.overheads_s.values())
    said = CoordinatorPresence(instance=instance(1), state="online", errors=learning.errors())
    assert msgspec.convert(msgspec.to_builtins(said), CoordinatorPresence) == said
    assert all(math.isfinite(error.median_bias) for error in learning.errors())
    as_file = msgspec.json.encode(learning.learned)
    assert msgspec.json.decode(as_file, type=Learned) == learning.learned
    assert Learning(share, learning.learned).link_factors == learning.link_factors


def test_learning_that_begins_with_what_another_had_learned_goes_on_as_that_would_have() -> None:
    one = Learning()
    for ratio in (0.5, 0.9, 0.6, 0.7):
        ended(one, PLAN, OTHER, ratios=(ratio, 1.0), e2e_s=5.0 + ratio)
    two = Learning(learned=one.learned)
    assert (two.link_factors, two.overheads_s, two.errors()) == (one.link_factors, one.overheads_s, one.errors())
    assert two.link_factors
    assert two.overheads_s
    assert two.errors()
    for learning in (one, two):
        ended(learning, ALONE, ratios=(0.4,), policy="kv")
    assert two.learned == one.learned


def test_of_too_many_links_and_receivers_those_that_were_unheard_for_longest_are_forgotten() -> None:
    learning = Learning()
    for number in range(MOST_LINKS + 10):
        ended(learning, replace(ALONE, sender=f"pi-{number}"), receiver=f"rx-{number}")
        ended(learning, replace(ALONE, sender="pi-0"), receiver="rx-0")
    links, receivers = learning.learned.links, learning.learned.receivers
    assert (len(links), len(receivers)) == (MOST_LINKS, MOST_RECEIVERS)
    assert [link.sender for link in links[-2:]] == [f"pi-{MOST_LINKS + 9}", "pi-0"]
    assert {"pi-1", "pi-5"}.isdisjoint(link.sender for link in links)
    assert msgspec.json.decode(msgspec.json.encode(learning.learned), type=Learned) == learning.learned
