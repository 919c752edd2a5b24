"""The versioned prompt: two examples that a small model needs, then the passages, the facts, the question.

Every piece is tokenized by itself, so that a cache of one can be joined with the cache of another. Pieces are cut
before a blank line's second newline and after a newline, where a byte-level tokenizer cuts too: a prefix that ended in
the blank line itself would end in a token for "\\n\\n" that never stands there in running text, which cost SmolLM2
a quarter of its F1. One example has facts, as some prompts have: SmolLM2 then uses those that come, and where none come
references are 0.2 nats a token more likely than after examples without (SQuAD, 130 items).
"""

from __future__ import annotations

from typing import Protocol

from edge_agent.model.manifest import Prompt
from scripts.prepare_model.errors import ModelRefused

PROMPT_VERSION = 2

PREFIX = (
    "Passage: The Lenn bridge, built by the engineer Karl Voss, was opened in 1931. It is 214 metres long.\n"
    "Facts: Lenn bridge; Karl Voss; 1931; 214 metres\n"
    "Question: Who built the Lenn bridge?\n"
    "Answer: Karl Voss\n"
    "\n"
    "Passage: Sensor 7 in the cold store failed on 12 March because its cable was torn. It was replaced the next day.\n"
    "Question: Why did sensor 7 fail?\n"
    "Answer: its cable was torn\n"
)
CONTEXT_FORMAT = "\nPassage: {text}\n"
FACTS_FORMAT = "Facts: {facts}\n"
QUESTION_FORMAT = "Question: {question}\nAnswer:"
STOP = ("\n",)


class Encoding(Protocol):
    """Part of `tokenizers.Encoding`."""

    @property
    def ids(self) -> list[int]: ...


class Tokenizer(Protocol):
    """Part of `tokenizers.Tokenizer`."""

    def encode(self, sequence: str, *, add_special_tokens: bool) -> Encoding: ...


def tokenize(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Token ids of one piece by itself, without special tokens."""
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids)


def make_prompt(tokenizer: Tokenizer, leading_ids: tuple[int, ...] = ()) -> Prompt:
    """The prompt for a model with this tokenizer. leading_ids: what the model wants before any text (Gemma its <bos>).

    Raises ModelRefused if the tokenizer loses the prompt's text.
    """
    ids = tokenize(tokenizer, PREFIX)
    if not ids:
        raise ModelRefused("the tokenizer makes no token of the prompt; is tokenizer.json whole?")
    return Prompt(
        version=PROMPT_VERSION,
        prefix=PREFIX,
        prefix_ids=(*leading_ids, *ids),
        context_format=CONTEXT_FORMAT,
        facts_format=FACTS_FORMAT,
        question_format=QUESTION_FORMAT,
        stop=STOP,
    )
