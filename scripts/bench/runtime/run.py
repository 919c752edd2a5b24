"""All variants in turn: A B C, A B C, …, each in a process of its own, only one of them computing at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from msgspec import Struct, structs

from scripts.bench.runtime.child import Child, WorkerEnded, WorkerFailed
from scripts.bench.runtime.measured import LOAD, MASS, PEAK, Absent, Row, RuntimeBench

PREFILLS = (128, 512, 2048)
PAST, STEPS = 512, 16
DECODE, PREFILL = f"decode after {PAST}", f"prefill {PAST}"
FRESH_ROUNDS = 3
"""Loads and peaks vary little, and each takes a new process."""


class Variant(Struct, frozen=True, kw_only=True):
    """One way to run the model. engine: a key of `engines.ENGINES`; path: a file or directory that it loads.

    weights: the file that counts, with all that lies beside it under the same name and a further ending.
    """

    name: str
    engine: str
    path: Path
    weights: Path
    python: str

    @property
    def file_mb(self) -> float:
        """Size of the graph and its weights, in MB."""
        return sum(part.stat().st_size for part in self.weights.parent.glob(f"{self.weights.name}*")) / 1e6


class Job(Struct, frozen=True, kw_only=True):
    """A command of a worker whose seconds become tokens/s. engines: those that can do it, all of them if None."""

    name: str
    do: str
    terms: dict[str, int]
    tokens: int
    engines: frozenset[str] | None = None


Hear = Callable[[str], None]
"""Is told what comes next, once for each command that is counted by `steps`."""


def jobs(window_tokens: int) -> list[Job]:
    """Prefills that fit the window, each in an empty context, and decoding; in the order they are run."""
    found = [
        Job(name=f"prefill {tokens}", do="prefill", terms={"tokens": tokens}, tokens=tokens)
        for tokens in PREFILLS
        if tokens <= window_tokens
    ]
    decode = Job(name=DECODE, do="decode", terms={"past": PAST, "tokens": STEPS}, tokens=1)
    at = next((index for index, job in enumerate(found) if job.tokens == PAST), None)
    if at is not None and window_tokens >= PAST + STEPS:
        found.insert(at + 1, decode)  # right after the prefill whose cache it goes on from
    if at is not None:
        mass = Job(name=MASS, do="mass", terms={"tokens": PAST}, tokens=PAST, engines=frozenset({"ours"}))
        found.insert(at, mass)  # beside the prefill that it is compared with
    return found


def room(window_tokens: int) -> int:
    """Tokens that a context must hold."""
    return min(max(*PREFILLS, PAST) + STEPS, window_tokens)


def steps(variants: Sequence[Variant], window_tokens: int, repeats: int) -> int:
    """How often `hear` is called at most."""
    return len(variants) * (1 + len(jobs(window_tokens)) * (repeats + 1) + min(repeats, FRESH_ROUNDS))


def measure(
    variants: Sequence[Variant],
    ids: Sequence[int],
    *,
    model: str,
    window_tokens: int,
    threads: int,
    repeats: int,
    hear: Hear = lambda _: None,
) -> RuntimeBench:
    """Figures of all variants that run, and why the others don't. ids: at least room(window_tokens) of them."""
    bench = _Run(variants, jobs(window_tokens), hear)
    terms: dict[str, Any] = {"threads": threads, "room": room(window_tokens), "ids": list(ids)}
    with ExitStack() as stack:
        children = bench.load_all(stack, terms)
        for counted in [False] + [True] * repeats:
            bench.round(children, counted=counted)
    if any(job.name == DECODE for job in bench.jobs):
        for _ in range(min(repeats, FRESH_ROUNDS)):
            bench.fresh_round(terms | {"room": PAST + STEPS})
    return bench.found(model, threads)


