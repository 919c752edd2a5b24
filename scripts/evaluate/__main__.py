"""`python -m scripts.evaluate`: what each way of compressing a context costs in answers, and saves in bytes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edge_agent.errors import AgentError
from edge_agent.kv.calibration import Calibration
from edge_agent.kv.calibration_file import find_calibration
from edge_agent.kv.payload import FORMAT_VERSION
from edge_agent.model.manifest import Manifest, read_manifest
from scripts.evaluate import report
from scripts.evaluate.embeddings import Embedder
from scripts.evaluate.errors import EvaluationError, MethodUnknown, ResultsInvalid
from scripts.evaluate.items import Item, Skipped, drawn, read_items
from scripts.evaluate.method import DEFAULT_METHODS, method
from scripts.evaluate.records import Results
from scripts.evaluate.relayed import ANSWER_POSITIONS, Pair
from scripts.evaluate.run import Done, Work, evaluate, left
from scripts.prepare_model import prepare
from scripts.prepare_model.cache import cache_root
from scripts.prepare_model.errors import PreparationError
from scripts.prepare_model.weights import DEFAULT_WEIGHTS, Weights

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

SHIPPED = Path(__file__).parent / "questions"
OUTPUT = Path("build/evaluate")
_INTERRUPTED = 130
_FOLLOWED = 60
"""Items after which a log without a terminal gets a line."""


@app.command()
def main(
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files of questions: JSON lines (id, context, question, answers), or SQuAD's or HotpotQA's own "
            "JSON. Default: the questions that come with the product.",
            show_default=False,
        ),
    ] = None,
    *,
    methods: Annotated[
        str | None,
        typer.Option(
            help="What is compared, with commas: text, none, or recipes (float32, fp16, q6, mix6-whole, "
            "fp16-l70, qkvcomm-6, ...), each with +facts or without. Default: all that the paper's table needs.",
            show_default=False,
        ),
    ] = None,
    items: Annotated[int, typer.Option(min=0, help="Questions of each file, drawn at random; 0: all.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 1,
    model: Annotated[
        str | None, typer.Option(help="As for prepare_model. Default: the default model.", show_default=False)
    ] = None,
    weights: Annotated[Weights, typer.Option(help="Precision of the weights.")] = DEFAULT_WEIGHTS,
    receiver: Annotated[
        str | None,
        typer.Option(
            help="Another model at the receiver, which takes the caches as `python -m scripts.calibrate` says.",
            show_default=False,
        ),
    ] = None,
    calibrations: Annotated[
        Path | None,
        typer.Option(help="Folder of calibrations. Default: the one scripts.calibrate writes.", show_default=False),
    ] = None,
    facts_tokens: Annotated[int, typer.Option(min=1, max=1_024, help="Tokens that facts may take.")] = 32,
    spacy_model: Annotated[
        str, typer.Option(help="spaCy model for texts full of names, by name or path; empty: never use spaCy.")
    ] = "en_core_web_sm",
    threads: Annotated[int, typer.Option(min=0, help="Of each model; 0: the cores over the jobs.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Processes side by side, each with both sessions.")] = 1,
    output: Annotated[Path, typer.Option(help="Directory of results; the same one goes on with a run.")] = OUTPUT,
) -> None:
    """Ask the real model questions whose contexts reach it through each method, and compare the answers.

    Two sessions of the model, sender and receiver, exchange every context as the bytes of a payload. Results are kept
    item by item: an interrupted run goes on when the same command is given again. Written to the output directory:
    evaluate.md, evaluate.json, rate-quality.png, results.jsonl.
    """
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        names = _methods(methods)
        found, skipped = _questions(data or sorted(SHIPPED.glob("*.jsonl")), items or None, seed)
        _evaluate(
            found,
            skipped,
            names,
            setup=_Setup(
                model=model,
                weights=weights,
                receiver=receiver,
                calibrations=calibrations,
                facts_tokens=facts_tokens,
                spacy_model=spacy_model,
                threads=threads,
                jobs=jobs,
            ),
            output=output,
            errors=errors,
        )
    except (EvaluationError, PreparationError, AgentError) as error:
        errors.print(f"evaluate: {error}", markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("evaluate: interrupted; what is done is kept, give the same command to go on")
        raise typer.Exit(_INTERRUPTED) from None


class _Setup:
    """The models, and what they are of."""

    def __init__(
        self,
        *,
        model: str | None,
        weights: Weights,
        receiver: str | None,
        calibrations: Path | None,
        facts_tokens: int,
        spacy_model: str,
        threads: int,
        jobs: int,
    ) -> None:
        self.bundle = prepare(model, weights=weights).path
        self.manifest: Manifest = read_manifest(self.bundle)
        self.receiver = prepare(receiver, weights=weights).path if receiver else None
        self.calibration = self._calibration(calibrations or cache_root() / "calibrations")
        self.jobs, self._facts_tokens, self._spacy_model = jobs, facts_tokens, spacy_model
        self._threads = threads or max(1, (os.cpu_count() or 1) // jobs)

    def make_pair(self) -> partial[Pair]:
        """A Pair's constructor with its arguments, which can be sent to another process."""
        return partial(
            Pair,
            self.bundle,
            receiver=self.receiver,
            calibration=self.calibration,
            facts_tokens=self._facts_tokens,
            spacy_model=self._spacy_model or None,
            threads=self._threads,
        )

    def run(self) -> dict[str, Any]:
        """What decides the figures, so that results of one run are never taken for another's."""
        other = None if self.receiver is None else read_manifest(self.receiver)
        return {
            "model": self.manifest.name,
            "fingerprint": self.manifest.fingerprint,
            "weights": self.manifest.weight_precision,
            "receiver": None if other is None else f"{other.name} {other.fingerprint} {other.weight_precision}",
            "calibration": None if self.calibration is None else self.calibration.kind,
            "prompt": [self.manifest.prefix_id, self.manifest.prompt.facts_format],
            "profile": None if self.manifest.profile is None else list(self.manifest.profile.error),
            "payload format": FORMAT_VERSION,
            "facts_tokens": self._facts_tokens,
            "spacy_model": self._spacy_model,
            "answer_positions": ANSWER_POSITIONS,
        }

    def _calibration(self, folder: Path) -> Calibration | None:
        if self.receiver is None:
            return None
        theirs = read_manifest(self.receiver).fingerprint
        if theirs == self.manifest.fingerprint:
            raise MethodUnknown("--receiver names the sender's own model; leave it out")
        found = find_calibration(folder, self.manifest.fingerprint, theirs)
        if found is None:
            raise ResultsInvalid(
                f"no calibration for this pair in {folder}; make it: python -m scripts.calibrate "
                f"--sender {self.bundle} --receiver {self.receiver}"
            )
        return found


