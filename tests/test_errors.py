"""One tree of errors per package, drawn in its module's docstring, and nothing outside of it."""

from __future__ import annotations

import inspect
import re
from types import ModuleType

import pytest

from broker_config import errors as bus
from coordinator import errors as coordinator
from edge_agent import errors as agent
from edge_agent.release import errors as release
from scripts.evaluate import errors as evaluation
from scripts.flash import errors as flash
from scripts.link import errors as link
from scripts.policies import errors as policies
from scripts.prepare_model import errors as preparation

ROOTS: dict[ModuleType, type[Exception]] = {
    bus: bus.BusError,
    agent: agent.AgentError,
    coordinator: coordinator.CoordinatorError,
    evaluation: evaluation.EvaluationError,
    flash: flash.FlashError,
    link: link.LinkError,
    policies: policies.PoliciesError,
    preparation: preparation.PreparationError,
    release: release.ReleaseError,
}
packages = pytest.mark.parametrize("module", ROOTS, ids=lambda module: module.__name__)


def classes(module: ModuleType) -> dict[str, type[Exception]]:
    """The error classes that a module defines."""
    found = vars(module).items()
    return {
        name: each
        for name, each in found
        if inspect.isclass(each) and issubclass(each, Exception) and each.__module__ == module.__name__
    }


def drawn(module: ModuleType) -> dict[str, str]:
    """Name → name of the parent (the root's is ""), as the docstring draws it: a level is four characters wide."""
    path: list[str] = []
    tree: dict[str, str] = {}
    for line in (inspect.getdoc(module) or "").splitlines():
        row = re.match(r"(?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+)(?:\s{2,}|$)", line)
        if row:
            depth = len(row["branch"]) // 4
            path = [*path[:depth], row["name"]]
            tree[row["name"]] = path[depth - 1] if depth else ""
    return tree


@packages
def test_every_error_stands_in_the_tree_that_the_docstring_draws(module: ModuleType) -> None:
    assert sorted(drawn(module)) == sorted(classes(module))


@packages
def test_every_error_derives_from_the_one_it_is_drawn_under_and_so_from_the_root(module: ModuleType) -> None:
    known = classes(module)
    for name, parent in drawn(module).items():
        assert issubclass(known[name], ROOTS[module])
        assert known[name].__base__ is (known[parent] if parent else Exception) or parent in {
            base.__name__ for base in known[name].__bases__
        }


@packages
def test_every_error_says_what_it_is_for(module: ModuleType) -> None:
    for each in classes(module).values():
        doc = each.__dict__.get("__doc__") or ""
        assert doc[:1].isupper(), f"{each.__name__} needs a docstring"


def test_the_trees_share_no_root() -> None:
    roots = list(ROOTS.values())
    assert not any(issubclass(one, other) for one in roots for other in roots if one is not other)