class _Run:
    """The figures as they come in. A job that fails is not asked of that variant again."""

    def __init__(self, variants: Sequence[Variant], wanted: Sequence[Job], hear: Hear) -> None:
        self.jobs, self._hear = wanted, hear
        self._variants = list(variants)
        self._figures: dict[str, dict[str, list[float]]] = {variant.name: {} for variant in variants}
        self._versions: dict[str, str] = {}
        self._absent: list[Absent] = []
        self._broken: set[tuple[str, str]] = set()

    def load_all(self, stack: ExitStack, terms: dict[str, Any]) -> dict[str, Child]:
        """A loaded child for each variant that can be loaded; the others are absent from now on."""
        children = {}
        for variant in self._variants:
            self._hear(f"{variant.name}: load")
            try:
                child = stack.enter_context(Child(variant.python))
                answer = child.answer("load", engine=variant.engine, path=str(variant.path), **terms)
            except WorkerFailed as error:
                self._remove(variant.name, str(error))
            else:
                children[variant.name] = child
                self._versions[variant.name] = answer["version"]
        return children

    def round(self, children: dict[str, Child], *, counted: bool) -> None:
        """Every job of every variant once, job by job."""
        engines = {variant.name: variant.engine for variant in self._variants}
        for job in self.jobs:
            for name, child in list(children.items()):
                if job.engines is not None and engines[name] not in job.engines:
                    continue
                self._hear(f"{name}: {job.name}")
                if (name, job.name) in self._broken:
                    continue
                try:
                    seconds = child.ask(job.do, **job.terms)
                except WorkerEnded as error:
                    del children[name]
                    self._remove(name, f"{job.name}: {error}")
                except WorkerFailed as error:
                    self._drop(name, job.name, error)
                else:
                    if counted:
                        self._note(name, job.name, job.tokens / seconds)

    def fresh_round(self, terms: dict[str, Any]) -> None:
        """Load and peak memory of each variant in a new process: load, a prefill, some decoding."""
        for variant in self._variants:
            self._hear(f"{variant.name}: load and peak memory")
            if (variant.name, PEAK) in self._broken:
                continue
            try:
                with Child(variant.python) as child:
                    loaded = child.ask("load", engine=variant.engine, path=str(variant.path), **terms)
                    child.ask("prefill", tokens=PAST)
                    child.ask("decode", past=PAST, tokens=STEPS)
                    peak = child.ask("memory")
            except WorkerFailed as error:
                self._drop(variant.name, PEAK, error)
                self._figures[variant.name].pop(LOAD, None)
            else:
                self._note(variant.name, LOAD, loaded)
                self._note(variant.name, PEAK, peak / 1e6)

    def found(self, model: str, threads: int) -> RuntimeBench:
        """All of it."""
        return RuntimeBench(
            model=model,
            threads=threads,
            jobs=_columns(self.jobs),
            rows=tuple(
                Row(
                    name=variant.name,
                    version=self._versions[variant.name],
                    file_mb=variant.file_mb,
                    figures={job: tuple(figures) for job, figures in self._figures[variant.name].items()},
                )
                for variant in self._variants
                if self._figures[variant.name]
            ),
            absent=tuple(self._absent),
        )

    def _note(self, name: str, job: str, figure: float) -> None:
        self._figures[name].setdefault(job, []).append(figure)

    def _remove(self, name: str, reason: str) -> None:
        """The variant is left out altogether."""
        self._variants = [variant for variant in self._variants if variant.name != name]
        self._absent.append(Absent(name=name, reason=reason))

    def _drop(self, name: str, job: str, error: WorkerFailed) -> None:
        self._broken.add((name, job))
        self._figures[name].pop(job, None)
        self._absent.append(Absent(name=f"{name}, {job}", reason=str(error)))


def _columns(jobs: Sequence[Job]) -> tuple[str, ...]:
    """Prefills before decoding, whatever the order they are run in."""
    shared = (job.name for job in jobs if job.engines is None)
    return (LOAD, *sorted(shared, key=lambda name: name == DECODE), PEAK)


def with_absent(found: RuntimeBench, absent: Sequence[Absent]) -> RuntimeBench:
    """The same, with variants that were not even tried."""
    return structs.replace(found, absent=(*absent, *found.absent))
