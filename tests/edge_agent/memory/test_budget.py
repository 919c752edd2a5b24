"""The budget follows the device's memory, and caches themselves do not move it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.memory.budget import Budget, System

sizes = st.integers(0, 1 << 34)


@given(sizes, sizes, sizes, st.floats(0.01, 1))
def test_what_caches_give_back_changes_nothing(available: int, held: int, given_back: int, share: float) -> None:
    given_back = min(held, given_back)
    before = Budget(limit_bytes=1 << 40, share=share, system=lambda: System(available))
    after = Budget(limit_bytes=1 << 40, share=share, system=lambda: System(available + given_back))
    assert before.bytes_now(held) == after.bytes_now(held - given_back)


@given(sizes, sizes, st.floats(0, 1), st.floats(0, 1))
def test_less_memory_and_more_waiting_never_raise_it(available: int, less: int, stalled: float, more: float) -> None:
    def now(free: int, share: float | None) -> int:
        return Budget(limit_bytes=1 << 30, share=0.5, system=lambda: System(free, share)).bytes_now(0)

    assert now(min(available, less), None) <= now(max(available, less), None) <= 1 << 30
    assert now(available, max(stalled, more)) <= now(available, min(stalled, more)) <= now(available, None)
    assert now(available, 1.0) == 0


def test_the_real_system_has_some() -> None:
    assert 0 < System.now().available_bytes < 1 << 50
    assert Budget(limit_bytes=1 << 50).bytes_now(0) > 0


@pytest.mark.parametrize(
    ("share", "high", "low"), [(0, 0.8, 0.6), (1.5, 0.8, 0.6), (1, 1.2, 0.6), (1, 0.8, 0.9), (1, 0.8, 0)]
)
def test_marks_that_make_no_sense_are_refused(share: float, high: float, low: float) -> None:
    with pytest.raises(ValueError, match="no budget"):
        Budget(limit_bytes=1, share=share, high=high, low=low)
