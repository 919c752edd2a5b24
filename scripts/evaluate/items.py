"""Questions with their contexts, read from the formats in which question-answering sets come.

Known by their content, not their name: JSON lines with `context`, `question` and `answers` (ours, and those that
Hugging Face's `datasets` writes of SQuAD and HotpotQA), SQuAD's own JSON (1.1 and 2.0), HotpotQA's own JSON.
What can't be asked is skipped and named, line by line; a file that holds nothing else is refused. Multiple choice
comes as JSON lines with `choices` and `answer_index`, from 0; where it has no context, its question stands as one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from scripts.evaluate.errors import DataInvalid

MAX_CHARACTERS = 1_000_000
MAX_CHOICES = 64
WHICH = "What is the answer?"
"""Asked about a context that is itself the question."""

_BOM = b"\xef\xbb\xbf"


class Item(Struct, frozen=True, kw_only=True):
    """A question on a context. answers: references, any of which is right; none where the set gives none.

    choices: of a multiple-choice question, `right` being the place of the right one.
    """

    id: str
    dataset: str
    context: str
    question: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    right: int | None = None

    @property
    def about(self) -> str:
        """Digest of what is asked and of what counts as right, whatever the item is called."""
        return _digest(self.context, self.question, *self.answers, *self.choices)

    @property
    def context_digest(self) -> str:
        """Digest of the context: questions on one context are not independent."""
        return _digest(self.context)


class Skipped(Struct, frozen=True, kw_only=True):
    """What was left out of a file. place: "line 12" or "item 5", counted from 1."""

    file: str
    place: str
    reason: str


class Read(Struct, frozen=True, kw_only=True):
    """A file's items in their order. dataset: the file's name without its ending."""

    dataset: str
    items: tuple[Item, ...]
    skipped: tuple[Skipped, ...]


class _Unusable(Exception):
    """Why a line or an item is skipped."""


def read_items(path: Path) -> Read:
    """Read a file of questions. Raises DataInvalid if it can't be read, is of no known format, or has no usable item.

    Skipped are: broken JSON, fields that are missing or of a wrong type, an empty context or question, an id that an
    earlier item has, and texts of more than MAX_CHARACTERS.
    """
    try:
        content = path.read_bytes().removeprefix(_BOM)
    except OSError as error:
        raise DataInvalid(f"{path}: {error.strerror}") from None
    if not content.strip():
        raise DataInvalid(f"{path} is empty")
    items: dict[str, Item] = {}
    skipped = []
    for place, found in _entries(content, path):
        try:
            item = _item(found, path.stem, items)
        except _Unusable as reason:
            skipped.append(Skipped(file=str(path), place=place, reason=str(reason)))
        else:
            items[item.id] = item
    if not items:
        first = f"{skipped[0].place}: {skipped[0].reason}" if skipped else "it holds none"
        raise DataInvalid(f"{path} has no question that could be asked ({first})")
    return Read(dataset=path.stem, items=tuple(items.values()), skipped=tuple(skipped))


def drawn(items: Sequence[Item], count: int | None, seed: int) -> tuple[Item, ...]:
    """`count` of the items by chance, in their order; all for None, or if there are no more.

    The same for the same seed on every machine; a smaller draw is part of a larger one, so that a run can be extended.
    """
    if count is not None and count < 0:
        raise ValueError(f"{count} items can't be drawn")
    numbers = random.Random(seed)
    lots = [numbers.random() for _ in items]
    chosen = sorted(range(len(items)), key=lots.__getitem__)[:count]
    return tuple(items[index] for index in sorted(chosen))


def _entries(content: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    """Place and decoded object (or the reason why it is none) of all that may be an item."""
    whole = _decoded(content)
    if isinstance(whole, _Unusable):
        for number, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                yield f"line {number}", _decoded(line)
    elif isinstance(whole, dict) and isinstance(whole.get("data"), list):
        for number, entry in enumerate(_squad(whole["data"]), 1):
            yield f"item {number}", entry
    elif isinstance(whole, list):
        for number, entry in enumerate(whole, 1):
            yield f"item {number}", entry
    elif isinstance(whole, dict) and "question" in whole:
        yield "line 1", whole
    else:
        raise DataInvalid(f"{path} is of no known format: neither JSON lines nor SQuAD's nor HotpotQA's own JSON")


def _decoded(text: bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except UnicodeDecodeError:
        return _Unusable("is not UTF-8")
    except RecursionError:
        return _Unusable("is nested too deeply")
    except msgspec.DecodeError as error:
        return _Unusable(f"is not JSON ({error})")


def _squad(articles: list[Any]) -> Iterator[Any]:
    """SQuAD's questions, each with its paragraph's context; a reason for a part that has no questions to be read."""
    for article in articles:
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            yield _Unusable("belongs to an article without a list of paragraphs")
            continue
        for paragraph in paragraphs:
            questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(questions, list):
                yield _Unusable("belongs to a paragraph without a list of questions")
                continue
            for question in questions:
                yield {**question, "context": paragraph.get("context")} if isinstance(question, dict) else question


def _item(found: Any, dataset: str, known: Container[str]) -> Item:
    """An object of any of the formats as an item; raises _Unusable. known: ids that are taken."""
    if isinstance(found, _Unusable):
        raise found
    if not isinstance(found, dict):
        raise _Unusable("is not an object")
    name = _text(found, "id" if "id" in found else "_id")
    if name in known:
        raise _Unusable(f"id {name[:80]!r} stands there twice")
    context, (choices, right) = found.get("context"), _choices(found)
    alone = bool(choices) and not context
    if alone:
        context = _text(found, "question")
    return Item(
        id=name,
        dataset=dataset,
        context=_text({"context": context if isinstance(context, str | None) else _paragraphs(context)}, "context"),
        question=WHICH if alone else _text(found, "question"),
        answers=_answers(found),
        choices=choices,
        right=right,
    )


def _text(found: dict[str, Any], field: str) -> str:
    value = found.get(field)
    if value is None:
        raise _Unusable(f"{field.lstrip('_')} is missing")
    if not isinstance(value, str):
        raise _Unusable(f"{field.lstrip('_')} is not a text")
    if not value.strip():
        raise _Unusable(f"{field.lstrip('_')} is empty")
    if len(value) > MAX_CHARACTERS:
        raise _Unusable(f"{field.lstrip('_')} has {len(value):,} characters; at most {MAX_CHARACTERS:,} are taken")
    return value


def _paragraphs(context: Any) -> str:
    """HotpotQA's paragraphs as one text: `Title: sentences`, a blank line between two."""
    if isinstance(context, dict) and set(context) >= {"title", "sentences"}:
        titles, sentences = context["title"], context["sentences"]
        if not (isinstance(titles, list) and isinstance(sentences, list) and len(titles) == len(sentences)):
            raise _Unusable("context has titles and sentences that don't match")
        context = list(zip(titles, sentences, strict=True))
    try:
        pairs = msgspec.convert(context, list[tuple[str, list[str]]])
    except msgspec.ValidationError:
        raise _Unusable("context is neither a text nor a list of titles and sentences") from None
    return "\n\n".join(f"{title}: {' '.join(filter(None, map(str.strip, lines)))}" for title, lines in pairs if lines)


