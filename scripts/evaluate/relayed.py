"""Sender and receiver, two sessions of the real model, and one question asked over each method between them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.errors import ContextTooLong
from edge_agent.facts import Extractor, Fact, summary, within
from edge_agent.kv.cache import Cache
from edge_agent.kv.calibration import Calibration, apply
from edge_agent.kv.payload import encode
from edge_agent.kv.recipe import recipe
from edge_agent.model.exchange import to_send
from edge_agent.model.session import LiveContext, Model, Runtime
from edge_agent.model.text import Text
from scripts import relay
from scripts.evaluate.items import Item
from scripts.evaluate.method import Method
from scripts.evaluate.records import Record
from scripts.evaluate.score import completeness, exact_match, token_f1
from scripts.peers.method import Method as Codec
from scripts.peers.method import rung_method

ANSWER_POSITIONS = 20
"""Tokens of an answer at most, its end included."""
MAX_GOLD_TOKENS = 64
FP16_BYTES = 2


@dataclass(frozen=True, eq=False)
class Case:
    """A question with its context at the sender, and the receiver's uncompressed run of it.

    logprobs: of answers in the uncompressed run, as far as they were asked for; many methods give the same answer.
    """

    item: Item
    ids: list[int]
    cache: Cache
    facts: tuple[Fact, ...]
    reference: relay.Reference
    logprobs: dict[tuple[int, ...], float | None] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Given:
    """What the receiver has before facts and question, and what it took to get there."""

    live: LiveContext
    payload_bytes: int = 0
    encode_s: float = 0.0
    decode_s: float = 0.0
    context_s: float = 0.0


class Pair:
    """The two sessions. With a calibration the receiver is another model, at `receiver`."""

    def __init__(
        self,
        bundle: Path,
        *,
        receiver: Path | None = None,
        calibration: Calibration | None = None,
        facts_tokens: int,
        spacy_model: str | None,
        threads: int,
    ) -> None:
        runtime = Runtime(threads=threads)
        runtime.share_with_numpy()
        self._sender = Model(bundle, runtime)
        self._receiver = Model(receiver or bundle, runtime)
        self._sender_text = Text(bundle, self._sender.manifest)
        self._text = Text(receiver or bundle, self._receiver.manifest)
        self._calibration = calibration
        self._facts_tokens = facts_tokens
        self._extractor = Extractor(spacy_model=spacy_model)
        self._sender_prefix = relay.after_prefix(self._sender)
        self._prefix = relay.after_prefix(self._receiver)

    @property
    def note(self) -> str:
        """What the extraction of facts had to do without, if anything."""
        return self._extractor.note

    def case(self, item: Item) -> Case:
        """Prefill the context and run the receiver uncompressed.

        Raises AgentError: ContextTooLong, ContextEmpty, MemoryShort.
        """
        ids = self._text.context_ids(item.context)
        theirs = self._sender_text.context_ids(item.context)
        question = self._text.question_ids(item.question)
        self._check_fits(max(len(ids), len(theirs)), len(question))
        cache = relay.read_context(self._sender_prefix, theirs)
        own = cache if self._calibration is None else relay.read_context(self._prefix, ids)
        reference = relay.uncompressed(self._receiver, self._text, self._prefix, own, question, most=ANSWER_POSITIONS)
        facts = within(self._extractor.extract(item.context), self._facts_tokens, self._facts_length)
        return Case(item=item, ids=ids, cache=cache, facts=facts, reference=reference)

    def ask(self, case: Case, method: Method) -> Record:
        """One question over one method; relevance and fidelity, which need embeddings, are left at 0."""
        given = self._give(case, method)
        facts_ids = self._text.facts_ids(summary(case.facts)) if method.facts else []
        asked = [*facts_ids, *case.reference.question]
        start = time.perf_counter()
        last = relay.read_question(given.live, asked)
        answer, said = relay.greedy(given.live, last, self._receiver.manifest, self._text, most=ANSWER_POSITIONS - 1)
        answer_s = time.perf_counter() - start
        log_q = relay.along(given.live, last, case.reference.answer)
        item, reference = case.item, case.reference
        return Record(
            item=item.id,
            dataset=item.dataset,
            method=method.name,
            about=item.about,
            context=item.context_digest,
            answer=said,
            exact_match=exact_match(said, item.answers) if item.answers else None,
            f1=token_f1(said, item.answers) if item.answers else None,
            completeness=completeness(said, item.answers) if item.answers else None,
            relevance=0.0,
            fidelity=0.0,
            self_f1=token_f1(said, [reference.said]),
            answer_logprob=self._reference_logprob(case, answer),
            gold_logprob=self._mean_logprob(given.live, last, self._gold(item)),
            kl=float(relay.divergence(reference.log_p, log_q).mean()),
            agreement=relay.agreeing(reference.log_p, log_q) / reference.positions,
            positions=reference.positions,
            context_tokens=case.cache.entries,
            elements=case.cache.elements if method.cache else 0,
            payload_bytes=given.payload_bytes,
            fp16_bytes=FP16_BYTES * case.cache.elements,
            facts_tokens=len(facts_ids),
            encode_s=given.encode_s,
            decode_s=given.decode_s,
            context_s=given.context_s,
            answer_s=answer_s,
            choice=self._choice(item, given.live, last),
        )

    def _give(self, case: Case, method: Method) -> _Given:
        facts = case.facts if method.facts else ()
        if method.recipe is not None:
            return self._send(case, rung_method(self._sender, method.recipe, facts=facts))
        if method.peer is not None:
            return self._send(case, method.peer, facts_bytes=self._facts_bytes(facts))
        start = time.perf_counter()
        live = self._prefix.fork(room=len(case.ids))
        if not method.text:
            return _Given(live, self._facts_bytes(facts))
        live.prefill(case.ids)
        context_s = time.perf_counter() - start
        return _Given(live, self._bytes_without_entries(case.ids, facts), context_s=context_s)

    def _send(self, case: Case, codec: Codec[Any], *, facts_bytes: int = 0) -> _Given:
        """The cache, through a codec. facts_bytes: of facts that travel beside what it makes."""
        start = time.perf_counter()
        sent = codec.encode(case.cache)
        encoded = time.perf_counter()
        live = self._placed(case, codec.decode(sent))
        decode_s = time.perf_counter() - encoded
        return _Given(live, codec.nbytes(sent) + facts_bytes, encode_s=encoded - start, decode_s=decode_s)

    def _facts_bytes(self, facts: Sequence[Fact]) -> int:
        """Size of a payload that carries nothing but facts; 0 if there are none."""
        return self._bytes_without_entries([], facts) if facts else 0

    def _bytes_without_entries(self, ids: Sequence[int], facts: Sequence[Fact]) -> int:
        """Size of a payload that carries a context as token ids, or nothing but facts."""
        manifest = self._receiver.manifest
        rung = recipe("float32")
        header, nothing = to_send(manifest, "0" * 32, ids, None, own_tokens=len(ids), rung=rung, facts=facts)
        return len(b"".join(encode(header, nothing)))

    def _placed(self, case: Case, cache: Cache) -> LiveContext:
        """The receiver with the received cache behind its prefix."""
        if self._calibration is not None:
            cache = apply(cache, self._calibration)
        return relay.behind(self._prefix, cache, case.cache.entries)

    def _check_fits(self, context: int, question: int) -> None:
        manifest = self._receiver.manifest
        tokens = len(manifest.prompt.prefix_ids) + context + question + self._facts_tokens + ANSWER_POSITIONS
        if tokens > manifest.window_tokens:
            raise ContextTooLong(tokens, manifest.window_tokens)

    def _facts_length(self, line: str) -> int:
        return len(self._text.facts_ids(line))

    def _gold(self, item: Item) -> list[int]:
        """Ids of the first reference answer as it would follow `Answer:`, of a long one the first."""
        return self._text.ids(f" {item.answers[0]}")[:MAX_GOLD_TOKENS] if item.answers else []

    def _choice(self, item: Item, live: LiveContext, last: int) -> float | None:
        """Whether the right choice is the likeliest by its mean token, 0 or 1; None if the item has no choices."""
        if not item.choices:
            return None
        choices = [self._text.ids(f" {choice}")[:MAX_GOLD_TOKENS] for choice in item.choices]
        likely = [self._mean_logprob(live, last, ids) for ids in choices]
        return float(int(np.argmax([-np.inf if each is None else each for each in likely])) == item.right)

    def _reference_logprob(self, case: Case, answer: Sequence[int]) -> float | None:
        key, reference = tuple(answer), case.reference
        if key not in case.logprobs:
            case.logprobs[key] = self._mean_logprob(reference.live, reference.question[-1], answer)
        return case.logprobs[key]

    def _mean_logprob(self, live: LiveContext, last: int, answer: Sequence[int]) -> float | None:
        """Mean log-probability of a token of an answer, nats; None for an empty one."""
        if not answer:
            return None
        answer = answer[: self._receiver.manifest.window_tokens - live.next_position - 1]
        rows = relay.along(live, last, answer)[:-1]
        return float(rows[np.arange(len(answer)), list(answer)].mean())
