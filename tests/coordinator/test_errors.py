from __future__ import annotations

import inspect

import pytest

from coordinator import errors
from coordinator.errors import (
    AgentOffline,
    AgentUnknown,
    ContextAmbiguous,
    ContextNotHeld,
    CoordinatorError,
    ModelsDiffer,
    PolicyUnknown,
    RequestImpossible,
    RequestRefused,
)

ALL = [
    (AgentUnknown("pi-7", ["pi-2", "pi-1"]), "no agent is called pi-7: known are pi-1, pi-2"),
    (AgentUnknown("pi-7", []), "no agent is called pi-7: no agent has been heard of yet; start one"),
    (AgentOffline("pi-1", 12.4), "pi-1 is offline (last heard 12 s ago); start it or leave it out"),
    (
        AgentOffline("pi-1", None),
        "pi-1 is offline (never heard since this coordinator started); start it or leave it out",
    ),
    (ContextNotHeld("pi-1", "plan", ["log", "map"]), "pi-1 holds no context called plan: it holds log, map"),
    (ContextNotHeld("pi-1", None, []), "pi-1 holds no context: give it one first"),
    (ContextAmbiguous("pi-1", ["map", "log"]), "pi-1 holds 2 contexts (log, map); name one, such as pi-1:log"),
    (
        ModelsDiffer("pi-1", "SmolLM2", "pi-2", "Gemma"),
        (
            "pi-1 (SmolLM2) and pi-2 (Gemma) run different models; alignment is not built yet: "
            "ask between agents that run the same one"
        ),
    ),
    (PolicyUnknown("best", ["token", "kv"]), "no policy is called best: choose one of kv, token"),
    (RequestRefused("pi-1 is offline"), "pi-1 is offline"),
    (RequestImpossible("it names no source"), "this request is not possible: it names no source"),
]


@pytest.mark.parametrize(("error", "line"), ALL, ids=lambda value: type(value).__name__)
def test_each_error_is_one_line_that_says_what_to_do(error: CoordinatorError, line: str) -> None:
    assert str(error) == line
    assert "\n" not in line


def test_every_error_is_in_the_tree_that_the_docstring_draws() -> None:
    classes = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, Exception)}
    drawn = inspect.getdoc(errors) or ""
    assert all(f"{name} " in drawn or f"{name}\n" in drawn for name in classes)
    assert all(issubclass(cls, CoordinatorError) for cls in classes.values())


def test_a_long_list_of_names_is_cut_with_a_count() -> None:
    line = str(AgentUnknown("x", [f"pi-{number:02}" for number in range(40)]))
    assert line.endswith("pi-07 and 32 more")


def test_an_error_carries_its_data() -> None:
    error = AgentUnknown("pi-7", ["pi-2", "pi-1"])
    assert (error.agent, error.known) == ("pi-7", ("pi-1", "pi-2"))
