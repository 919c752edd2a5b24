"""`python -m scripts.traces`: make traces, bring them in from elsewhere, look at them."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from scripts.traces.errors import TraceError
from scripts.traces.generate import KINDS, Made, made
from scripts.traces.mahimahi import read_mahimahi
from scripts.traces.memory import MEMORY_KINDS, MadeMemory, MemoryTrace, made_memory, write_memory
from scripts.traces.session import read_session
from scripts.traces.trace import Trace, read_trace, write_trace

MBIT = 1e6
MOST_DRAWN = 40
OUT_BPS = 1e5
"""Below it a link counts as out in what is shown."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)
console = Console(highlight=False, soft_wrap=True)

Kind = StrEnum("Kind", {kind: kind for kind in KINDS})  # type: ignore[misc]
MemoryKind = StrEnum("MemoryKind", {kind: kind for kind in MEMORY_KINDS})  # type: ignore[misc]
Direction = StrEnum("Direction", {"uplink": "uplink", "downlink": "downlink"})
Output = Annotated[Path, typer.Argument(help="The CSV file to write; it must not exist.")]
Step = Annotated[float, typer.Option("--step", min=0.01, max=60, help="Seconds of a row.")]


@app.callback()
def traces() -> None:
    """Traces of links: time_s,bandwidth_bps[,rtt_ms,rssi_dbm,loss] in rows of equal steps (docs/traces.md)."""


@app.command()
def make(  # noqa: PLR0917  a command's options
    kind: Annotated[Kind, typer.Argument(help="What the link does.")],
    output: Output,
    seconds: Annotated[float, typer.Option(help="How long.")] = 600.0,
    step_s: Step = 1.0,
    mbps: Annotated[float, typer.Option(help="Median rate, Mbit/s, outages counted out.")] = 10.0,
    rtt_ms: Annotated[float, typer.Option(help="Round trip of the idle link.")] = 40.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed makes the same trace.")] = 0,
) -> None:
    """Make a trace: walk (a wandering rate), bursts (good and bad times), drive (past cells), outages."""
    terms = Made(
        kind=kind.value,
        duration_s=seconds,
        step_s=step_s,
        median_bps=mbps * MBIT,
        rtt_s=rtt_ms / 1000,
        seed=seed,
    )
    _write(output, lambda: made(terms))


@app.command("make-memory")
def make_memory(  # noqa: PLR0917  a command's options
    kind: Annotated[MemoryKind, typer.Argument(help="What other work does to the device's memory.")],
    output: Output,
    seconds: Annotated[float, typer.Option(help="How long.")] = 600.0,
    step_s: Step = 1.0,
    total_mb: Annotated[float, typer.Option(help="Memory of the device, MB (10^6 bytes).")] = 4_096.0,
    least: Annotated[float, typer.Option(help="What is available at least, as a share of it.")] = 0.03,
    most: Annotated[float, typer.Option(help="What is available at most.")] = 0.7,
    seed: Annotated[int, typer.Option(min=0, help="The same seed makes the same trace.")] = 0,
) -> None:
    """Make a trace of a device's memory: ramp (less and less), sawtooth (again and again), spikes."""
    terms = MadeMemory(
        kind=kind.value,
        total_bytes=int(total_mb * MBIT),
        duration_s=seconds,
        step_s=step_s,
        least=least,
        most=most,
        seed=seed,
    )
    _write(output, lambda: made_memory(terms))


@app.command("from-mahimahi")
def from_mahimahi(
    file: Annotated[Path, typer.Argument(help="A line for each packet, in milliseconds.")],
    output: Output,
    step_s: Step = 1.0,
) -> None:
    """Bring in a trace of mahimahi: its packets, counted by steps."""
    _write(output, lambda: read_mahimahi(file, step_s=step_s))


@app.command("from-session")
def from_session(
    file: Annotated[Path, typer.Argument(help="A session, as `coordinator run --record` writes it.")],
    agent: Annotated[str, typer.Argument(help="Whose link.")],
    output: Output,
    direction: Annotated[Direction, typer.Option(help="Which way.")] = Direction.uplink,
    step_s: Step = 1.0,
) -> None:
    """Take a trace out of a recorded session: what an agent measured of its link."""
    cut = ""

    def read() -> Trace:
        nonlocal cut
        trace, cut = read_session(file, agent, direction.value, step_s=step_s)
        return trace

    _write(output, read)
    if cut:
        console.print(f"{file}: {cut}; the trace goes up to there", markup=False)


@app.command()
def show(
    files: Annotated[list[Path], typer.Argument(help="CSV traces.")],
    picture: Annotated[Path | None, typer.Option(help="Draw them to this PNG, too.")] = None,
) -> None:
    """Show what traces are like: how long, how fast, how often out."""
    found: list[tuple[str, Trace]] = []
    for file in files:
        try:
            found.append((file.stem, read_trace(file)))
        except TraceError as error:
            _fail(str(error))
    numbers = ("seconds", "mean", "p10", "median", "max", "out", "RTT, ms")
    table = Table(
        Column("trace", no_wrap=True, ratio=1),
        *(Column(name, justify="right", no_wrap=True) for name in numbers),
        expand=True,
        box=box.SIMPLE,
        caption=f"rates in Mbit/s; out: share of the time below {OUT_BPS / MBIT:g}",
        caption_justify="left",
    )
    for name, trace in found:
        table.add_row(Text(name), *_numbers(trace))
    console.print(table)
    if picture is not None:
        from scripts.traces.plots import draw  # noqa: PLC0415  matplotlib takes a second

        if len(found) > MOST_DRAWN:
            _fail(f"a picture has room for {MOST_DRAWN} traces, not {len(found)}")
        try:
            draw(found, picture)
        except (OSError, ValueError) as error:  # the latter for a format that is none
            _fail(f"{picture}: {getattr(error, 'strerror', None) or error}")
        console.print(f"drawn to {picture}", markup=False)


def _numbers(trace: Trace) -> tuple[str, ...]:
    rates = np.array([sample.bandwidth_bps for sample in trace.samples])
    rtts_ms = [1000 * sample.rtt_s for sample in trace.samples if sample.rtt_s is not None]
    figures = (rates.mean(), *np.percentile(rates, [10, 50]), rates.max())
    return (
        f"{trace.duration_s:g}",
        *(f"{figure / MBIT:.{2 if figure < 10 * MBIT else 0}f}" for figure in figures),
        f"{100 * (rates < OUT_BPS).mean():.0f} %",
        f"{np.median(rtts_ms):.0f}" if rtts_ms else "-",
    )


def _write(output: Path, read: Callable[[], Trace | MemoryTrace]) -> None:
    try:
        if output.exists():
            _fail(f"{output} exists already; name another file")
        trace = read()
        if isinstance(trace, Trace):
            write_trace(output, trace)
        else:
            write_memory(output, trace)
    except (TraceError, ValueError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{output} can't be written: {error.strerror or error}")
    seconds = len(trace.samples) * trace.step_s
    console.print(f"{output}: {len(trace.samples)} rows, {seconds:g} s", markup=False)


def _fail(why: str) -> NoReturn:
    typer.echo(f"traces: {why}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m scripts.traces")
