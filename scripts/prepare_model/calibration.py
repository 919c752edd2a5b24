"""The passages a ladder is measured on: a folder of text, or the product's own and what the model says itself."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from msgspec import Struct

from scripts.prepare_model.errors import PreparationError

SHIPPED = Path(__file__).parent / "texts"
SUFFIXES = frozenset({".txt", ".md"})
MAX_PASSAGES = 32
MIN_WORDS, MAX_WORDS = 40, 180
SAMPLES, SAMPLE_TOKENS, SEED = 8, 150, 20_261
SAMPLING = f"{SAMPLES} x {SAMPLE_TOKENS}, seed {SEED}"
"""How texts are drawn from a model when it is exported."""


class Texts(Struct, frozen=True, kw_only=True):
    """Calibration texts. samples: how many of those drawn from the model itself are used. origin: for the manifest."""

    passages: tuple[str, ...]
    samples: int
    origin: str

    @property
    def digest(self) -> str:
        """Of the content and of how the samples are drawn, for a bundle's key."""
        return hashlib.sha256("\0".join((*self.passages, SAMPLING, str(self.samples))).encode()).hexdigest()


def read_texts(folder: Path | None) -> Texts:
    """Passages of the folder's .txt and .md files (and of its folders'), or the shipped ones and samples to be drawn.

    Raises PreparationError for a folder that is missing or holds too little text.
    """
    if folder is not None and not folder.is_dir():
        raise PreparationError(f"--texts {folder}: no such folder")
    where = folder or SHIPPED
    files = sorted(path for path in where.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    try:
        passages = [passage for path in files for passage in split(path.read_text(encoding="utf-8"))]
    except UnicodeDecodeError as error:
        raise PreparationError(f"--texts {where}: a file is not UTF-8 text ({error.reason})") from None
    if not passages:
        raise PreparationError(f"--texts {where}: no passage of {MIN_WORDS} words or more in its .txt and .md files")
    chosen = _spread(passages, MAX_PASSAGES)
    if folder is None:
        return Texts(passages=chosen, samples=SAMPLES, origin=f"{len(chosen)} shipped passages")
    return Texts(passages=chosen, samples=0, origin=f"{len(chosen)} passages of a given folder")


def split(text: str) -> list[str]:
    """Passages of MIN_WORDS to MAX_WORDS words: whole paragraphs as far as they fit, headings and rules left out."""
    passages: list[str] = []
    words: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if not re.match(r"\s*(#|---|===)", line)]
        sentences = re.split(r"(?<=[.!?])\s+", " ".join(" ".join(lines).split()))
        for sentence in sentences:
            more = sentence.split()[:MAX_WORDS]
            if words and len(words) + len(more) > MAX_WORDS:
                passages.append(" ".join(words))
                words = []
            words += more
        if len(words) >= MIN_WORDS * 2:
            passages.append(" ".join(words))
            words = []
    if words:
        passages.append(" ".join(words))
    return [passage for passage in passages if len(passage.split()) >= MIN_WORDS]


def _spread(passages: list[str], most: int) -> tuple[str, ...]:
    """At most `most` of them, evenly spread over the whole."""
    if len(passages) <= most:
        return tuple(passages)
    return tuple(passages[index * len(passages) // most] for index in range(most))
