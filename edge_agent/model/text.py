"""Text to token ids and back, and the prompt's pieces.

Every piece (prefix, context, question) is tokenized by itself and without special tokens, so that a context has the
same ids, and hence the same cache, in whatever prompt it stands.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import tokenizers

from edge_agent.errors import BundleInvalid, ContextEmpty
from edge_agent.kv.header import pack_ids
from edge_agent.model.manifest import Manifest

TOKENIZER_NAME = "tokenizer.json"


class Text:
    """The tokenizer of a bundle, with its prompt."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        path = bundle / TOKENIZER_NAME
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 tokenizers raises bare Exception
            raise BundleInvalid(f"{path} is not a tokenizer: {error}") from None
        self._tokenizer.encode_special_tokens = True  # no text, and no fact of another agent's, becomes a control token
        self._manifest = manifest

    def ids(self, text: str) -> list[int]:
        """Token ids of a piece of text, no special tokens added."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def context_ids(self, text: str) -> list[int]:
        """Ids of a context as it stands in the prompt. Raises ContextEmpty for a text without content."""
        if not text.strip():
            raise ContextEmpty("the context is empty")
        return self.ids(self._manifest.prompt.context_format.format(text=text.strip()))

    def context_text(self, ids: list[int]) -> str:
        """The text of a context's ids, as context_ids took it."""
        before, _, after = self._manifest.prompt.context_format.partition("{text}")
        return self.decode(ids).removeprefix(before).removesuffix(after)

    def facts_ids(self, facts: str) -> list[int]:
        """Ids of a summary of facts as it stands in the prompt, on one line; none for an empty one."""
        line = " ".join(facts.split())
        return self.ids(self._manifest.prompt.facts_format.format(facts=line)) if line else []

    def question_ids(self, question: str) -> list[int]:
        """Ids of a question as it stands in the prompt. Raises ContextEmpty for one without content."""
        if not question.strip():
            raise ContextEmpty("the question is empty")
        return self.ids(self._manifest.prompt.question_format.format(question=" ".join(question.split())))

    def context_id(self, ids: list[int]) -> str:
        """Digest of model, prefix and token ids: equal ids mean equal caches."""
        digest = hashlib.sha256()
        for part in (self._manifest.fingerprint, self._manifest.prefix_id):
            digest.update(part.encode())
        digest.update(pack_ids(ids, 4))
        return digest.hexdigest()[:32]


class AnswerText:
    """Turns generated ids into text piece by piece, up to the first stop string."""

    def __init__(self, text: Text, manifest: Manifest) -> None:
        self._text, self._manifest = text, manifest
        self._ids: list[int] = []
        self._said = 0
        self.finished = False

    @property
    def ids(self) -> list[int]:
        """All ids taken, without the end-of-sequence one."""
        return list(self._ids)

    @property
    def answer(self) -> str:
        """The answer so far, stripped, without an unfinished character at its end."""
        return self._until_stop()[0].rstrip("\ufffd").strip()

    def take(self, token: int) -> str:
        """Take the next id; the text that is new and certain (an unfinished character waits). Sets `finished`."""
        if token in self._manifest.eos_ids:
            self.finished = True
            return ""
        self._ids.append(token)
        text, stopped = self._until_stop()
        self.finished = stopped
        settled = text.rstrip("\ufffd")
        new, self._said = settled[self._said :], max(self._said, len(settled))
        return new

    def _until_stop(self) -> tuple[str, bool]:
        text = self._text.decode(self._ids)
        cuts = [at for stop in self._manifest.prompt.stop if (at := text.find(stop)) >= 0]
        return (text[: min(cuts)], True) if cuts else (text, False)
