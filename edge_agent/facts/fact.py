"""A fact: a short piece of a text that a reader may be asked for (methods.md 1.5).

Confidence says how likely a reader is to want a fact, so that facts of all kinds rank in one list:

    0.9         endpoints, rate limits: what a technical text is read for, and hard to guess
    0.75-0.8    identifiers, versions: a name in capitals with digits or underscores is one of these rather than a name
    0.7         names, quantities, dates: what most questions ask for. They share one figure, so that the order of the
                text decides among them: on questions of SQuAD, HotpotQA and NarrativeQA that kept as many answers
                within 64 tokens as any order of kinds that was tried, and more than quantities and dates first
    0.3-0.55    weekdays, counts in words, bare numbers, an HTTP method alone, noun chunks
    0-0.45      keywords: they say what a text is about, seldom what is asked of it
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

FactType = Literal[
    "keyword",
    "entity",
    "noun_chunk",
    "endpoint",
    "http_method",
    "rate_limit",
    "version",
    "quantity",
    "date",
    "identifier",
]

# The confidence that most kinds of fact share, see above.
VALUED = 0.7
MAX_CONTENT_CHARACTERS = 256
MAX_FACTS = 256
"""Of one text that are sent."""
_LOOSE = " \t\n\r\f\v\"'`“”‘’«»,;:!?*#|"


class Fact(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A piece of a text, as it stands there but for its white space.

    content: one line. confidence: 0-1, see above. start, end: characters of the source text, such that
    `" ".join(text[start:end].split()) == content`. detail: the entity's label or the pattern's name.
    """

    type: FactType
    content: Annotated[str, Meta(min_length=1, max_length=MAX_CONTENT_CHARACTERS)]
    confidence: Annotated[float, Meta(ge=0, le=1)]
    start: Annotated[int, Meta(ge=0, le=2**24)]
    end: Annotated[int, Meta(ge=0, le=2**24)]
    detail: Annotated[str, Meta(max_length=64)] = ""


def cut(text: str, start: int, end: int, kind: FactType, *, confidence: float, detail: str = "") -> Fact | None:
    """The fact that text[start:end] is, without loose punctuation at its ends.

    None if nothing readable is left, or if it is too long to be a fact or holds control characters.
    """
    piece = text[start:end]
    end -= len(piece) - len(piece.rstrip().rstrip(_LOOSE))
    start += len(piece) - len(piece.lstrip().lstrip(_LOOSE))
    content = " ".join(text[start:end].split())
    if not content or len(content) > MAX_CONTENT_CHARACTERS or not content.isprintable():
        return None
    if not any(map(str.isalnum, content)):
        return None
    return Fact(type=kind, content=content, confidence=confidence, start=start, end=end, detail=detail)
