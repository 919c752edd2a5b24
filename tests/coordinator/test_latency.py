from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.messages import Speed, Stages
from coordinator.latency import Decision, payload_bytes
from coordinator.timeline import evaluate
from tests.coordinator.builders import ELEMENTS_PER_TOKEN, LADDER, SPEED, make_link, random_scenario, scenario_of

TOKENS = Decision(own_tokens=400, rung=None, rate_bps=1e6)
CACHE = Decision(own_tokens=0, rung=LADDER[2], rate_bps=1e7)


def test_a_lone_token_link_takes_what_the_formulas_say() -> None:
    found = evaluate(scenario_of([make_link()]), [TOKENS])
    transfer_s = 0.01 + 8 * (600 + 2 * 400) / 1e6 + 0.015
    prefill_s, question_s = 0.02 + 400 / 150, 0.02 + 20 / 150
    assert found.stages[0].transfer_s == pytest.approx(transfer_s)
    assert found.stages[0].receiver_prefill_s == pytest.approx(prefill_s)
    assert found.question_s == pytest.approx((question_s,))
    assert found.e2e_s == pytest.approx(transfer_s + prefill_s + question_s + 0.005)


@pytest.mark.parametrize("cached", [True, False])
def test_a_lone_cache_link_takes_what_the_formulas_say(cached: bool) -> None:
    found = evaluate(scenario_of([make_link(cached=cached)]), [CACHE])
    elements = 400 * ELEMENTS_PER_TOKEN
    sender_s = (0.0 if cached else 0.02 + 400 / 150) + elements / 6e7
    transfer_s = elements * 8.5 / 1e7 + 0.025
    decode_s, question_s = elements / 1.2e8, 0.02 + 20 / 150
    assert found.arrive_s[0] == pytest.approx(sender_s + transfer_s)
    assert found.stages[0].transfer_s == pytest.approx(transfer_s)
    assert found.e2e_s == pytest.approx(sender_s + transfer_s + decode_s + question_s + 0.005)


@given(st.integers(0, 400))
def test_a_lone_link_is_as_late_as_its_stages_together_or_less_if_it_is_split(own: int) -> None:
    scenario = scenario_of([make_link(cached=False)])
    found = evaluate(scenario, [Decision(own_tokens=own, rung=LADDER[2], rate_bps=1e7)])
    total = sum(getattr(found.stages[0], name) for name in Stages.__struct_fields__) + found.question_s[0] + 0.005
    if own in {0, 400}:
        assert found.e2e_s == pytest.approx(total)
    else:
        assert found.e2e_s < total


def test_a_split_prefills_while_the_cache_is_in_flight() -> None:
    scenario = scenario_of([make_link()])
    found = evaluate(scenario, [Decision(own_tokens=200, rung=LADDER[2], rate_bps=1e7)])
    ids_there_s = 0.01 + 8 * (600 + 800) / 1e7 + 0.015
    cache_there_s = 0.01 + 200 * ELEMENTS_PER_TOKEN / 6e7 + 200 * ELEMENTS_PER_TOKEN * 8.5 / 1e7 + 0.015
    prefill_done_s = ids_there_s + 0.02 + 200 / 150
    assert found.arrive_s[0] == pytest.approx(cache_there_s)
    parts_done_s = max(cache_there_s, prefill_done_s) + 200 * ELEMENTS_PER_TOKEN / 1.2e8
    assert found.e2e_s == pytest.approx(parts_done_s + found.question_s[0] + 0.005)


def test_a_receiver_works_one_part_after_another() -> None:
    links = [make_link(sender=f"pi-{index}") for index in range(3)]
    found = evaluate(scenario_of(links), [TOKENS] * 3)
    assert found.e2e_s == pytest.approx(
        found.arrive_s[0] + 3 * found.stages[0].receiver_prefill_s + found.question_s[0] + 0.005
    )


def test_a_sender_encodes_one_context_after_another() -> None:
    links = [make_link(context="a"), make_link(context="b")]
    found = evaluate(scenario_of(links), [CACHE, CACHE])
    assert found.arrive_s[1] - found.arrive_s[0] == pytest.approx(found.stages[1].encode_s)


def test_the_round_is_as_late_as_its_slowest_request() -> None:
    links = [make_link(receiver="rx-1"), make_link(sender="pi-2", receiver="rx-2", tokens=800)]
    found = evaluate(scenario_of(links), [TOKENS, Decision(own_tokens=800, rung=None, rate_bps=1e6)])
    assert found.request_e2e_s[1] > found.request_e2e_s[0]
    assert found.e2e_s == found.request_e2e_s[1]


@given(st.integers(0, 400), st.sampled_from(LADDER))
def test_payload_bytes_count_header_ids_and_cache(own: int, rung: object) -> None:
    assert payload_bytes(make_link(), own, LADDER[2]) == math.ceil(
        600 + 2 * 400 + (400 - own) * ELEMENTS_PER_TOKEN * 8.5 / 8
    )


def test_a_cache_without_a_rung_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="pi-1:report needs a rung for 400 tokens"):
        evaluate(scenario_of([make_link()]), [Decision(own_tokens=0, rung=None, rate_bps=1e6)])


def test_what_was_not_measured_counts_as_instant_and_is_flagged() -> None:
    scenario = scenario_of([make_link(receiver_speed=None, link_bps=0.0, channels=(), rungs=())])
    found = evaluate(scenario, [Decision(own_tokens=400, rung=None, rate_bps=0.0)])
    assert not scenario.known
    assert found.e2e_s == pytest.approx(0.01 + 0.015 + 0.005)


@pytest.mark.parametrize("field", ["prefill_tps", "encode_elements_per_s", "decode_elements_per_s"])
def test_a_speed_of_zero_is_not_a_measured_speed(field: str) -> None:
    values = {name: getattr(SPEED, name) for name in SPEED.__struct_fields__} | {field: 0.0}
    link = make_link(receiver_speed=Speed(**values))
    assert not link.known
    assert not link.may_cache
    assert math.isfinite(evaluate(scenario_of([link]), [TOKENS]).e2e_s)


@pytest.mark.parametrize("seed", range(20))
def test_a_faster_rate_never_ends_a_round_later(seed: int) -> None:
    scenario = random_scenario(seed, links=5)
    slow = [
        Decision(own_tokens=0 if index % 2 else link.tokens, rung=link.rungs[0], rate_bps=1e6)
        for index, link in enumerate(scenario.links)
    ]
    before_s = evaluate(scenario, slow).e2e_s
    for index in range(5):
        faster = [
            Decision(own_tokens=d.own_tokens, rung=d.rung, rate_bps=d.rate_bps * (3 if at == index else 1))
            for at, d in enumerate(slow)
        ]
        assert evaluate(scenario, faster).e2e_s <= before_s + 1e-9
