"""`python -m scripts.calibrate`: measure a pair of models and keep what a receiver needs for the other's caches."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from edge_agent.errors import AgentError
from edge_agent.kv import calibration as statistics
from edge_agent.kv.cache import Float32
from edge_agent.kv.calibration import Calibration
from edge_agent.kv.calibration_file import calibration_name, write_calibration
from edge_agent.model.manifest import read_manifest
from scripts.calibrate.pair import calibrate
from scripts.prepare_model.cache import cache_root
from scripts.prepare_model.calibration import Texts, read_texts
from scripts.prepare_model.errors import PreparationError
from scripts.provenance import machine, versions

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

_INTERRUPTED = 130


class Kind(StrEnum):
    """How finely statistics are kept."""

    DIMENSION = "dimension"
    SCALAR = "scalar"


@app.command()
def calibrate_models(
    *,
    sender: Annotated[
        Path,
        typer.Option(
            metavar="BUNDLE", help="The bundle of the model whose caches are sent, as prepare_model prints its path."
        ),
    ],
    receiver: Annotated[Path, typer.Option(metavar="BUNDLE", help="The bundle of the model that is to use them.")],
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A folder of .txt and .md files for both models to read. Default: the product's own texts.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        Kind | None,
        typer.Option(
            help="dimension: a mean and a deviation for each dimension, for models with the same KV heads; "
            "scalar: one of each for a layer's keys and its values. Default: dimension where the models allow it.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where to put the pair's file. Default: calibrations in $KVBUS_CACHE (default ~/.cache/kvbus).",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all that is printed to FILE.", show_default=False),
    ] = None,
) -> None:
    """Calibrate two different models, so that the receiver can take up the sender's KV caches (Q-KVComm, eqs. 9-11).

    Both models read the same texts. Mean and standard deviation of their keys and values are kept in one file, named by
    the two models: SENDER-RECEIVER.npz. It serves one direction; for the other, swap the two and run again.

    This aligns statistics, not meaning: SmolLM2 and Gemma find right answers less likely with each other's caches than
    with none. Measure before you rely on it.
    """
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        passages = read_texts(texts)
        found = _measured(errors, sender, receiver, passages, kind)
        folder = output if output is not None else cache_root() / "calibrations"
        path = folder / calibration_name(found.sender.fingerprint, found.receiver.fingerprint)
        write_calibration(found, path)
        names = (read_manifest(sender).name, read_manifest(receiver).name)
        if json_file is not None:
            _write_report(json_file, found, names, passages, path)
    except (AgentError, PreparationError) as error:
        errors.print(f"calibrate: {error}", markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("calibrate: interrupted; nothing of this run is kept")
        raise typer.Exit(_INTERRUPTED) from None
    _show(Console(soft_wrap=True, highlight=False), found, names, passages, path)


def _measured(console: Console, sender: Path, receiver: Path, texts: Texts, kind: Kind | None) -> Calibration:
    columns = (
        SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), BarColumn(bar_width=24),
        MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    asked: statistics.Kind | None = None if kind is None else "scalar" if kind is Kind.SCALAR else "dimension"
    title = f"read {texts.origin} in both models"
    if not console.is_terminal:
        console.print(f"… {title}", markup=False)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(title, total=2 * len(texts.passages))
        return calibrate(
            sender, receiver, texts.passages, kind=asked, on_passage=lambda done: bars.update(task, completed=done)
        )


def _ratios(found: Calibration) -> Float32:
    """Median over dimensions of receiver's over sender's deviation, float32 (receiver's layers, 2)."""
    ratios: Float32 = np.median(found.scale, axis=-1)
    return ratios


def _show(console: Console, found: Calibration, names: tuple[str, str], texts: Texts, path: Path) -> None:
    table = Table("layer", title=f"{names[0]} → {names[1]}: {found.kind}, {texts.origin}", title_justify="left")
    for heading in ("from layer", "σ ratio, keys", "σ ratio, values"):
        table.add_column(heading, justify="right")
    for index, (source, (keys, values)) in enumerate(zip(found.layers, _ratios(found).tolist(), strict=True)):
        table.add_row(str(index), str(source), f"{keys:.3g}", f"{values:.3g}")
    console.print(table)
    console.print("σ ratio: deviation at the receiver over that at the sender, median over dimensions")
    console.print(f"calibration: {path.absolute()}", markup=False)


def _write_report(path: Path, found: Calibration, names: tuple[str, str], texts: Texts, written: Path) -> None:
    ratios = _ratios(found).tolist()
    report: dict[str, Any] = {
        "command": ["python", "-m", "scripts.calibrate", *sys.argv[1:]],
        "machine": machine(),
        "versions": versions(("numpy", "onnxruntime")),
        "texts": {"origin": texts.origin, "passages": len(texts.passages)},
        "kind": found.kind,
        "sender": {"name": names[0], **msgspec.to_builtins(found.sender)},
        "receiver": {"name": names[1], **msgspec.to_builtins(found.receiver)},
        "layers": [
            {"layer": index, "from_layer": source, "sigma_ratio_keys": keys, "sigma_ratio_values": values}
            for index, (source, (keys, values)) in enumerate(zip(found.layers, ratios, strict=True))
        ],
        "calibration": str(written.absolute()),
    }
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    except OSError as error:
        raise PreparationError(f"--json {path}: {error.strerror}") from None


if __name__ == "__main__":
    app()
