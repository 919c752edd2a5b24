"""What the tables of patterns have in common.

Every expression runs in time linear in the text: what repeats is bounded or possessive, so that each start costs a
bounded number of steps, and most begin with a lookbehind that lets them enter a run of characters at its start only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from msgspec import Struct

from edge_agent.facts.fact import Fact, FactType, cut


class Pattern(Struct, frozen=True):
    """An expression and what its matches are; name is the facts' detail."""

    type: FactType
    name: str
    confidence: float
    expression: re.Pattern[str]

    def find(self, text: str) -> Iterator[Fact]:
        """The matches in text, in their order."""
        for match in self.expression.finditer(text):
            fact = cut(text, *match.span(), self.type, confidence=self.confidence, detail=self.name)
            if fact is not None:
                yield fact


def find_all(patterns: Iterable[Pattern], text: str) -> list[Fact]:
    """The matches of all patterns; they may overlap."""
    return [fact for pattern in patterns for fact in pattern.find(text)]
