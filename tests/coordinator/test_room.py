"""Receivers' memories as hard caps: no policy sends more cache than what its receivers can hold."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from coordinator.latency import Scenario
from coordinator.numbers import Floats
from coordinator.policy import POLICIES, PlanRequest, build_scenario
from coordinator.policy.optimum import optimum
from coordinator.policy.shares import Shares
from tests.coordinator.builders import (
    ELEMENTS_PER_TOKEN,
    LADDER,
    context,
    fleet_of,
    instance,
    make_link,
    scenario_of,
    telemetry,
)
from tests.coordinator.wild import wild_scenario


def cramped(scenario: Scenario, seed: int) -> Scenario:
    """The same with receivers that hold little: from nothing to some of their caches at eight bits."""
    dice = random.Random(seed)
    rooms = {
        link.receiver: dice.choice([0.0, dice.uniform(0, 1) * link.tokens * link.elements_per_token])
        for link in scenario.links
    }
    return replace(
        scenario, links=tuple(replace(link, receiver_room_bytes=rooms[link.receiver]) for link in scenario.links)
    )


def held_bytes(scenario: Scenario, name: str) -> Floats:
    """What a plan sends each receiver of caches, without ids and header, over what it holds."""
    plan = POLICIES[name].plan(scenario)
    ladder, links = {rung.name: rung for rung in LADDER}, {link.context_id: link for link in scenario.links}
    over: dict[str, float] = {}
    for planned in plan.links:
        link = links[planned.context_id]
        sent = link.tokens - planned.own_tokens
        cache_bytes = sent * link.elements_per_token * ladder[planned.rung].bits_per_element / 8 if sent else 0.0
        over[link.receiver] = over.get(link.receiver, -link.receiver_room_bytes) + cache_bytes
    return np.array(list(over.values()))


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("seed", range(60))
def test_no_policy_sends_more_than_receivers_hold(seed: int, name: str) -> None:
    scenario = replace(cramped(wild_scenario(seed), seed), tie_fraction=0.3)
    assert np.all(held_bytes(scenario, name) <= 1e-6)


@pytest.mark.parametrize("seed", range(60))
def test_more_room_never_makes_the_round_later(seed: int) -> None:
    scenario = cramped(wild_scenario(seed, complete=True), seed)
    roomier = tuple(replace(link, receiver_room_bytes=2 * link.receiver_room_bytes) for link in scenario.links)
    tight_s = optimum(Shares(scenario)).e2e_s
    assert optimum(Shares(replace(scenario, links=roomier))).e2e_s <= tight_s * (1 + 1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_many_links_are_held_too(seed: int) -> None:
    scenario = cramped(wild_scenario(seed, links=40), seed)
    assert np.all(held_bytes(scenario, "optimum") <= 1e-6)


def test_what_does_not_fit_is_prefilled_by_the_receiver() -> None:
    """Room for half of a cache: the policy that sends caches whole sends text, the other splits."""
    half = 200 * ELEMENTS_PER_TOKEN * LADDER[2].bits_per_element / 8
    fast = (("up", 1e9),)
    link = make_link(receiver_room_bytes=half, link_bps=1e9, channels=fast)
    scenario = scenario_of([link], slice_tokens=40)
    assert POLICIES["kv"].plan(scenario).links[0].medium == "tokens"
    planned = POLICIES["optimum"].plan(scenario).links[0]
    assert (planned.medium, planned.own_tokens, planned.rung) == ("split", 200, LADDER[2].name)


def test_a_receiver_has_room_for_what_its_joined_caches_leave_free() -> None:
    reports = [telemetry(agent, contexts=[context(tokens=100)]) for agent in ("pi-1", "pi-2")] + [telemetry("pi-9")]
    request = PlanRequest(
        request=instance(1), receiver="pi-9", sources=("pi-1:report",), question_tokens=9, max_new_tokens=8
    )
    scenario = build_scenario(fleet_of(*reports), [request])
    free = (1 << 32) - 4 * 100 * ELEMENTS_PER_TOKEN
    assert [link.receiver_room_bytes for link in scenario.links] == [free]
