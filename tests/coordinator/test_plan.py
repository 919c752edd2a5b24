"""A plan as a value that is worked out when it is asked for."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest

from coordinator.policy import POLICIES, Plan, get_policy
from coordinator.policy.optimum import OptimumPolicy
from coordinator.policy.shares import Allocation, Shares
from tests.coordinator.builders import make_link, random_scenario, scenario_of
from tests.coordinator.wild import wild_scenario


class Counting(OptimumPolicy):
    """Notes how often its bound was asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def bound_s(self, shares: Shares, chosen: Allocation) -> float:
        self.asked += 1
        return super().bound_s(shares, chosen)


def test_a_bound_is_worked_out_when_it_is_asked_for_and_once() -> None:
    policy = Counting()
    plan = policy.plan(random_scenario(1, links=3))
    assert plan.links
    assert policy.asked == 0
    assert plan.bound_s == plan.bound_s
    assert policy.asked == 1
    assert plan.bound_s is not None
    assert plan.bound_s <= plan.predicted_e2e_s


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_plan_is_equal_to_another_of_the_same_scenario_and_to_its_copies(policy: str) -> None:
    scenario = wild_scenario(3, links=4)
    plan, again = (get_policy(policy).plan(scenario) for _ in range(2))
    copies = [pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)]  # noqa: S301
    assert [plan == other for other in (again, *copies)] == [True] * 3
    assert len({plan, again, *copies}) == 1
    assert plan.requests is plan.requests


def test_plans_differ_if_anything_in_them_does() -> None:
    scenario = random_scenario(2, links=3, receivers=2)
    noted = replace(scenario, links=(replace(scenario.links[0], note="another"), *scenario.links[1:]))
    plan = get_policy("kv").plan(scenario)
    assert plan != get_policy("kv").plan(noted)
    assert plan != get_policy("token").plan(scenario)
    assert plan != "kv"


@pytest.mark.parametrize("name", ["requests", "links", "bound_s", "predicted_e2e_s"])
def test_a_plan_cannot_be_changed(name: str) -> None:
    plan = get_policy("jmsra").plan(scenario_of([make_link()]))
    with pytest.raises(FrozenInstanceError):
        setattr(plan, name, ())


@pytest.mark.parametrize("seed", range(10))
def test_what_a_plan_says_of_the_round_is_what_its_requests_and_links_say(seed: int) -> None:
    plans: list[Plan] = [policy.plan(wild_scenario(seed)) for policy in POLICIES.values()]
    for plan in plans:
        assert plan.predicted_e2e_s == max(request.predicted_e2e_s for request in plan.requests)
        assert plan.predicted_question_s == max(request.predicted_question_s for request in plan.requests)
        assert plan.known == all(request.known for request in plan.requests)
        assert plan.links == tuple(link for request in plan.requests for link in request.links)


def test_a_policy_that_knows_no_bound_has_none() -> None:
    assert get_policy("token").plan(scenario_of([make_link()])).bound_s is None
