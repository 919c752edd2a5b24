"""An evaluation: every question under every method; what is done already is left out, what is made is kept at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from typing import Protocol

import msgspec

from edge_agent.errors import AgentError
from scripts.evaluate.errors import JobLost
from scripts.evaluate.items import Item, Skipped
from scripts.evaluate.method import method
from scripts.evaluate.records import Record, Results
from scripts.evaluate.relayed import Pair

QUEUED_PER_JOB = 2


class Embeddings(Protocol):
    """What is wanted of scripts.evaluate.embeddings.Embedder."""

    def similarity(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        """Cosines of texts, pair by pair."""


@dataclass(frozen=True)
class Work:
    """A question and the methods it is still to be asked over."""

    item: Item
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Done:
    """What came of it. unfit: why it could not be asked, "" if it could. note: what facts had to do without."""

    item: Item
    reference: str
    records: tuple[Record, ...]
    unfit: str = ""
    note: str = ""


def left(items: Sequence[Item], methods: Sequence[str], results: Results) -> list[Work]:
    """What is still to be done, in the order of the items."""
    found = []
    for item in items:
        missing = tuple(name for name in methods if not results.has(item.dataset, item.id, name, item.about))
        if missing:
            found.append(Work(item, missing))
    return found


def evaluate(
    work: Sequence[Work],
    make_pair: Callable[[], Pair],
    results: Results,
    embeddings: Embeddings,
    *,
    jobs: int,
    on_item: Callable[[Done], None],
) -> tuple[Skipped, ...]:
    """Ask everything, add records to `results`, return what could not be asked. on_item is called with each end.

    make_pair: picklable if jobs is above 1, for each job makes its own in a process of its own.
    """
    unfit = []
    for done in _in_turn(work, make_pair) if jobs == 1 else _side_by_side(work, make_pair, jobs):
        for record in _embedded(done, embeddings):
            results.add(record)
        if done.unfit:
            unfit.append(Skipped(file=done.item.dataset, place=done.item.id, reason=done.unfit))
        on_item(done)
    return tuple(unfit)


def _in_turn(work: Sequence[Work], make_pair: Callable[[], Pair]) -> Iterator[Done]:
    if work:
        pair = make_pair()
        yield from (_asked(pair, each) for each in work)


def _side_by_side(work: Sequence[Work], make_pair: Callable[[], Pair], jobs: int) -> Iterator[Done]:
    """As they end, few more handed out than there are jobs, so that an interruption is soon over."""
    todo = iter(work)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_begin, initargs=(make_pair,)) as pool:
        try:
            running: set[Future[Done]] = {pool.submit(_ask_here, each) for each in islice(todo, jobs * QUEUED_PER_JOB)}
            while running:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(_ask_here, each) for each in islice(todo, len(ended))}
                for future in ended:
                    yield future.result()
        except BrokenProcessPool:
            raise JobLost("a job ended unexpectedly, killed for want of memory perhaps; try fewer --jobs") from None
        finally:
            pool.shutdown(cancel_futures=True)


class _Job:
    """What one process of several works with."""

    pair: Pair | None = None


def _begin(make_pair: Callable[[], Pair]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupted run need not wait for the questions at hand
    _Job.pair = make_pair()


def _ask_here(work: Work) -> Done:
    if _Job.pair is None:
        raise RuntimeError("the process has not begun")
    return _asked(_Job.pair, work)


def _asked(pair: Pair, work: Work) -> Done:
    """What the model refuses ends an item, not the run; what was asked before is kept."""
    reference, records, unfit = "", list[Record](), ""
    try:
        case = pair.case(work.item)
        reference = case.reference.said
        for name in work.methods:
            records.append(pair.ask(case, method(name)))
    except AgentError as error:
        unfit = str(error)
    return Done(work.item, reference, tuple(records), unfit=unfit, note=pair.note)


def _embedded(done: Done, embeddings: Embeddings) -> list[Record]:
    """The records with the two scores that come from sentence embeddings."""
    answers = [record.answer for record in done.records]
    relevance = embeddings.similarity(answers, [done.item.question] * len(answers))
    fidelity = embeddings.similarity(answers, [done.reference] * len(answers))
    return [
        msgspec.structs.replace(
            record, relevance=relevant, fidelity=1.0 if record.answer == done.reference else faithful
        )
        for record, relevant, faithful in zip(done.records, relevance, fidelity, strict=True)
    ]
