"""From a text to its facts (Q-KVComm, methods.md 1.5)."""

from __future__ import annotations

from edge_agent.facts.detect import content_type
from edge_agent.facts.entities import Entities
from edge_agent.facts.fact import Fact
from edge_agent.facts.keywords import Keywords
from edge_agent.facts.measures import measures
from edge_agent.facts.names import names
from edge_agent.facts.patterns import technical
from edge_agent.facts.rank import ranked

# More than the window of a small model holds; it bounds the time that a text takes (seconds, on a desktop).
READ_CHARACTERS = 50_000


class Extractor:
    """Extracts facts: patterns from any text, and besides

    - from text dense with names: entities and noun chunks by spaCy, if it can be had;
    - from any other: keywords by YAKE and names by their capitals.

    spacy_model: a name or a path; None: never use spaCy. YAKE and spaCy are loaded when a text first needs them.
    """

    def __init__(self, *, spacy_model: str | None = "en_core_web_sm") -> None:
        self._keywords = Keywords()
        self._entities = Entities(spacy_model)

    @property
    def note(self) -> str:
        """One line that says what was missing at the first text that needed it, or nothing."""
        return self._entities.note

    def extract(self, text: str) -> tuple[Fact, ...]:
        """The facts of a text's first 50,000 characters, best first, none twice. Of a blank text none.

        Deterministic, and safe to be called by several threads.
        """
        text = text[:READ_CHARACTERS]
        if not text.strip():
            return ()
        entities = self._entities.find(text) if content_type(text) == "entities" else None
        if entities is None:
            entities = names(text) + self._keywords.find(text)
        return ranked(technical(text) + measures(text) + entities)
