"""Which facts come first, which are said twice, and which fit a budget. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from edge_agent.facts.fact import MAX_FACTS, Fact

SEPARATOR = "; "
# After so many facts in a row that did not fit, the few tokens that are left are not worth more counting.
MAX_MISSES = 100
_LOOSE = ".,:;!?\"'()[]"


def ranked(facts: Iterable[Fact]) -> tuple[Fact, ...]:
    """Facts of one text by confidence, then place; of two that overlap or say the same only the better is kept.

    A fact says the same as a better one if its words, whatever their case, stand in that one side by side.
    """
    kept: list[Fact] = []
    spans: list[tuple[int, int]] = []
    said = ""
    for fact in sorted(facts, key=_rank):
        words = f" {_key(fact)} "
        at = bisect_left(spans, (fact.end, 0))
        if words in said or (at and spans[at - 1][1] > fact.start):
            continue
        kept.append(fact)
        spans.insert(at, (fact.start, fact.end))
        said += words + "\n"
    return tuple(kept)


def within(facts: Sequence[Fact], budget_tokens: int, count: Callable[[str], int]) -> tuple[Fact, ...]:
    """The best of ranked facts of one text whose summary is at most budget_tokens long, in the order of the text; at
    most 256.

    One that does not fit is passed over for shorter ones after it. count: tokens of a text.
    """
    chosen: list[Fact] = []
    misses = 0
    for fact in facts:
        if misses == MAX_MISSES or len(chosen) == MAX_FACTS:
            break
        more = sorted([*chosen, fact], key=_place)
        if count(summary(more)) <= budget_tokens:
            chosen, misses = more, 0
        else:
            misses += 1
    return tuple(chosen)


def merged(parts: Sequence[Sequence[Fact]]) -> tuple[Fact, ...]:
    """Facts of several texts one after another, without those that an earlier text gave in the same words."""
    first: dict[str, Fact] = {}
    for fact in (fact for part in parts for fact in part):
        first.setdefault(fact.content.casefold(), fact)
    return tuple(first.values())


def summary(facts: Sequence[Fact]) -> str:
    """The line that the receiver reads."""
    return SEPARATOR.join(fact.content for fact in facts)


def _rank(fact: Fact) -> tuple[float, int, int, str, str, str]:
    # Of equals at one place the longer one: it holds the other.
    return -fact.confidence, fact.start, -fact.end, fact.type, fact.detail, fact.content


def _place(fact: Fact) -> tuple[int, int]:
    return fact.start, fact.end


def _key(fact: Fact) -> str:
    words = (word.strip(_LOOSE) for word in fact.content.casefold().split())
    return " ".join(word for word in words if word) or fact.content.casefold()
