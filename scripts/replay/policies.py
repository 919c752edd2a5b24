"""Policies to be replayed: those of the coordinator by name, others as `module:name`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, cast

from coordinator.errors import PolicyUnknown
from coordinator.latency import Scenario
from coordinator.policy import POLICIES, Plan, Policy, get_policy
from scripts.replay.errors import SettingInvalid


def policy_named(name: str) -> Policy:
    """A policy of the coordinator, or what stands under that name in a module: a policy, or a class of one.

    Raises SettingInvalid.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        try:
            return get_policy(name)
        except PolicyUnknown as error:
            raise SettingInvalid(f"{error}, or one of your own as module:name") from None
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
        policy: Any = found() if inspect.isclass(found) else found
    except Exception as error:  # noqa: BLE001  it is the user's own module: whatever it raises is the reason
        raise SettingInvalid(f"policy {name}: {type(error).__name__}: {error}") from None
    if not callable(getattr(policy, "plan", None)) or not isinstance(getattr(policy, "name", None), str):
        raise SettingInvalid(f"policy {name} has no name, or no plan(scenario)")
    return cast("Policy", policy)


class Watched:
    """A policy whose first error is kept, and told to whoever replays it."""

    def __init__(self, policy: Policy, raised: Callable[[], None]) -> None:
        self._policy, self._raised = policy, raised
        self.error = ""

    @property
    def name(self) -> str:
        return self._policy.name

    def plan(self, scenario: Scenario) -> Plan:
        """As the policy does."""
        try:
            return self._policy.plan(scenario)
        except Exception as error:
            self.error = self.error or f"{type(error).__name__}: {error}"
            self._raised()
            raise


def known(policy: Policy) -> dict[str, Policy]:
    """The coordinator's policies and this one."""
    return {**POLICIES, policy.name: policy}
