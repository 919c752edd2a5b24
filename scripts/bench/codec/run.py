"""The run: a context is read, every method's loss is measured behind it, then all are timed in turn."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edge_agent.kv.cache import Cache
from edge_agent.kv.recipe import recipe
from edge_agent.model.session import LiveContext, Model, Runtime
from edge_agent.model.text import Text
from scripts import relay
from scripts.bench.codec.measured import CodecBench, CodecRow, Loss, StageRow
from scripts.bench.codec.peers import Peers
from scripts.bench.codec.stages import stages_of
from scripts.bench.measure import Timed, in_turn
from scripts.peers.method import Method, rung_method
from scripts.prepare_model.answered import MAX_ANSWER_POSITIONS, QUESTIONS

TOKENS = 512
RUNGS = tuple(
    recipe(name)
    for name in ("float32", "fp16", "q8", "q4", "qkvcomm-6", "klt0", "klt2", "klt4", "klt5", "klt6", "klt8")
)
STAGED = tuple(recipe(name) for name in ("q8", "q4", "klt2", "klt4", "klt6", "klt8"))
"""Rungs that are timed by stage; all of RUNGS."""
ASKED = (
    *QUESTIONS,
    "Summarize the passage.",
    "List the main points.",
    "What should be done, and how often?",
    "Which problems are mentioned, and what is the remedy?",
    "Explain this to a beginner.",
)
"""The last ones because their answers are longer."""
PREFILL, ENCODE, DECODE = "prefill", "encode", "decode"


@dataclass(frozen=True, eq=False)
class Subject:
    """A context of real text as a model has read it behind the prompt's prefix, and answers from it."""

    model: Model
    threads: int
    prefix: LiveContext
    ids: Sequence[int]
    references: tuple[relay.Reference, ...]

    @property
    def cache(self) -> Cache:
        return self.references[0].cache


def read(bundle: Path, texts: Sequence[str], *, threads: int) -> Subject:
    """TOKENS tokens of the texts, read, and the greedy answers to ASKED from the uncompressed cache."""
    runtime = Runtime(threads=threads)
    runtime.share_with_numpy()
    model = Model(bundle, runtime)
    text = Text(bundle, model.manifest)
    ids = text.ids(" ".join(texts))[:TOKENS]
    prefix = relay.after_prefix(model)
    cache = relay.read_context(prefix, ids)
    references = tuple(
        relay.uncompressed(model, text, prefix, cache, text.question_ids(question), most=MAX_ANSWER_POSITIONS)
        for question in ASKED
    )
    return Subject(model, threads, prefix, ids, references)


def steps(found: Peers, repeats: int) -> int:
    """How often codec_bench will be heard."""
    methods = len(RUNGS) + len(found.methods)
    return methods + (1 + 2 * methods + 4 * len(STAGED)) * (repeats + 1)


def codec_bench(subject: Subject, found: Peers, *, repeats: int, hear: Callable[[str], None]) -> CodecBench:
    """Bits, loss and seconds of each of RUNGS and each peer. hear is called as each piece of work begins."""
    cache = subject.cache
    methods: list[Method[Any]] = [*(rung_method(subject.model, rung) for rung in RUNGS), *found.methods]
    bits, losses = dict[str, float](), dict[str, Loss]()
    work: dict[str, Callable[[], object]] = {PREFILL: lambda: subject.prefix.fork().prefill(subject.ids)}
    for method in methods:
        hear(f"{method.name}: loss")
        sent = method.encode(cache)
        bits[method.name] = 8 * method.nbytes(sent) / cache.elements
        losses[method.name] = loss(subject, method.decode(sent))
        work[f"{ENCODE} {method.name}"] = partial(method.encode, cache)
        work[f"{DECODE} {method.name}"] = partial(method.decode, sent)
    for rung in STAGED:
        for stage, run in stages_of(rung, cache, subject.model.transform).named().items():
            work[f"{stage} {rung.name}"] = run
    timed = in_turn(work, repeats, hear)
    return CodecBench(
        tokens=len(subject.ids),
        threads=subject.threads,
        cache_mb=4 * cache.elements / 1e6,
        questions=len(subject.references),
        answer_positions=sum(reference.positions for reference in subject.references),
        prefill=timed[PREFILL],
        rows=tuple(_row(method.name, bits[method.name], losses[method.name], timed) for method in methods),
        stages=tuple(_stage_row(rung.name, timed) for rung in STAGED),
        absent=found.absent,
        versions=_versions(methods),
    )


def loss(subject: Subject, back: Cache) -> Loss:
    """What a receiver loses that has put `back` in the place of the subject's cache, over all answers."""
    kl, agreeing, positions = 0.0, 0, 0
    for reference in subject.references:
        log_q = relay.along_behind(subject.prefix, back, reference)
        kl += float(relay.divergence(reference.log_p, log_q).sum())
        agreeing += relay.agreeing(reference.log_p, log_q)
        positions += reference.positions
    return Loss(kl=kl / positions, agreement=agreeing / positions)


def _row(name: str, bits: float, lost: Loss, timed: Mapping[str, Timed]) -> CodecRow:
    encode, decode = timed[f"{ENCODE} {name}"], timed[f"{DECODE} {name}"]
    return CodecRow(
        name=name,
        bits_per_element=bits,
        loss=lost,
        encode=encode,
        decode=decode,
        share_of_prefill=(encode.median_s + decode.median_s) / timed[PREFILL].median_s,
    )


def _stage_row(name: str, timed: Mapping[str, Timed]) -> StageRow:
    return StageRow(name=name, **{stage: timed[f"{stage} {name}"] for stage in StageRow.__struct_fields__[1:]})


def _versions(methods: Sequence[Method[Any]]) -> dict[str, str]:
    packages = dict.fromkeys(package for method in methods for package in method.packages)
    return {package: importlib.metadata.version(package) for package in packages}
