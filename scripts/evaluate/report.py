"""What an evaluation leaves beside its records: evaluate.md, evaluate.json and the pictures."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from scripts.evaluate import tables
from scripts.evaluate.errors import ResultsInvalid
from scripts.evaluate.items import Skipped
from scripts.evaluate.method import FACTS
from scripts.evaluate.plots import rate_quality
from scripts.evaluate.records import Record
from scripts.evaluate.recovery import Recovery, damage_recovery, recoveries
from scripts.evaluate.summary import Row, rows
from scripts.prepare_model.errors import free_mb, is_disk_full
from scripts.provenance import machine, versions

MARKDOWN, JSON, CURVES, RECOVERY = "evaluate.md", "evaluate.json", "rate-quality.png", "damage-recovery.png"
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
    recoveries: tuple[Recovery, ...]


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
        versions=versions(PACKAGES),
        machine=machine(),
        run=run,
        methods=tuple(methods),
        skipped=tuple(skipped),
        notes=tuple(notes),
        rows=rows(records, methods),
        recoveries=recoveries(records, methods),
    )


def markdown(made: Report, records: Sequence[Record]) -> str:
    """The tables, with what they are of."""
    run = made.run
    made_of = f"{run['model']}, {run['weights']} weights, fingerprint {run['fingerprint'][:12]}"
    if run["receiver"] is not None:
        made_of += f"; receiver {run['receiver']}, whose own uncompressed run is what answers are compared with"
    parts = [
        f"{made_of}; `{shlex.join(made.command)}`",
        "**Quality**, means with 95 % bootstrap intervals over contexts; KL, agreement: along the uncompressed answer",
        tables.quality(made.rows),
        "**Costs**; bits and ratios count all headers and scales, and refer to the whole cache",
        tables.costs(made.rows),
    ]
    if any(name.endswith(FACTS) and name.removesuffix(FACTS) in made.methods for name in made.methods):
        parts += ["**What facts add**, paired differences with and without", tables.facts(records)]
    if made.recoveries:
        parts.append("**What backfill gives back**: damage is what eviction alone loses against the uncompressed run")
        parts.append(tables.backfill(made.recoveries))
    if any(map(tables.in_paper, made.rows)):
        parts += ["**Q-KVComm's Table I** and ours", tables.paper(made.rows)]
    if made.skipped:
        parts.append(f"**Skipped**: {len(made.skipped)}")
        parts.append("\n".join(f"- {each.file}, {each.place}: {each.reason}" for each in made.skipped))
    parts += [f"Note: {note}" for note in made.notes]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def write(made: Report, text: str, directory: Path, *, also: Path | None = None) -> tuple[Path, ...]:
    """Text, JSON (`also` at another place, too) and pictures. Raises EvaluationError if one can't be written."""
    content = msgspec.json.format(msgspec.json.encode(made), indent=2) + b"\n"
    files = {directory / MARKDOWN: text.encode(), directory / JSON: content} | ({also: content} if also else {})
    paths = tuple(files)
    for path, data in files.items():
        try:
            path.write_bytes(data)
        except OSError as error:
            if is_disk_full(error):
                raise ResultsInvalid(f"disk full while writing {path}: {free_mb(path)} MB free") from None
            raise ResultsInvalid(f"{path} can't be written ({error.strerror})") from None
    if made.rows:
        paths += (directory / CURVES,)
        rate_quality(made.rows, paths[-1])
    if made.recoveries:
        paths += (directory / RECOVERY,)
        damage_recovery(made.recoveries, paths[-1])
    return paths
