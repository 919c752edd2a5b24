"""What each rung costs in bits and in loss, measured on calibration passages with the bundle's own graph.

For every passage: its cache after the prompt's prefix, a question, and the greedy answer of the uncompressed run. Then
every rung reads the same question and the same answer behind its own copy of the cache, as a receiver would: through
the payload's bytes. Loss is KL(uncompressed || rung) in nats, agreement the share of equal argmaxes, both over the
positions of the answers (the one that ends an answer included).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from broker_config.messages import Rung
from edge_agent.kv.cache import Cache, Float32
from edge_agent.kv.payload import encode
from edge_agent.kv.reader import decode
from edge_agent.kv.recipe import FIRST_LADDER, Recipe
from edge_agent.model.exchange import expectation, payload_header
from edge_agent.model.session import LiveContext, Model, Runtime
from edge_agent.model.text import Text

QUESTIONS = (
    "What is this passage about?",
    "What happened?",
    "Which number is given?",
    "Who or what is named first?",
    "When or where was this?",
    "Why?",
)
MAX_PASSAGE_TOKENS = 256
MAX_ANSWER_TOKENS = 16
# Share of the window that a calibration passage may take, for models with a small one.
_WINDOW_SHARE = 0.5


class Measured(Struct, frozen=True, kw_only=True):
    """The ladder and what it rests on."""

    rungs: tuple[Rung, ...]
    passages: int
    tokens: int
    answer_positions: int


class _Sum(Struct, kw_only=True):
    payload_bits: int = 0
    elements: int = 0
    kl: float = 0.0
    agreeing: int = 0
    positions: int = 0


class _Reference(Struct, frozen=True, kw_only=True):
    """The uncompressed run of one passage. logits: (answer positions, vocabulary)."""

    cache: Cache
    question: list[int]
    answer: list[int]
    logits: Float32


def measure(
    bundle: Path,
    passages: Sequence[str],
    on_passage: Callable[[int], None],
    *,
    recipes: Sequence[Recipe] = FIRST_LADDER,
    threads: int = 0,
) -> Measured:
    """The rungs of `recipes` on the passages, in the given order (lossless first).

    on_passage is called with the number of passages done. threads: 0 is one per core.
    """
    model = Model(bundle, Runtime(threads=threads or os.cpu_count() or 1))
    text = Text(bundle, model.manifest)
    prefix = model.new_context()
    prefix.prefill(model.manifest.prompt.prefix_ids)
    sums = {recipe.name: _Sum() for recipe in recipes}
    tokens = 0
    for index, passage in enumerate(passages):
        reference = _reference(model, text, prefix, passage, QUESTIONS[index % len(QUESTIONS)])
        tokens += reference.cache.entries
        for recipe in recipes:
            _add(sums[recipe.name], model, prefix, reference, recipe)
        on_passage(index + 1)
    return Measured(
        rungs=tuple(_rung(name, total) for name, total in sums.items()),
        passages=len(passages),
        tokens=tokens,
        answer_positions=max(total.positions for total in sums.values()),
    )


def _reference(model: Model, text: Text, prefix: LiveContext, passage: str, question: str) -> _Reference:
    room = int(model.manifest.window_tokens * _WINDOW_SHARE) - prefix.entries
    ids = _fitting(text, passage, max(8, min(MAX_PASSAGE_TOKENS, room)))
    live = prefix.fork()
    live.prefill(ids)
    cache = live.extract(prefix.next_position, live.next_position)
    asked = text.question_ids(question)
    rows, answer = [live.prefill(asked)], list[int]()
    while len(rows) < MAX_ANSWER_TOKENS:
        token = int(np.argmax(rows[-1]))
        if token in model.manifest.eos_ids or any(stop in text.decode([token]) for stop in model.manifest.prompt.stop):
            break
        answer.append(token)
        rows.append(live.prefill([token]))
    again = prefix.fork()  # in one run, as the rungs read it: runs of one token round differently
    again.append(cache)
    logits = again.prefill([*asked, *answer], all_logits=True)[len(asked) - 1 :]
    return _Reference(cache=cache, question=asked, answer=answer, logits=logits)


def _fitting(text: Text, passage: str, most: int) -> list[int]:
    """Ids of a passage as a context, whole sentences (or else words) of it, at most so many."""
    ids = text.context_ids(passage)
    while len(ids) > most and len(words := passage.split()) > 1:
        passage = " ".join(words[: min(len(words) - 1, len(words) * most // len(ids))])
        ids = text.context_ids(passage)
    return ids[:most]


def _add(total: _Sum, model: Model, prefix: LiveContext, reference: _Reference, recipe: Recipe) -> None:
    ids = [0] * reference.cache.entries  # only their number is on a payload that carries entries for all
    header = payload_header(model.manifest, "0" * 32, ids, own_tokens=0, rung=recipe)
    payload = b"".join(encode(header, reference.cache, recipe))
    received = decode(payload, expectation(model.manifest, reference.cache.nbytes))[1]
    live = prefix.fork()
    if received is not None:
        live.append(received)
    logits = live.prefill([*reference.question, *reference.answer], all_logits=True)[len(reference.question) - 1 :]
    total.payload_bits += 8 * len(payload)
    total.elements += reference.cache.elements
    total.kl += float(divergence(reference.logits, logits).sum())
    total.agreeing += int((reference.logits.argmax(-1) == logits.argmax(-1)).sum())
    total.positions += len(logits)


def divergence(reference: Float32, other: Float32) -> NDArray[np.float64]:
    """KL(reference || other) in nats at each position. logits: float32 (positions, vocabulary); float64 (positions,).

    Never below zero: rounding of equal distributions is cut off.
    """
    log_p, log_q = log_softmax(reference), log_softmax(other)
    found: NDArray[np.float64] = np.maximum(0.0, (np.exp(log_p) * (log_p - log_q)).sum(-1))
    return found


def log_softmax(logits: Float32) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    normal: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normal


def _rung(name: str, total: _Sum) -> Rung:
    return Rung(
        name=name,
        bits_per_element=round(total.payload_bits / total.elements, 4),
        kl=round(total.kl / total.positions, 9),
        agreement=round(total.agreeing / total.positions, 6),
    )
