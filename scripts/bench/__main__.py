"""`python -m scripts.bench`: runtime, codec and bus on this machine, and where the media cross over."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from msgspec import Struct
from rich.console import Console

from broker_config.messages import Speed
from edge_agent.engine import Engine
from edge_agent.errors import AgentError
from edge_agent.model.session import Model, Runtime
from edge_agent.model.text import Text
from scripts.bench.bus import BusRow, bus_bench
from scripts.bench.codec.peers import makers
from scripts.bench.codec.peers import peers as codec_peers
from scripts.bench.codec.report import sections as codec_sections
from scripts.bench.codec.run import codec_bench, read
from scripts.bench.codec.run import steps as codec_steps
from scripts.bench.crossover import crossover, plot
from scripts.bench.runtime.plot import plot as runtime_plot
from scripts.bench.runtime.report import sections as runtime_sections
from scripts.bench.runtime.run import steps as expected_steps
from scripts.bench.runtime.shown import Steps
from scripts.bench.runtime.variants import Peers, candidates, runtime_bench
from scripts.demo.script import DOCUMENTS
from scripts.prepare_model import PreparationError, default_bundle
from scripts.prepare_model.weights import Weights

OUTPUT = Path("build/bench")
DEFAULT_MODEL = "default"
console = Console(stderr=True, highlight=False)


class Part(StrEnum):
    """What can be run by itself, in this order."""

    RUNTIME = "runtime"
    CODEC = "codec"
    BUS = "bus"
    CROSSOVER = "crossover"


class Report(Struct, kw_only=True):
    """Sections of Markdown, the record behind them, and the pictures that were drawn."""

    lines: list[str]
    record: dict[str, Any]
    pictures: list[str]

    def add(self, part: Part, found: object, lines: Sequence[str] = (), picture: str | None = None) -> None:
        """Take what a part has found."""
        self.record[part.value] = found
        self.lines += lines
        self.pictures += [picture] if picture else []


def main(
    *,
    only: Annotated[list[Part] | None, typer.Option(help="Run this part and no other; can be repeated.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model for the runtime part: a directory or hub id as prepare_model takes it, or "
            f"'{DEFAULT_MODEL}' for SmolLM2. Can be repeated: their tables stand one after another. Default: SmolLM2.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        list[Weights] | None, typer.Option(help="Which of ours to measure; can be repeated. Default: all.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs of everything.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a model run.")] = 1,
    peer_python: Annotated[
        str, typer.Option(help="An interpreter that has llama-cpp-python or onnxruntime-genai. Default: this one.")
    ] = sys.executable,
    gguf: Annotated[
        list[str] | None,
        typer.Option(metavar="[MODEL=]FILE", help="The GGUF that llama.cpp's Q8_0 is made from.", show_default=False),
    ] = None,
    genai: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MODEL=]DIRECTORY", help="What onnxruntime-genai's builder has made.", show_default=False
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all of it to this file.")] = None,
) -> None:
    """Measure this machine; tables to standard output and, with plots, to build/bench/."""
    models = model or [DEFAULT_MODEL]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    report = Report(lines=[_machine()], record=_facts(), pictures=[])
    texts = [path.read_text(encoding="utf-8") for path in sorted(DOCUMENTS.rglob("*.txt"))]
    try:
        ggufs, folders = _by_model("--gguf", gguf, models), _by_model("--genai", genai, models)
        peers = {name: Peers(python=peer_python, gguf=ggufs.get(name), genai=folders.get(name)) for name in models}
        for part in Part:
            if only and part not in only:
                continue
            console.print(f"{part} …", markup=False)
            if part is Part.RUNTIME:
                ours = weights or list(Weights)
                _run_runtime(report, peers, texts, ours, threads=threads, repeats=repeats)
            elif part is Part.CODEC:
                _run_codec(report, texts, threads=threads, repeats=repeats)
            elif part is Part.BUS:
                _run_bus(report, repeats)
            else:
                _run_crossover(report, threads)
    except (AgentError, PreparationError) as error:
        console.print(f"bench: {error}", markup=False)
        raise typer.Exit(1) from None
    _write(report, json_file)


def _by_model(option: str, given: Sequence[str] | None, models: Sequence[str]) -> dict[str, Path]:
    """Model → path, out of MODEL=PATH, or PATH where there is one model. Raises PreparationError."""
    found = {}
    for value in given or ():
        name, equals, path = value.partition("=")
        if equals and name in models:
            found[name] = Path(path).absolute()
        elif len(models) == 1:
            found[models[0]] = Path(value).absolute()
        else:
            raise PreparationError(f"{option} {value}: say of which model, as {models[0]}={value}")
    return found


def _run_runtime(
    report: Report,
    peers: Mapping[str, Peers],
    texts: Sequence[str],
    weights: Sequence[Weights],
    *,
    threads: int,
    repeats: int,
) -> None:
    """A model that can't be prepared is left out by name; the others are measured."""
    benches = []
    for name, peer in peers.items():
        with Steps(console) as steps:
            try:
                model = None if name == DEFAULT_MODEL else name
                found = candidates(model, peer, threads=threads, weights=weights, hear=steps.title)
            except PreparationError as error:
                report.lines.append(f"- not measured: {name}: {error}\n")
                continue
            steps.expect(expected_steps(found.variants, found.manifest.window_tokens, repeats))
            benches.append(runtime_bench(found, texts, threads=threads, repeats=repeats, hear=steps.next))
    drawn = runtime_plot(benches, OUTPUT / "runtime.png")
    report.add(Part.RUNTIME, benches, runtime_sections(benches), "runtime.png" if drawn else None)


