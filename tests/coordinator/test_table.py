"""A scenario as arrays against the formulas and definitions, link by link."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from broker_config.messages import CodecSpeed, Speed
from coordinator.columns import columns_of
from coordinator.groups import Groups
from coordinator.ladders import Ladders
from coordinator.latency import Link, Scenario, decode_s, encode_s, prefill_s, usable
from coordinator.numbers import numbered
from coordinator.table import Table
from tests.coordinator.builders import LADDER, SPEED, instance, make_link, random_speed, scenario_of
from tests.coordinator.wild import wild_scenario

FAMILIES = ("q", "klt", "mix", "fp", "lossless", "int")
RUNGS = tuple(
    msgspec.structs.replace(LADDER[2], name=name, bits_per_element=bits, kl=1 / bits)
    for name, bits in (("klt6", 1.1), ("q2", 2.5), ("klmix4", 3.5), ("int4", 4.4), ("fp16", 16.0))
)


def coding_speed(dice: random.Random) -> Speed | None:
    """Some families measured, some twice or in one direction only; now and then nothing at all."""
    codecs = tuple(
        CodecSpeed(
            codec=dice.choice(FAMILIES),
            encode_elements_per_s=dice.choice([0.0, 10 ** dice.uniform(5, 9), 10 ** dice.uniform(5, 9)]),
            decode_elements_per_s=dice.choice([0.0, 10 ** dice.uniform(5, 9), 10 ** dice.uniform(5, 9)]),
        )
        for _ in range(dice.randint(0, 6))
    )
    speed = msgspec.structs.replace(random_speed(dice), codecs=codecs)
    if dice.random() < 0.2:
        speed = msgspec.structs.replace(speed, encode_elements_per_s=0.0)
    return None if dice.random() < 0.1 else speed


def coding_links(seed: int) -> list[Link]:
    dice = random.Random(seed)
    return [
        make_link(
            sender=f"pi-{index}",
            cached=dice.random() < 0.7,
            kept=dice.choice([None, None, "float32", "klt6", "q2"]),
            sender_speed=coding_speed(dice),
            receiver_speed=coding_speed(dice),
            rungs=RUNGS[dice.randint(0, 2) : dice.randint(2, 5)],
        )
        for index in range(dice.randint(1, 6))
    ]


@pytest.mark.parametrize("seed", range(20))
def test_things_are_ordered_by_group_then_value_then_as_they_were(seed: int) -> None:
    dice = np.random.default_rng(seed)
    count = int(dice.integers(1, 40))
    groups = Groups(np.concatenate([np.arange(count), dice.integers(0, count, 3 * count)]), count)
    values = dice.choice([-3.0, -1.0, 0.0, 2.5, *dice.normal(0, 1e6, 5)], (4, len(groups.index)))
    first = dice.normal(size=len(groups.index))
    before = groups.order(first)
    assert before.tolist() == np.lexsort((first, groups.index)).tolist()
    index = np.broadcast_to(groups.index, values.shape)
    ties = np.broadcast_to(first, values.shape)
    assert np.array_equal(groups.order(values, before), np.lexsort((ties, values, index), axis=-1))
    assert np.array_equal(groups.order(values[0]), np.lexsort((values[0], groups.index)))
    held = groups.behind(values, before)
    for place, row in np.ndindex(len(groups.index), len(values)):
        behind = (groups.index == groups.index[place]) & (first >= first[place])
        assert held[row, place] == pytest.approx(values[row, behind].sum(), abs=1e-6)


@pytest.mark.parametrize("seed", range(60))
def test_ladders_say_what_the_formulas_say_of_every_link_and_rung(seed: int) -> None:
    links = coding_links(seed)
    ladders = Ladders(links)
    for place in range(len(RUNGS)):
        places = np.minimum(place, ladders.top)
        for link, at, found in zip(links, places, zip(*ladders.coded(places), strict=True), strict=True):
            rung = link.rungs[at] if link.rungs else None
            kept = link.kept if link.cached else None
            wanted = (
                (
                    link.elements_per_token * rung.bits_per_element,
                    encode_s(link.sender_speed, link.elements_per_token, rung.name, kept),
                    decode_s(link.receiver_speed, link.elements_per_token, rung.name),
                )
                if rung
                else (0.0, 0.0, 0.0)
            )
            assert found == pytest.approx(wanted, rel=1e-12)
    for link, top, loss in zip(links, ladders.top, ladders.loss, strict=True):
        assert top == max(len(link.rungs) - 1, 0)
        assert loss[: top + 1].tolist() == ([rung.kl for rung in link.rungs] or [0.0])


@pytest.mark.parametrize("seed", range(40))
def test_a_table_says_what_the_formulas_say_of_every_link(seed: int) -> None:
    scenario = wild_scenario(seed)
    table = Table(scenario)
    assert table.known.tolist() == [link.known for link in scenario.links]
    assert table.may_cache.tolist() == [link.may_cache for link in scenario.links]
    whole = table.prefill_s(table.tokens)
    assert whole.tolist() == pytest.approx([prefill_s(link.receiver_speed, link.tokens) for link in scenario.links])
    made = [0.0 if link.cached else sender_s(link) for link in scenario.links]
    assert table.produce_s(table.tokens).tolist() == pytest.approx(made)


def sender_s(link: Link) -> float:
    """Until the sender has all entries of a cache that it does not have yet."""
    speed = link.sender_speed
    if link.generated:
        return link.tokens / speed.decode_tps if speed is not None and speed.prefill_tps > 0 else 0.0
    return prefill_s(link.sender_speed, link.tokens)


@pytest.mark.parametrize("seed", range(40))
def test_before_a_question_goes_the_work_of_its_request_and_of_earlier_ones_at_its_receiver(seed: int) -> None:
    scenario = crowded(seed)
    table = Table(scenario)
    pairs, questions_s = set(), np.zeros(len(scenario.requests))
    asked = {link.request for link in scenario.links}
    for index in asked:
        for other in asked:
            terms, others = scenario.requests[index], scenario.requests[other]
            ranks = [(each.deadline_s or np.inf, at) for each, at in ((others, other), (terms, index))]
            if others.receiver == terms.receiver and ranks[0] <= ranks[1]:
                pairs |= {(at, index) for at, link in enumerate(scenario.links) if link.request == other}
                questions_s[index] += table.question_s[other]
    found = list(zip(table.member_link.tolist(), table.member_request.tolist(), strict=True))
    assert len(found) == len(set(found))
    assert set(found) == pairs
    assert table.questions_s.tolist() == pytest.approx(questions_s.tolist(), rel=1e-12)


def crowded(seed: int) -> Scenario:
    """More requests than receivers, with deadlines that tie now and then."""
    dice = random.Random(seed)
    scenario = wild_scenario(seed, links=dice.randint(1, 12))
    terms = tuple(
        replace(scenario.requests[0], request=instance(index), receiver=f"rx-{dice.randrange(3)}", deadline_s=limit_s)
        for index, limit_s in enumerate(dice.choices([None, 1.0, 1.0, 2.0, 5.0], k=8))
    )
    requests = [dice.randrange(8) for _ in scenario.links]
    links = tuple(
        replace(link, request=request, receiver=terms[request].receiver)
        for link, request in zip(scenario.links, requests, strict=True)
    )
    return replace(scenario, requests=terms, links=links)


@pytest.mark.parametrize("seed", range(20))
def test_what_stands_before_a_link_in_its_group_is_what_a_loop_finds(seed: int) -> None:
    dice = np.random.default_rng(seed)
    keys = [str(key) for key in dice.integers(0, 4, size=dice.integers(1, 12))]
    groups, values = Groups.of(keys), dice.random((3, len(keys)))
    order = np.array([np.lexsort((dice.random(len(keys)), groups.index)) for _ in range(3)])
    before, behind = np.zeros_like(values), np.zeros_like(values)
    for row, places in enumerate(order):
        for at, link in enumerate(places):
            before[row, link] = sum(values[row, other] for other in places[:at] if keys[other] == keys[link])
            behind[row, link] = sum(values[row, other] for other in places[at:] if keys[other] == keys[link])
    assert groups.before(values, order) == pytest.approx(before, abs=1e-12)
    assert groups.behind(values, order) == pytest.approx(behind, abs=1e-12)
    assert groups.sums(values) == pytest.approx(np.array([groups.sums(row) for row in values]))


def test_things_are_numbered_as_they_first_come() -> None:
    index, things = numbered(["b", "a", "b", "c"], ["B", "A", "B", "C"])
    assert index.tolist() == [0, 1, 0, 2]
    assert things == ["B", "A", "C"]


def test_columns_of_no_links_are_empty() -> None:
    columns = columns_of([])
    assert columns.tokens.shape == columns.sender_speed.shape == (0,)
    assert (columns.sender, columns.rungs) == ([], [])
    assert Table(Scenario(requests=(), links=())).count == 0


def test_a_speed_is_known_if_all_that_the_model_divides_by_is() -> None:
    speeds = [None, SPEED, msgspec.structs.replace(SPEED, decode_elements_per_s=0.0)]
    columns = columns_of([make_link(sender_speed=speed, receiver_speed=SPEED) for speed in speeds])
    assert columns.all_speeds.usable[columns.sender_speed].tolist() == [usable(speed) for speed in speeds]
    assert columns.all_speeds.usable[columns.receiver_speed].tolist() == [True] * 3


def test_a_channel_that_is_passed_twice_has_half_its_rate() -> None:
    table = Table(scenario_of([make_link(channels=(("cell", 2e7), ("cell", 2e7), ("wire", 1e8)))]))
    assert dict(zip(table.channel_names, table.pair_alone_bps.tolist(), strict=True)) == {"cell": 1e7, "wire": 1e8}
    assert table.shared.tolist() == [False, False]
