"""What kind of text it is, at the price of a few regular expressions."""

from __future__ import annotations

import re
from typing import Literal

from edge_agent.facts.names import runs
from edge_agent.facts.patterns import technical

ContentType = Literal["general", "technical", "entities"]

SAMPLE_CHARACTERS = 10_000
# One hit in so many words or fewer makes the text of that kind; and more than one hit it must be.
WORDS_PER_TECHNICAL = 30
WORDS_PER_NAME = 40
MIN_HITS = 2

_WORD = re.compile(r"\w++")
_CODE = re.compile(r"\w\(\)|`[^`\n]{1,80}`|[{}]|[-=]>|::|[=!]=|</?[a-z]|;\s*\n")


def content_type(text: str) -> ContentType:
    """What is dense in the first 10,000 characters of a text.

    technical: endpoints, versions, identifiers, code; entities: names of two words or more; general: neither.
    """
    sample = text[:SAMPLE_CHARACTERS]
    words = sum(1 for _ in _WORD.finditer(sample))
    if _dense(len(technical(sample)) + sum(1 for _ in _CODE.finditer(sample)), words, WORDS_PER_TECHNICAL):
        return "technical"
    if _dense(sum(len(run) > 1 for run in runs(sample)), words, WORDS_PER_NAME):
        return "entities"
    return "general"


def _dense(hits: int, words: int, words_per_hit: int) -> bool:
    return hits >= MIN_HITS and hits * words_per_hit >= words
