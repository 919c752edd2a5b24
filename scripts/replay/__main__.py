"""`python -m scripts.replay`: traces and recorded sessions, again."""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import msgspec
import structlog
import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from broker_config.errors import BusError
from coordinator.errors import CoordinatorError
from coordinator.recording import SUFFIX, Recorded
from edge_agent.errors import AgentError
from scripts.bench.runtime.shown import Steps
from scripts.demo.processes import DemoFailed
from scripts.link.errors import LinkError
from scripts.prepare_model import default_bundle
from scripts.provenance import machine, versions
from scripts.replay import shipped
from scripts.replay.again import plans_again
from scripts.replay.errors import ReplayError, SettingInvalid
from scripts.replay.live import Broker, LiveTerms, measured
from scripts.replay.live import live as lived
from scripts.replay.policies import policy_named
from scripts.replay.results import Result, read_results, write_results
from scripts.replay.session import session_results
from scripts.replay.setting import read_setting
from scripts.replay.sweep import OWN_DEVICES, Sweep, sweep
from scripts.replay.tables import errors_of, tables_of
from scripts.replay.virtual.run import Terms
from scripts.replay.virtual.run import run as run_virtually
from scripts.traces import Trace, TraceError
from scripts.traces.anything import read_any

OUTPUT = Path("build/replay")
RESULTS = "results.jsonl"
MOST_TIMELINES = 64
"""Runs of which what agents told is kept second by second, if it isn't asked for: a tenth of a megabyte each."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)
console = Console(highlight=False, soft_wrap=True)
progress = Console(stderr=True, highlight=False)


@app.callback()
def replay() -> None:
    """Replay traces and recorded sessions (docs/replay.md)."""


@app.command()
def run(  # noqa: PLR0917  a command's options
    sites: Annotated[
        list[Path] | None, typer.Argument(help="Sites (TOML); the shipped one with four agents if none is named.")
    ] = None,
    trace: Annotated[
        list[str] | None,
        typer.Option(help="A link trace: CSV, mahimahi, or session.mcap:AGENT. Repeat for more; none: made ones."),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="A policy by name, or one of your own as module:name. Repeat for more.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="Give all agents this device: pi-4, pi-5, orin-nano, x86. Repeat for more."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind, each drawn by another seed.")] = 1,
    jobs: Annotated[int, typer.Option(help="Processes; -1: one a core.")] = -1,
    timelines: Annotated[
        bool | None, typer.Option(help="Keep what agents tell second by second; by itself up to 64 runs.")
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Record each session to a file in this directory.")] = None,
    output: Annotated[Path, typer.Option(help="Directory for results and tables.")] = OUTPUT,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all of it to this file.")] = None,
) -> None:
    """Replay traces in virtual time: every trace with every policy, hours of it in seconds."""
    try:
        places = [read_setting(path) for path in sites or [shipped.SITE_FILE]]
        terms = Sweep(
            places=places,
            traces=_traces(trace) if trace else shipped.traces(),
            policies=tuple(policy or shipped.POLICIES),
            devices=tuple(device or [OWN_DEVICES]),
            seeds=tuple(range(seeds)),
            timelines=True,
            record=record,
        )
        terms = replace(terms, timelines=terms.count <= MOST_TIMELINES if timelines is None else timelines)
        _ready(output, record, json_file)
        results = _swept(terms, jobs)
        _write(results, output, json_file)
    except (ReplayError, CoordinatorError, TraceError) as error:
        typer.echo(f"replay: {error}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(f"replay: {error.filename or output} can't be written: {error.strerror or error}", err=True)
        raise typer.Exit(1) from None
    if any(result.error for result in results):
        raise typer.Exit(1)


def _traces(sources: list[str]) -> list[tuple[str, Trace | None]]:
    """By name. Raises TraceError."""
    found: list[tuple[str, Trace | None]] = []
    for source in sources:
        name, trace, cut = read_any(source)
        if cut:
            progress.print(f"{source}: {cut}; replayed up to there", markup=False)
        found.append((name, trace))
    return found


def _ready(output: Path, record: Path | None, json_file: Path | None) -> None:
    """Finds out before the work whether its result can be written. Raises OSError, SettingInvalid."""
    for folder in (output, record):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise SettingInvalid(f"--json: there is no directory {json_file.absolute().parent}")


def _swept(terms: Sweep, jobs: int) -> list[Result]:
    results = []
    with Steps(progress) as steps:
        steps.expect(terms.count)
        for result in sweep(terms, jobs):
            steps.next(f"{result.trace or result.site} {result.device} {result.policy}")
            results.append(result)
    return results


def _write(results: list[Result], output: Path, json_file: Path | None) -> None:
    """Results and tables; the last table, which is long, only to the file. Raises OSError."""
    command = _command()
    tables = ["\n".join(table.markdown()) for table in tables_of(results)]
    text = "\n".join([f"`{command}`\n", *tables, *errors_of(results)]) + "\n"
    write_results(output / RESULTS, results)
    (output / "replay.md").write_text(text, encoding="utf-8")
    if json_file is not None:
        record = {"command": command, "machine": machine(), "versions": versions(("kvbus", "numpy")), "runs": results}
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    typer.echo("\n".join([*tables[:-1], *errors_of(results)]))
    hours = sum(result.duration_s for result in results) / 3600
    typer.echo(f"{len(results)} runs, {hours:.1f} h of traces; in {output}: {RESULTS}, replay.md")
    typer.echo(f"as a page: python -m scripts.replay report {output / RESULTS} --output {output}")


def _command() -> str:
    return " ".join(["python -m scripts.replay", *sys.argv[1:]])


@app.command()
def report(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Results of `run` or `live`, recorded sessions; none: those of the last `run`."),
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Results of another replay, to compare with.")] = None,
    pictures: Annotated[bool, typer.Option(help="Draw each figure to a PNG, too.")] = True,
    output: Annotated[Path, typer.Option(help="Directory for the page, its pictures and its numbers.")] = OUTPUT,
) -> None:
    """Make a page of results that opens without a network; without any, the shipped replay is run first."""
    from scripts.replay.report import write_report  # noqa: PLC0415  what draws is heavy, and only for this

    try:
        if not files and not (OUTPUT / RESULTS).exists():
            progress.print("nothing was replayed yet: the shipped site first", markup=False)
            run(output=OUTPUT)
        _ready(output, None, None)
        results = [result for path in files or [OUTPUT / RESULTS] for result in _read(path)]
        before = _read(against) if against is not None else ()
        written = write_report(
            results,
            output,
            command=_command(),
            against=before,
            pictures=pictures,
            say=lambda line: progress.print(f"  {line}", markup=False),
        )
    except (ReplayError, CoordinatorError) as error:
        typer.echo(f"replay: {error}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(f"replay: {error.filename or output} can't be written: {error.strerror or error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"in {output}: {', '.join(path.name for path in written)}")


def _read(path: Path) -> tuple[Result, ...]:
    """Results, or what came of a recorded session. Raises ResultInvalid, RecordingInvalid."""
    if path.suffix != SUFFIX:
        return read_results(path)
    results, cut = session_results(path)
    if cut:
        progress.print(f"{path}: {cut}; shown up to there", markup=False)
    return results


@app.command()
def live(  # noqa: PLR0917  a command's options
    site: Annotated[Path, typer.Argument(help="The site (TOML).", show_default="the shipped one")] = shipped.LIVE_FILE,
    trace: Annotated[
        list[str] | None,
        typer.Option(help="A link trace: CSV, mahimahi, or session.mcap:AGENT. Repeat for more; none: a made one."),
    ] = None,
    policy: Annotated[list[str] | None, typer.Option(help="A policy of the coordinator; repeat for more.")] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="The model's bundle; the one of `make prepare-model` if none is named.")
    ] = None,
    broker: Annotated[Broker, typer.Option(help="Which broker to start.")] = Broker.EMBEDDED,
    seed: Annotated[int, typer.Option(min=0, help="What is drawn.")] = 0,
    record: Annotated[
        Path | None, typer.Option(help="Keep sessions, logs and configurations in this directory.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Directory for results and tables.")] = OUTPUT / "live",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all of it to this file.")] = None,
) -> None:
    """Replay traces live: real agents, model and broker, on emulated links; then the same in virtual time, beside it.

    In virtual time agents have the speeds that they told of live, and the same ladder.
    """
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        _ready(output, None, json_file)
        with TemporaryDirectory(prefix="kvbus-live-") as temporary:
            folder = _kept(record) if record is not None else Path(temporary)
            terms = LiveTerms(
                place=read_setting(site),
                traces=_traces(trace) if trace else shipped.traces()[2:3],
                policies=tuple(policy or shipped.POLICIES),
                bundle=bundle or default_bundle(),
                folder=folder,
                broker=broker,
                seed=seed,
            )
            results = asyncio.run(_lived(terms, output / RESULTS))
        _write(results, output, json_file)
    except (ReplayError, CoordinatorError, TraceError, AgentError, BusError, LinkError, DemoFailed) as error:
        typer.echo(f"replay: {error}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(f"replay: {error.filename or output} can't be written: {error.strerror or error}", err=True)
        raise typer.Exit(1) from None


def _kept(record: Path) -> Path:
    """A new directory of that name. Raises SettingInvalid."""
    if record.exists():
        raise SettingInvalid(f"{record} exists already; name another directory to record to")
    record.mkdir(parents=True)
    return record.absolute()


async def _lived(terms: LiveTerms, file: Path) -> list[Result]:
    """Each run's result, and that of its twin in virtual time; kept in the file as they come."""
    results = []
    traces = dict(terms.traces)
    async for played in lived(terms, lambda line: progress.print(line, markup=False)):
        results.append(played.result)
        place = measured(terms.place, played.recording, terms.bundle)
        known, name = policy_named(played.result.policy), played.result.trace
        twin = Terms(place=place, policy=known, trace_name=name, trace=traces[name], seed=terms.seed)
        results.append(await asyncio.to_thread(run_virtually, twin))
        await asyncio.to_thread(write_results, file, results)
    return results


