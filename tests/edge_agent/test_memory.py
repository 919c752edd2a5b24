"""The store keeps its budget, puts the least recently used out first, and never what is pinned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import BudgetExceeded, ContextUnknown
from edge_agent.memory import ContextStore
from tests.edge_agent.caches import made_up

ONE = made_up(entries=8)


def store(caches: int) -> ContextStore:
    """Room for so many caches, contexts a … held."""
    held = ContextStore(ONE.nbytes * caches)
    for name in "abcdef":
        held.add(name, name * 32, (1, 2, 3))
    return held


def test_the_least_recently_used_goes_first() -> None:
    held = store(2)
    held.put("a" * 32, ONE)
    held.put("b" * 32, ONE)
    held.cache("a" * 32)
    assert held.put("c" * 32, ONE) == ("b" * 32,)
    assert [info.name for info in held.infos() if info.cached] == ["a", "c"]


def test_what_is_pinned_stays() -> None:
    held = store(2)
    held.put("a" * 32, ONE)
    held.put("b" * 32, ONE)
    with held.pinned("a" * 32):
        assert held.put("c" * 32, ONE) == ("b" * 32,)
    assert held.put("d" * 32, ONE) == ("a" * 32,)


def test_a_pin_does_not_outlive_its_block() -> None:
    held = store(1)
    held.put("a" * 32, ONE)
    with pytest.raises(RuntimeError, match="fault"), held.pinned("a" * 32):
        raise RuntimeError("fault")
    assert held.put("b" * 32, ONE) == ("a" * 32,)


def test_a_cache_that_cannot_fit_changes_nothing() -> None:
    held = store(1)
    held.put("a" * 32, ONE)
    with pytest.raises(BudgetExceeded, match="does not fit the budget"):
        held.put("b" * 32, made_up(entries=80))
    with held.pinned("a" * 32), pytest.raises(BudgetExceeded, match="in use"):
        held.put("b" * 32, ONE)
    assert held.cache("a" * 32) is ONE


def test_text_stays_when_a_cache_goes_and_goes_when_removed() -> None:
    held = store(1)
    held.put("a" * 32, ONE)
    held.put("b" * 32, ONE)
    assert held.get("a" * 32).ids == (1, 2, 3)
    held.remove("b")
    assert held.cache_bytes == 0
    with pytest.raises(ContextUnknown, match="no context named b"):
        held.remove("b")
    with pytest.raises(ContextUnknown):
        held.get("b" * 32)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 30)), max_size=30))
def test_the_budget_is_never_exceeded(puts: list[tuple[str, int]]) -> None:
    held = store(3)
    for name, entries in puts:
        try:
            held.put(name * 32, made_up(entries=entries))
        except BudgetExceeded:
            assert made_up(entries=entries).nbytes > held.budget_bytes
        assert held.cache_bytes <= held.budget_bytes
