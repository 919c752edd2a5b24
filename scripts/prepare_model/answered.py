"""Calibration passages with a question each and the uncompressed run's answer: what losses are measured along."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from msgspec import Struct

from edge_agent.kv.cache import Cache
from edge_agent.model.session import Model, Runtime
from edge_agent.model.text import Text
from scripts import relay

QUESTIONS = (
    "What is this passage about?",
    "What happened?",
    "Which number is given?",
    "Who or what is named first?",
    "When or where was this?",
    "Why?",
)
MAX_PASSAGE_TOKENS = 256
MAX_ANSWER_POSITIONS = 16
# Share of the window that a calibration passage may take, for models with a small one.
_WINDOW_SHARE = 0.5


class Asked(Struct, frozen=True, kw_only=True):
    """A context with a question, as token ids."""

    context: tuple[int, ...]
    question: tuple[int, ...]


def question_for(index: int) -> str:
    """The question that the passage of this number is asked."""
    return QUESTIONS[index % len(QUESTIONS)]


def passage_tokens(window_tokens: int, prefix_tokens: int) -> int:
    """How many tokens a passage may have as a context behind the prefix."""
    return max(8, min(MAX_PASSAGE_TOKENS, int(window_tokens * _WINDOW_SHARE) - prefix_tokens))


class Answered:
    """Passages under a bundle's graph, a reference for each question as it is asked for.

    questions: of each passage. threads: 0 is one per core.
    """

    def __init__(self, bundle: Path, passages: Sequence[str], *, questions: int = 1, threads: int = 0) -> None:
        self.model = Model(bundle, Runtime(threads=threads or os.cpu_count() or 1))
        self.manifest = self.model.manifest
        self.prefix = relay.after_prefix(self.model)
        self._text = Text(bundle, self.manifest)
        self._passages, self._questions = tuple(passages), questions

    def __len__(self) -> int:
        return len(self._passages) * self._questions

    def __iter__(self) -> Iterator[relay.Reference]:
        return chain.from_iterable(self.by_passage())

    def by_passage(self) -> Iterator[list[relay.Reference]]:
        """The references of each passage, which share its cache."""
        for index, passage in enumerate(self._passages):
            cache = relay.read_context(self.prefix, self._fitting(passage))
            asked = (question_for(index + len(QUESTIONS) // 2 * more) for more in range(self._questions))
            yield [self._reference(cache, self._text.question_ids(question)) for question in asked]

    def _reference(self, cache: Cache, question: list[int]) -> relay.Reference:
        return relay.uncompressed(self.model, self._text, self.prefix, cache, question, most=MAX_ANSWER_POSITIONS)

    def _fitting(self, passage: str) -> list[int]:
        """Ids of a passage as a context, whole words of it, as many as fit."""
        most = passage_tokens(self.manifest.window_tokens, self.prefix.entries)
        ids = self._text.context_ids(passage)
        while len(ids) > most and len(words := passage.split()) > 1:
            passage = " ".join(words[: min(len(words) - 1, len(words) * most // len(ids))])
            ids = self._text.context_ids(passage)
        return ids[:most]
