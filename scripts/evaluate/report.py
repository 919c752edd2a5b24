"""What an evaluation leaves beside its records: evaluate.md, evaluate.json and the curves."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from edge_agent.model.manifest import Manifest
from scripts.evaluate import tables
from scripts.evaluate.errors import ResultsInvalid
from scripts.evaluate.items import Skipped
from scripts.evaluate.method import FACTS, PAPER
from scripts.evaluate.plots import rate_quality
from scripts.evaluate.records import Record
from scripts.evaluate.summary import Row, rows
from scripts.prepare_model.errors import free_mb, is_disk_full

MARKDOWN, JSON, CURVES = "evaluate.md", "evaluate.json", "rate-quality.png"
PACKAGES = ("kvbus", "numpy", "onnxruntime", "tokenizers", "torch", "transformers", "yake", "spacy")


class Report(Struct, frozen=True, kw_only=True):
    """All that is printed and written."""

    command: tuple[str, ...]
    versions: dict[str, str]
    machine: dict[str, str]
    run: dict[str, Any]
    methods: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    rows: tuple[Row, ...]


def report(
    records: Sequence[Record],
    *,
    command: Sequence[str],
    run: dict[str, Any],
    methods: Sequence[str],
    skipped: Sequence[Skipped],
    notes: Sequence[str],
) -> Report:
    """The figures of the records, of the items that every method has done."""
    return Report(
        command=tuple(command),
        versions={name: _version(name) for name in PACKAGES},
        machine={
            "system": platform.platform(),
            "processor": platform.machine(),
            "python": platform.python_version(),
        },
        run=run,
        methods=tuple(methods),
        skipped=tuple(skipped),
        notes=tuple(notes),
        rows=rows(records, methods),
    )


def markdown(made: Report, records: Sequence[Record], manifest: Manifest) -> str:
    """The tables, with what they are of."""
    made_of = f"{manifest.name}, {manifest.weight_precision} weights, fingerprint {manifest.fingerprint[:12]}"
    parts = [
        f"{made_of}; `{' '.join(made.command)}`",
        "**Quality**, means with 95 % bootstrap intervals over items; KL and agreement along the uncompressed answer",
        tables.quality(made.rows),
        "**Costs**; bits and ratios count all headers and scales, and refer to the whole cache",
        tables.costs(made.rows),
    ]
    if any(name.endswith(FACTS) and name.removesuffix(FACTS) in made.methods for name in made.methods):
        parts += ["**What facts add**, paired differences with and without", tables.facts(records)]
    if set(PAPER) & set(made.methods):
        parts += ["**Q-KVComm's Table I** and ours", tables.paper(made.rows)]
    if made.skipped:
        parts.append(f"**Skipped**: {len(made.skipped)}")
        parts.append("\n".join(f"- {each.file}, {each.place}: {each.reason}" for each in made.skipped))
    parts += [f"Note: {note}" for note in made.notes]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def write(made: Report, text: str, directory: Path) -> tuple[Path, ...]:
    """The three files. Raises ResultsInvalid if one can't be written, EvaluationError for the picture."""
    paths = (directory / MARKDOWN, directory / JSON)
    content = msgspec.json.format(msgspec.json.encode(made), indent=2) + b"\n"
    for path, data in zip(paths, (text.encode(), content), strict=True):
        try:
            path.write_bytes(data)
        except OSError as error:
            if is_disk_full(error):
                raise ResultsInvalid(f"disk full while writing {path}: {free_mb(path)} MB free") from None
            raise ResultsInvalid(f"{path} can't be written ({error.strerror})") from None
    curves = directory / CURVES
    if not made.rows:
        return paths
    rate_quality(made.rows, curves)
    return (*paths, curves)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