@app.command()
def plans(
    file: Annotated[Path, typer.Argument(help="A session, as `coordinator run --record` writes it.")],
) -> None:
    """Compute the plans of a recorded session again, from what its coordinator had heard.

    The same code on the same messages gives the same plans; another version, or other code, may not: this shows where
    they part. Ends with 1 if any differs.
    """
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    try:
        recorded = Recorded(file)
        with console.status("") as status:
            found = plans_again(recorded, lambda at_s: status.update(f"{at_s:.0f} s of the session"))
    except CoordinatorError as error:
        typer.echo(f"replay: {error}", err=True)
        raise typer.Exit(1) from None
    titles = ("to", "policy", "E2E, s", "again", "media", "same")
    table = Table(
        Column("question", no_wrap=True, ratio=1),
        *(Column(title, no_wrap=title != "same", min_width=len(title)) for title in titles),
        expand=True,
        caption="E2E as it was predicted",
        caption_justify="left",
    )
    for each in found:
        told = each.recorded or each.again
        media = ", ".join(dict.fromkeys(link.medium for link in told.links)) if told else ""
        table.add_row(
            Text(told.question if told else each.request),
            told.receiver if told else "",
            told.policy if told else "",
            f"{each.recorded.predicted_e2e_s:.3f}" if each.recorded else "-",
            f"{each.again.predicted_e2e_s:.3f}" if each.again else "-",
            media,
            Text(each.difference or "yes"),
        )
    console.print(table)
    differ = sum(bool(each.difference) for each in found)
    console.print(f"{len(found) - differ} of {len(found)} plans are the same", markup=False)
    if recorded.cut:
        console.print(f"{file}: {recorded.cut}; replayed up to there", markup=False)
    if differ:
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m scripts.replay")
