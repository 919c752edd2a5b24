"""`python -m scripts.bench`: runtime, codec and bus on this machine, and where the media cross over."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from broker_config.messages import Speed
from edge_agent.engine import Engine
from edge_agent.errors import AgentError
from edge_agent.model.session import Model
from edge_agent.model.text import Text
from scripts.bench.bus import BusRow, bus_bench
from scripts.bench.codec import CodecBench, RuntimeBench, codec_bench, runtime_bench
from scripts.bench.crossover import crossover, plot
from scripts.demo.script import DOCUMENTS
from scripts.prepare_model import default_bundle

OUTPUT = Path("build/bench")
console = Console(stderr=True, highlight=False)


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs of everything.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a model run.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all of it to this file.")] = None,
) -> None:
    """Measure this machine; tables to standard output and, with plots, to build/bench/."""
    try:
        bundle = default_bundle()
    except AgentError as error:
        console.print(f"bench: {error}")
        raise typer.Exit(1) from None
    texts = [path.read_text(encoding="utf-8") for path in sorted(DOCUMENTS.rglob("*.txt"))]
    console.print("runtime …")
    runtime = runtime_bench(bundle, texts, threads=threads, repeats=repeats)
    console.print("codec …")
    codec = codec_bench(bundle, texts, threads=threads, repeats=repeats)
    console.print("bus …")
    with tempfile.TemporaryDirectory(prefix="kvbus-bench-") as folder:
        rows = asyncio.run(bus_bench(Path(folder), repeats=repeats))
    console.print("crossover …")
    model = Model(bundle, threads=threads)
    found = crossover(asyncio.run(_speed(model, bundle)), model.manifest.elements_per_token, model.manifest.ladder)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    plot(found, OUTPUT / "crossover.png")
    report = "\n".join([_machine(), *_runtime(runtime), *_codec(codec), *_bus(rows)]) + "\n"
    (OUTPUT / "bench.md").write_text(report, encoding="utf-8")
    record = msgspec.json.format(
        msgspec.json.encode({**_facts(), "runtime": runtime, "codec": codec, "bus": rows, "crossover": found})
    )
    for path in (OUTPUT / "bench.json", json_file):
        if path is not None:
            path.write_bytes(record)
    typer.echo(report)
    typer.echo(f"in {OUTPUT}: bench.md, bench.json, crossover.png")


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


def _runtime(found: RuntimeBench) -> list[str]:
    prefill = "".join(f" {tps:.0f} |" for tps in found.prefill_tps.values())
    heads = "".join(f" prefill {tokens} |" for tokens in found.prefill_tps)
    return [
        f"Runtime, tokens/s, {found.threads} thread(s)\n",
        f"|{heads} decode after 512 |",
        "|" + "--:|" * (len(found.prefill_tps) + 1),
        f"|{prefill} {found.decode_tps:.1f} |\n",
    ]


def _codec(found: CodecBench) -> list[str]:
    prefill = f"{found.prefill.median_s:.2f} s ({found.threads} thread(s))"
    lines = [
        f"Codec, {found.tokens} tokens ({found.cache_mb:.1f} MB as float32), one thread; prefill takes {prefill}\n",
        "| rung | bits/element | encode, ms (least-most) | decode, ms | encode + decode, share of prefill |",
        "|---|--:|--:|--:|--:|",
    ]
    return [
        *lines,
        *(
            f"| {row.name} | {row.bits_per_element:.2f} | {row.encode.median_s * 1e3:.0f} "
            f"({row.encode.least_s * 1e3:.0f}-{row.encode.most_s * 1e3:.0f}) | {row.decode.median_s * 1e3:.0f} | "
            f"{row.share_of_prefill:.1%} |"
            for row in found.rows
        ),
        "",
    ]


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