def _methods(given: str | None) -> tuple[str, ...]:
    if given is None:
        return DEFAULT_METHODS
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if not names:
        raise MethodUnknown("--methods names none")
    for name in names:
        method(name)
    return names


def _questions(paths: Sequence[Path], count: int | None, seed: int) -> tuple[list[Item], list[Skipped]]:
    found: list[Item] = []
    skipped: list[Skipped] = []
    for path in paths:
        read = read_items(path)
        found += drawn(read.items, count, seed)
        skipped += read.skipped
    return found, skipped


def _evaluate(
    items: Sequence[Item],
    skipped: list[Skipped],
    names: tuple[str, ...],
    *,
    setup: _Setup,
    output: Path,
    errors: Console,
) -> None:
    for each in skipped:
        errors.print(f"skipped: {each.file}, {each.place}: {each.reason}", markup=False)
    run = setup.run()
    notes: dict[str, None] = {}
    with Results.open(output, run) as results:
        work = left(items, names, results)
        with _Shown(errors, items, work) as shown:
            embedder = Embedder(cache_root() / "downloads")

            def end(done: Done) -> None:
                notes.update({done.note: None} if done.note else {})
                shown.end(done)

            unfit = evaluate(work, setup.make_pair(), results, embedder, jobs=setup.jobs, on_item=end)
        wanted = {(item.dataset, item.id) for item in items}
        records = [record for record in results.records if (record.dataset, record.item) in wanted]
    command = ("python", "-m", "scripts.evaluate", *sys.argv[1:])
    made = report.report(
        records, command=command, run=run, methods=names, skipped=[*skipped, *unfit], notes=tuple(notes)
    )
    text = report.markdown(made, records, setup.manifest)
    written = report.write(made, text, output)
    Console(soft_wrap=True).print(Markdown(text) if sys.stdout.isatty() else text, markup=False)
    errors.print(f"written: {', '.join(map(str, written))}", markup=False)


class _Shown:
    """Progress: a bar a file on a terminal, elsewhere a line now and then."""

    def __init__(self, console: Console, items: Sequence[Item], work: Sequence[Work]) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left:"), TimeRemainingColumn(),
        )  # fmt: skip
        self._console = console
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        todo = [each.item.dataset for each in work]
        self._total, self._done = len(items), len(items) - len(work)
        self._tasks = {}
        for dataset in dict.fromkeys(item.dataset for item in items):
            total = sum(item.dataset == dataset for item in items)
            self._tasks[dataset] = self._bars.add_task(dataset, total=total, completed=total - todo.count(dataset))
        if self._done:
            console.print(f"{self._done} of {self._total} questions were done before", markup=False)

    def __enter__(self) -> _Shown:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def end(self, done: Done) -> None:
        self._done += 1
        self._bars.advance(self._tasks[done.item.dataset])
        if done.unfit:
            self._console.print(f"skipped: {done.item.dataset}, {done.item.id}: {done.unfit}", markup=False)
        if not self._console.is_terminal and (self._done % _FOLLOWED == 0 or self._done == self._total):
            self._console.print(f"… {self._done} of {self._total} questions", markup=False)


if __name__ == "__main__":
    app()
