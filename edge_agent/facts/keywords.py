"""Keywords by YAKE (Campos et al. 2020): statistics of one text, no model."""

from __future__ import annotations

import logging
import math
import re
import threading
from typing import Any

from edge_agent.facts.fact import Fact, cut

MAX_WORDS = 3
MAX_KEYWORDS = 100
BEST_CONFIDENCE = 0.45
# YAKE's score from which on a keyword is worth less than half of the best; most lie between 0.001 and 0.3.
HALF_SCORE = 0.1

# Its tokenizer takes time in the square of what stands without a blank; 50,000 apostrophes took half a minute.
_ENDLESS = re.compile(r"\S{200,}+")


class Keywords:
    """YAKE, loaded when it is first asked. Safe to be asked by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._yake: Any = None

    def find(self, text: str) -> list[Fact]:
        """The keywords of a text, best first, each where it first stands; one that stands nowhere as such is left out.

        YAKE joins words over quotes and cuts off genitives, so that not all its keywords can be found again.
        """
        found = []
        for phrase, score in self._extractor().extract_keywords(_ENDLESS.sub(" ", text)):
            place = _place(text, phrase)
            fact = place and cut(text, *place, "keyword", confidence=confidence(float(score)))
            if fact:
                found.append(fact)
        return found

    def _extractor(self) -> Any:
        with self._lock:
            if self._yake is None:
                # Imported late: it brings networkx, and an agent may never need it.
                import yake  # noqa: PLC0415

                # Where YAKE fails it logs the text's beginning, which is nobody's business, and returns no keywords.
                logging.getLogger("yake").setLevel(logging.CRITICAL)
                # From dedup_lim=1 on it keeps no cache of texts; duplicates are dropped by `ranked`.
                self._yake = yake.KeywordExtractor(lan="en", n=MAX_WORDS, dedup_lim=1.0, top=MAX_KEYWORDS)
            return self._yake


def confidence(score: float) -> float:
    """YAKE's score (0 is best, without upper bound) as confidence: BEST_CONFIDENCE / (1 + score / HALF_SCORE)."""
    if math.isnan(score):
        return 0.0
    return BEST_CONFIDENCE / (1 + max(score, 0.0) / HALF_SCORE)


def _place(text: str, phrase: str) -> tuple[int, int] | None:
    words = phrase.split()
    if not words:
        return None
    match = re.search(r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + r"(?!\w)", text, re.IGNORECASE)
    return match and match.span()
