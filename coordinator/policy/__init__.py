"""Policies by name. A policy is a pure function from a scenario to a plan."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from coordinator.errors import PolicyUnknown
from coordinator.policy.base import LinkPlan, Plan, Policy, RequestPlan
from coordinator.policy.fixed import CachePolicy, TokenPolicy
from coordinator.policy.jmsra import JmsraPolicy
from coordinator.policy.optimum import OptimumPolicy
from coordinator.policy.rungs import PressureCaps
from coordinator.policy.scenario import PlanRequest, build_scenario

DEFAULT_POLICY = "optimum"

POLICIES: MappingProxyType[str, Policy] = MappingProxyType(
    {policy.name: policy for policy in (OptimumPolicy(), JmsraPolicy(), TokenPolicy(), CachePolicy())}
)


def get_policy(name: str, policies: Mapping[str, Policy] = POLICIES) -> Policy:
    """The policy of that name. Raises PolicyUnknown, which lists those there are."""
    try:
        return policies[name]
    except KeyError:
        raise PolicyUnknown(name, policies) from None


__all__ = [
    "DEFAULT_POLICY",
    "POLICIES",
    "LinkPlan",
    "Plan",
    "PlanRequest",
    "Policy",
    "PressureCaps",
    "RequestPlan",
    "build_scenario",
    "get_policy",
]
