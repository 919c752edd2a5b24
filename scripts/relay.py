"""One relay of a context within this process: what a receiver computes behind a cache that came as a payload's bytes,
and how far that is from what it computes behind the uncompressed one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_agent.facts import Fact
from edge_agent.kv.cache import Cache, Float32
from edge_agent.kv.header import Header
from edge_agent.kv.payload import encode
from edge_agent.kv.reader import decode
from edge_agent.kv.recipe import Recipe
from edge_agent.model.exchange import expectation, to_send
from edge_agent.model.manifest import Manifest
from edge_agent.model.session import LiveContext, Model
from edge_agent.model.text import AnswerText, Text

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Reference:
    """The uncompressed run of one context and question.

    live: the receiver that has read all but the question's last token; answer: its greedy ids, without what ended it,
    and as text; log_p: its log-probabilities, float64 (answer positions, vocabulary), the position that ended the
    answer included.
    """

    cache: Cache
    live: LiveContext
    question: list[int]
    answer: list[int]
    said: str
    log_p: Float64

    @property
    def positions(self) -> int:
        return len(self.log_p)

    @property
    def room(self) -> int:
        """Tokens of question and answer."""
        return len(self.question) + len(self.answer)


def after_prefix(model: Model) -> LiveContext:
    """A live context that has read the prompt's prefix."""
    live = model.new_context()
    live.prefill(model.manifest.prompt.prefix_ids)
    return live


def read_context(prefix: LiveContext, ids: Sequence[int]) -> Cache:
    """The cache of a context behind the prefix, with its attention mass."""
    live = prefix.fork(room=len(ids))
    live.prefill(ids, queries=True)
    return live.extract(prefix.next_position, live.next_position, mass=True)


def behind(prefix: LiveContext, cache: Cache, tokens: int, *, room: int = 0) -> LiveContext:
    """A receiver that has put the cache of a context of so many tokens behind the prefix, with room for more."""
    live = prefix.fork(room=tokens + room)
    live.append(cache, tokens=tokens)
    return live


def uncompressed(
    model: Model, text: Text, prefix: LiveContext, cache: Cache, question: list[int], *, most: int
) -> Reference:
    """The run that every compressed one is compared with: question and greedy answer, at most so many positions."""
    live = behind(prefix, cache, cache.entries, room=len(question) + most)
    last = read_question(live, question)
    answer, said = greedy(live, last, model.manifest, text, most=most - 1)
    log_p = along(live, last, answer)  # in one run, as all others read it: runs of one token round differently
    return Reference(cache=cache, live=live, question=question, answer=answer, said=said, log_p=log_p)


def read_question(live: LiveContext, question: Sequence[int]) -> int:
    """Read all of a question but its last token, which is returned: every way to go on begins with it."""
    if len(question) > 1:
        live.prefill(question[:-1])
    return question[-1]


def greedy(live: LiveContext, last: int, manifest: Manifest, text: Text, *, most: int) -> tuple[list[int], str]:
    """The answer that follows the last token of a question, as ids (without what ended it) and as text.

    Nothing of it stays in `live`.
    """
    start = live.next_position
    said, ids = AnswerText(text, manifest), list[int]()
    token = last
    while len(ids) < most:
        token = int(np.argmax(live.step(np.array([token], dtype=np.int32), logits="last")))
        said.take(token)
        if said.finished:
            break
        ids.append(token)
    live.rewind(start)
    return ids, said.answer


def along(live: LiveContext, last: int, answer: Sequence[int]) -> Float64:
    """Log-probabilities from a question's last token to the end of a given answer, float64 (answer + 1, vocabulary).

    Nothing of it stays in `live`.
    """
    start = live.next_position
    log_p = log_softmax(live.prefill([last, *answer], all_logits=True))
    live.rewind(start)
    return log_p


def along_behind(prefix: LiveContext, cache: Cache, reference: Reference) -> Float64:
    """Log-probabilities along a reference's answer, like its own, of a receiver that has `cache` for its context."""
    live = behind(prefix, cache, reference.cache.entries, room=reference.room)
    return along(live, read_question(live, reference.question), reference.answer)


def sent(model: Model, cache: Cache, rung: Recipe, *, facts: Sequence[Fact] = ()) -> bytes:
    """The payload of a whole cache."""
    ids = [0] * cache.entries  # any take as many bytes, and a receiver of the whole cache needs none
    header, entries = to_send(model.manifest, "0" * 32, ids, cache, own_tokens=0, rung=rung, facts=facts)
    return b"".join(encode(header, entries, model.transform))


def received(model: Model, payload: bytes) -> tuple[Header, Cache]:
    """What a receiver with the same model makes of a payload that carries entries."""
    header, cache = decode(payload, expectation(model.manifest, 1 << 40, model.transform))
    if cache is None:
        raise ValueError("the payload carries no entries")
    return header, cache


def divergence(log_p: Float64, log_q: Float64) -> Float64:
    """KL(p || q) in nats at each position, float64 (positions,), of log-probabilities (positions, vocabulary).

    Never below zero: rounding of equal distributions is cut off.
    """
    found: Float64 = np.maximum(0.0, (np.exp(log_p) * (log_p - log_q)).sum(-1))
    return found


def agreeing(log_p: Float64, log_q: Float64) -> int:
    """Positions at which both have the same argmax."""
    return int((log_p.argmax(-1) == log_q.argmax(-1)).sum())


def log_softmax(logits: Float32) -> Float64:
    """Log-probabilities, float64, of logits (positions, vocabulary)."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    normal: Float64 = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normal
