"""Named entities and noun chunks by spaCy, if it and its model are installed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

from edge_agent.facts.fact import VALUED, Fact, cut

log = logging.getLogger(__name__)

# A bare number says little and an ordinal less; all other labels are worth the same.
CONFIDENCE_OF_LABEL = {"CARDINAL": 0.5, "ORDINAL": 0.3}
CHUNK_CONFIDENCE = 0.35
MAX_CHUNK_WORDS = 6
# Parts of the pipeline that neither entities nor noun chunks need.
_UNUSED = ["lemmatizer", "senter"]
_LEADING = frozenset({"DET", "PRON", "SPACE", "PUNCT"})
_INSTEAD = "entities by YAKE and patterns"


class Entities:
    """spaCy's pipeline, loaded when it is first asked. Safe to be asked by several threads."""

    def __init__(self, model: str | None) -> None:
        self.note = ""
        self._model = model
        self._lock = threading.Lock()
        self._tried = model is None
        self._pipeline: Any = None

    def find(self, text: str) -> list[Fact] | None:
        """Entities and noun chunks of a text; None if there is no pipeline. If one was wanted, `note` says why."""
        with self._lock:
            if not self._tried:
                self._tried = True
                self._load()
            if self._pipeline is None:
                return None
            # Words it had not met before are forgotten with the zone; else its vocabulary would grow with every text.
            with self._pipeline.memory_zone():
                return list(_facts(self._pipeline(text), text))

    def _load(self) -> None:
        try:
            # Imported late: it takes seconds and 100 MB.
            import spacy  # noqa: PLC0415
        except ImportError:
            self._miss(f"spaCy is not installed: {_INSTEAD}; pip install 'kvbus[entities]'")
            return
        except ValueError as error:  # one built for another numpy
            self._miss(f"spaCy can't be loaded ({_first_line(error)}): {_INSTEAD}")
            return
        try:
            self._pipeline = spacy.load(self._model, exclude=_UNUSED)
        except OSError:
            self._miss(
                f"spaCy's model {self._model} is not installed: {_INSTEAD}; python -m spacy download {self._model}"
            )
        except (ImportError, ValueError) as error:  # made for another version of spaCy
            self._miss(f"spaCy's model {self._model} can't be loaded ({_first_line(error)}): {_INSTEAD}")

    def _miss(self, note: str) -> None:
        self.note = note
        log.warning("%s", note)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _facts(document: Any, text: str) -> Iterator[Fact]:
    for entity in document.ents:
        start = _past_article(entity)
        worth = CONFIDENCE_OF_LABEL.get(entity.label_, VALUED)
        fact = cut(text, start, entity.end_char, "entity", confidence=worth, detail=entity.label_[:64])
        if fact is not None:
            yield fact
    for chunk in document.noun_chunks:
        start = _past_article(chunk)
        fact = cut(text, start, chunk.end_char, "noun_chunk", confidence=CHUNK_CONFIDENCE)
        if fact is not None and len(fact.content.split()) <= MAX_CHUNK_WORDS:
            yield fact


def _past_article(span: Any) -> int:
    """Where a span begins without leading determiners and pronouns; its end, if nothing else is in it."""
    first: int = next((token.idx for token in span if token.pos_ not in _LEADING), span.end_char)
    return first