def _answers(found: dict[str, Any]) -> tuple[str, ...]:
    """References in their order, none twice, none blank."""
    answers = found.get("answers")
    if answers is None:
        answers = found.get("answer")
    given: list[Any]
    match answers:
        case None:
            given = []
        case str(answer):
            given = [answer]
        case {"text": list(texts)}:
            given = texts
        case list(entries):
            given = [entry.get("text") if isinstance(entry, dict) else entry for entry in entries]
        case _:
            raise _Unusable("answers are not a list")
    if not all(isinstance(answer, str) for answer in given):
        raise _Unusable("an answer is not a text")
    if any(len(answer) > MAX_CHARACTERS for answer in given):
        raise _Unusable(f"an answer has more than {MAX_CHARACTERS:,} characters")
    return tuple(dict.fromkeys(answer for answer in given if answer.strip()))


def _choices(found: dict[str, Any]) -> tuple[tuple[str, ...], int | None]:
    """The choices and the place of the right one; none where it is no multiple-choice question."""
    if found.get("choices") is None:
        return (), None
    try:
        choices = msgspec.convert(found["choices"], tuple[str, ...])
        right = msgspec.convert(found.get("answer_index"), int)
    except msgspec.ValidationError:
        raise _Unusable("choices are not a list of texts with an answer_index") from None
    if not 2 <= len(choices) <= MAX_CHOICES or not all(text.strip() for text in choices):
        raise _Unusable(f"has {len(choices)} choices, or a blank one; 2 to {MAX_CHOICES} are taken")
    if not 0 <= right < len(choices):
        raise _Unusable(f"answer_index {right} is none of its {len(choices)} choices")
    return choices, right


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
