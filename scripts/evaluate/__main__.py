"""`python -m scripts.evaluate`: what each way of compressing a context costs in answers, and saves in bytes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from edge_agent.errors import AgentError
from scripts.evaluate import report
from scripts.evaluate.embeddings import Embedder
from scripts.evaluate.errors import DataInvalid, EvaluationError
from scripts.evaluate.items import Item, Skipped, drawn, read_items
from scripts.evaluate.method import named
from scripts.evaluate.records import Results
from scripts.evaluate.run import Done, Work, evaluate, left
from scripts.evaluate.setup import Setup, Wanted, require_packages
from scripts.prepare_model.cache import cache_root
from scripts.prepare_model.errors import PreparationError
from scripts.prepare_model.progress import Progress
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
        str,
        typer.Option(
            help="What is compared, with commas: text, none, others' groups (group-4, group-2, kivi-2), "
            "or recipes (float32, fp16, q6, mix6-whole, fp16-l70, "
            "fp16-k70, qkvcomm-6, ...), each with +facts or without; `table` stands for those of the paper's table, "
            "their baselines and ours, `parts` for the steps of the paper's pipeline one by one, `codec` for the "
            "transform at every level, `eviction` for budgets of 5 to 50 % with and without backfill."
        ),
    ] = "table",
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
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all that is printed to FILE, too.", show_default=False),
    ] = None,
) -> None:
    """Ask the real model questions whose contexts reach it through each method, and compare the answers.

    Two sessions of the model, sender and receiver, exchange every context as the bytes of a payload. Results are kept
    item by item: an interrupted run goes on when the same command is given again. Written to the output directory:
    evaluate.md, evaluate.json, rate-quality.png, damage-recovery.png where methods backfill, results.jsonl, and
    run.json, which says what they are of.
    """
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        names = named(methods)
        found, skipped = _questions(data or sorted(SHIPPED.glob("*.jsonl")), items or None, seed)
        _evaluate(
            found,
            skipped,
            names,
            wanted=Wanted(
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
            json_file=json_file,
            errors=errors,
        )
    except (EvaluationError, PreparationError, AgentError) as error:
        errors.print(f"evaluate: {error}", markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("evaluate: interrupted; what is done is kept, give the same command to go on")
        raise typer.Exit(_INTERRUPTED) from None


def _questions(paths: Sequence[Path], count: int | None, seed: int) -> tuple[list[Item], list[Skipped]]:
    found: list[Item] = []
    skipped: list[Skipped] = []
    stems = [path.stem for path in paths]
    for stem in stems:
        if stems.count(stem) > 1:
            raise DataInvalid(f"two files are called {stem}: results are kept by that name; rename one")
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
    wanted: Wanted,
    output: Path,
    json_file: Path | None,
    errors: Console,
) -> None:
    require_packages()
    for each in skipped:
        errors.print(f"skipped: {each.file}, {each.place}: {each.reason}", markup=False)
    setup = Setup(wanted, _Stages(errors))
    run = setup.run()
    notes: dict[str, None] = {}
    with Results.open(output, run) as results:
        work = left(items, names, results)
        with _Shown(errors, items, work) as shown:
            embedder = Embedder(cache_root() / "downloads")
            if work:
                embedder.vectors(["is the model there?"])  # before hours of work that it must follow

            def end(done: Done) -> None:
                notes.update({done.note: None} if done.note else {})
                shown.end(done)

            unfit = evaluate(work, setup.make_pair(), results, embedder, jobs=setup.jobs, on_item=end)
        drawn_now = {(item.dataset, item.id) for item in items}
        records = [
            record
            for record in results.records
            if (record.dataset, record.item) in drawn_now and record.method in names
        ]
    made = report.report(
        records,
        command=("python", "-m", "scripts.evaluate", *sys.argv[1:]),
        run=run,
        methods=names,
        skipped=[*skipped, *unfit],
        notes=tuple(notes),
    )
    text = report.markdown(made, records)
    written = report.write(made, text, output, also=json_file)
    if sys.stdout.isatty():
        Console().print(Markdown(text))
    else:
        typer.echo(text, nl=False)
    errors.print(f"written: {', '.join(map(str, written))}", markup=False)


class _Stages(Progress):
    """What prepares a model, a line a stage; nothing where it is found at once."""

    def __init__(self, console: Console) -> None:
        self._console, self._waiting = console, ""

    def stage(self, title: str) -> None:
        if self._waiting:
            self._console.print(f"… {title}", markup=False)
        self._waiting = title

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)


class _Shown:
    """Progress: a bar a file on a terminal, elsewhere a line now and then."""

    def __init__(self, console: Console, items: Sequence[Item], work: Sequence[Work]) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left:"), TimeRemainingColumn(),
        )  # fmt: skip
        self._console = console
        self._bars = Bars(*columns, console=console, disable=not console.is_terminal)
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
