"""The order of facts, what is said twice, and what fits a budget."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.facts import Fact, merged, ranked, summary, within
from edge_agent.facts.rank import MAX_MISSES

WORDS = st.sampled_from(["Ada", "ada", "pump", "Pump 3", "12 kg", "10 %", "the pump", "3", "Castle Hill", "castle"])


def fact(content: str, start: int = 0, confidence: float = 0.5) -> Fact:
    return Fact(type="entity", content=content, confidence=confidence, start=start, end=start + len(content))


def words(text: str) -> int:
    return len(text.split())


FACTS = st.lists(st.builds(fact, WORDS, st.integers(0, 60), st.sampled_from([0.0, 0.3, 0.5, 1.0])), max_size=12)


def test_confidence_decides_then_the_place() -> None:
    last, second, first = fact("a b", 0, 0.1), fact("c d", 30, 0.5), fact("e f", 20, 0.5)
    assert ranked([last, second, first]) == (first, second, last)


def test_of_two_that_overlap_the_better_is_kept_and_of_equals_the_longer() -> None:
    better, worse = fact("October 1973", 10, 0.8), fact("in October", 7, 0.5)
    assert ranked([worse, better]) == (better,)
    longer, shorter = fact("12 March 1931", 3), fact("12 March", 3)
    assert ranked([shorter, longer]) == (longer,)


def test_what_a_better_fact_says_is_not_said_again() -> None:
    better = fact("Maria Lindqvist", 0, 0.9)
    assert ranked([better, fact("maria lindqvist", 50), fact("Lindqvist", 90), fact("LINDQVIST,", 120)]) == (better,)


def test_part_of_a_word_or_the_same_figure_of_something_else_is_not_the_same() -> None:
    facts = [fact("Marianne", 0, 0.9), fact("Maria", 20), fact("10 kg", 40), fact("10 %", 60)]
    assert len(ranked(facts)) == 4


@given(FACTS)
def test_ranking_is_idempotent_sorted_and_keeps_a_word_of_all(facts: list[Fact]) -> None:
    kept = ranked(facts)
    assert ranked(kept) == kept == ranked(reversed(facts))
    assert all(first.confidence >= second.confidence for first, second in pairwise(kept))
    assert all(a.end <= b.start or b.end <= a.start for a in kept for b in kept if a is not b)
    assert bool(kept) == bool(facts)
    assert set(kept) <= set(facts)


@given(FACTS, st.integers(0, 20))
def test_within_keeps_the_budget_and_leaves_out_only_what_does_not_fit(facts: list[Fact], budget: int) -> None:
    best = ranked(facts)
    chosen = within(best, budget, words)
    assert words(summary(chosen)) <= budget
    assert list(chosen) == sorted(chosen, key=lambda one: one.start)
    room = budget
    for one in best:  # what the plainest greedy choice takes
        taken = words(one.content) <= room
        assert (one in chosen) == taken
        room -= words(one.content) * taken


def test_a_fact_that_does_not_fit_is_passed_over_for_shorter_ones() -> None:
    facts = (fact("a", 40, 0.9), fact("b c d e f", 20, 0.8), fact("g h", 0, 0.7))
    assert [one.content for one in within(facts, 3, words)] == ["g h", "a"]


def test_where_nothing_fits_counting_ends() -> None:
    calls = []

    def count(text: str) -> int:
        calls.append(text)
        return words(text)

    assert not within([fact(f"a b c{index}", 10 * index) for index in range(1000)], 2, count)
    assert len(calls) == MAX_MISSES


def test_merged_keeps_the_order_of_the_texts_and_drops_what_an_earlier_one_said() -> None:
    first, second = [fact("Ada", 9), fact("12 kg", 3)], [fact("ADA", 0, 0.9), fact("Ada Lovelace", 5)]
    assert [one.content for one in merged([first, [], second])] == ["Ada", "12 kg", "Ada Lovelace"]
    assert merged([]) == ()


def test_the_summary_is_one_line() -> None:
    assert summary([]) == ""
    assert summary([fact("Ada"), fact("12 kg")]) == "Ada; 12 kg"


@pytest.mark.parametrize("change", [{"content": ""}, {"content": "x" * 257}, {"confidence": 1.1}, {"start": -1}])
def test_a_fact_off_the_wire_keeps_its_bounds(change: dict[str, object]) -> None:
    whole = {name: getattr(fact("Ada"), name) for name in Fact.__struct_fields__}
    assert msgspec.convert(list(whole.values()), Fact) == fact("Ada")
    raw = list((whole | change).values())
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(raw, Fact)
