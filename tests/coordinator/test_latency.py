from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.messages import CodecSpeed, Speed, Stages, codec_family
from coordinator.latency import Decision, decode_s, encode_s, payload_bytes, prefill_s
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


def test_a_prefill_slows_with_its_length_and_with_what_stands_before_it() -> None:
    speed = msgspec.structs.replace(SPEED, prefill_s_per_token2=1e-6)
    assert prefill_s(speed, 0, 500) == 0.0
    assert prefill_s(speed, 300) == pytest.approx(0.02 + 2.0 + 0.09)
    pieces_s = sum(prefill_s(speed, 100, behind) for behind in (0, 100, 200))
    assert pieces_s == pytest.approx(prefill_s(speed, 300) + 2 * 0.02)  # what is fixed comes with every call
    link = make_link(receiver_speed=speed)
    assert evaluate(scenario_of([link]), [TOKENS]).question_s[0] == pytest.approx(prefill_s(speed, 20, 400))


CODING = msgspec.structs.replace(
    SPEED, codecs=(CodecSpeed(codec="klt", encode_elements_per_s=1e6, decode_elements_per_s=2e6),)
)


def test_coding_is_as_fast_as_the_rungs_family_and_costs_nothing_where_a_cache_is_kept_so() -> None:
    assert encode_s(CODING, 600) == encode_s(CODING, 600, "q8") == encode_s(CODING, 600, "q8", "float32") == 600 / 6e7
    assert encode_s(CODING, 600, "klt5-h50") == 600 / 1e6
    assert encode_s(CODING, 600, "klt5", "klt5") == 0.0
    assert encode_s(CODING, 600, "float32", "float32") == 600 / 6e7
    assert encode_s(CODING, 600, "klt5", "klt3") == 600 / 1e6 + 600 / 2e6
    assert decode_s(CODING, 600, "klt5") == 600 / 2e6
    assert decode_s(CODING, 600) == decode_s(CODING, 600, "fp16") == 600 / 1.2e8
    assert encode_s(None, 600, "klt5") == decode_s(None, 600, "klt5") == 0.0


def test_a_family_of_speed_zero_is_not_a_measured_one() -> None:
    codec = CodecSpeed(codec="klt", encode_elements_per_s=0.0, decode_elements_per_s=2e6)
    speed = msgspec.structs.replace(SPEED, codecs=(codec,))
    assert encode_s(speed, 600, "klt5") == 600 / 6e7
    assert decode_s(speed, 600, "klt5") == 600 / 1.2e8


@pytest.mark.parametrize(
    ("rung", "family"),
    [
        ("float32", "float"),
        ("fp16", "fp"),
        ("q8", "q"),
        ("klt5", "klt"),
        ("klt6-h30-b2", "klt"),
        ("mix4-l70-whole", "mix"),
        ("klmix6", "mix"),
        ("qkvcomm-8", "mix"),
        ("8bit", ""),
        ("", ""),
    ],
)
def test_the_letters_of_a_rungs_name_are_its_family(rung: str, family: str) -> None:
    assert codec_family(rung) == family


def test_what_the_receiver_needs_besides_comes_once_per_request() -> None:
    links = [make_link(receiver_overhead_s=0.1), make_link(sender="pi-2", receiver_overhead_s=0.1)]
    without = [make_link(), make_link(sender="pi-2")]
    late_s = evaluate(scenario_of(links), [TOKENS] * 2).e2e_s
    assert late_s == pytest.approx(evaluate(scenario_of(without), [TOKENS] * 2).e2e_s + 0.1)