def _run_codec(report: Report, texts: Sequence[str], *, threads: int, repeats: int) -> None:
    with Steps(console) as shown:
        shown.title("read a context and answer from it")
        subject = read(default_bundle(), texts, threads=threads)
        shown.title("try the peers")
        found = codec_peers(subject.cache, makers(threads))
        shown.expect(codec_steps(found, repeats))
        bench = codec_bench(subject, found, repeats=repeats, hear=shown.next)
    report.add(Part.CODEC, bench, codec_sections(bench))


def _run_bus(report: Report, repeats: int) -> None:
    with tempfile.TemporaryDirectory(prefix="kvbus-bench-") as folder:
        rows = asyncio.run(bus_bench(Path(folder), repeats=repeats))
    report.add(Part.BUS, rows, _bus(rows))


def _run_crossover(report: Report, threads: int) -> None:
    bundle = default_bundle()
    model = Model(bundle, Runtime(threads=threads))
    speed = asyncio.run(_speed(model, bundle))
    found = crossover(speed, model.manifest.elements_per_token, model.manifest.ladder)
    plot(found, OUTPUT / "crossover.png")
    report.add(Part.CROSSOVER, found, picture="crossover.png")


def _write(report: Report, json_file: Path | None) -> None:
    text = "\n".join(report.lines) + "\n"
    (OUTPUT / "bench.md").write_text(text, encoding="utf-8")
    record = msgspec.json.format(msgspec.json.encode(report.record))
    for path in (OUTPUT / "bench.json", json_file):
        if path is not None:
            path.write_bytes(record)
    typer.echo(text)
    typer.echo(f"in {OUTPUT}: {', '.join(['bench.md', 'bench.json', *report.pictures])}")


async def _speed(model: Model, bundle: Path) -> Speed:
    engine = Engine(model, Text(bundle, model.manifest))
    try:
        return await engine.start()
    finally:
        engine.close()


def _facts() -> dict[str, Any]:
    names = ("kvbus", "onnxruntime", "numpy", "aiomqtt", "amqtt")
    return {
        "command": " ".join(["python -m scripts.bench", *sys.argv[1:]]),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def _machine() -> str:
    facts = _facts()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    machine = facts["machine"]
    return f"`{facts['command']}` on {machine['cores']} × {machine['cpu']}, Python {machine['python']}, {versions}\n"


def _bus(rows: list[BusRow]) -> list[str]:
    return [
        "Bus, 16 MB over loopback, 8 chunks in flight\n",
        "| broker | chunk | transfer, MB/s | raw QoS 1 publishing, MB/s | transfer ÷ raw |",
        "|---|--:|--:|--:|--:|",
        *(
            f"| {row.broker} | {row.chunk_bytes // 1024} KiB | {row.transfer_mb_per_s:.0f} | "
            f"{row.transfer_mb_per_s / row.share_of_raw:.0f} | {row.share_of_raw:.2f} |"
            for row in rows
        ),
        "",
    ]


if __name__ == "__main__":
    typer.run(main)
