"""The bundle of a model: found in the cache, or made and put there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from edge_agent.errors import BundleInvalid
from edge_agent.model.manifest import MANIFEST_NAME, Manifest, read_manifest
from scripts.prepare_model import cache, calibration, source
from scripts.prepare_model.assembly import ensure_export, export_place, make
from scripts.prepare_model.errors import DiskFull, PreparationError, is_disk_full
from scripts.prepare_model.export_graph import MODEL_FILE
from scripts.prepare_model.progress import Clock, Progress
from scripts.prepare_model.weights import DEFAULT_WEIGHTS, Weights

DEFAULT_LIMIT_GB = 6.0


class Prepared(Struct, frozen=True, kw_only=True):
    """A bundle and how it came to be. stages: title and seconds, in order; removed: what left the cache for it."""

    path: Path
    manifest: Manifest
    found: bool
    size_bytes: int
    stages: tuple[tuple[str, float], ...]
    removed: tuple[str, ...]


def prepare(
    model: str | None = None,
    *,
    weights: str = DEFAULT_WEIGHTS,
    texts: Path | None = None,
    root: Path | None = None,
    limit_gb: float = DEFAULT_LIMIT_GB,
    progress: Progress | None = None,
) -> Prepared:
    """The bundle of a model, out of the cache or made now. Raises PreparationError.

    model: None for the default, else a directory or a hub's id; weights: fp32, int8 or int4; texts: a folder to
    calibrate on (None: the product's).
    """
    progress = progress or Progress()
    root = root or cache.cache_root()
    clock = Clock(progress)
    clock.stage("look in the cache")
    found_source, passages = source.resolve(model), calibration.read_texts(texts)
    versions = cache.shaping_versions()
    precision = Weights(weights)
    key = cache.bundle_key(found_source.key, passages.digest, versions, precision)
    target = cache.bundle_path(root, found_source.name, key)
    manifest = cache.find(target)
    if manifest is not None:
        return _prepared(target, manifest, clock, found=True)
    with cache.locked(root, lambda: progress.note("another preparation is at work in this cache; waiting for it")):
        manifest = cache.find(target)
        if manifest is not None:
            return _prepared(target, manifest, clock, found=True)
        if cache.remove_leftovers(root):
            progress.note("removed what an interrupted preparation had left")
        with _written(f"the bundle of {found_source.name}", root):
            manifest = make(found_source, passages, precision, versions=versions, root=root, target=target, clock=clock)
        gone = cache.shrink(root, int(limit_gb * 1e9), keep=target)
    return _prepared(target, manifest, clock, found=False, removed=tuple(entry.path.name for entry in gone))


def exported_graph(model: str | None = None, *, texts: Path | None = None, root: Path | None = None) -> Path:
    """model.onnx of a model as optimum exported it, out of the cache or made now. Raises PreparationError.

    texts: as for prepare, whose export it is.
    """
    root, clock, versions = root or cache.cache_root(), Clock(Progress()), cache.shaping_versions()
    found = source.resolve(model)
    passages = calibration.read_texts(texts)
    export = export_place(found, passages, versions, root)
    if cache.find_export(export) is not None:
        return export / MODEL_FILE
    with cache.locked(root, lambda: None), _written(f"the export of {found.name}", root):
        ensure_export(found, passages, export, root=root, clock=clock)
    return export / MODEL_FILE


def default_bundle() -> Path:
    """The prepared bundle of the default model. Raises BundleInvalid that says to run `make prepare-model`.

    Takes milliseconds and imports no torch.
    """
    default = source.resolve(None)
    digest = calibration.read_texts(None).digest
    key = cache.bundle_key(default.key, digest, cache.shaping_versions(), DEFAULT_WEIGHTS)
    path = cache.bundle_path(cache.cache_root(), default.name, key)
    try:
        read_manifest(path)
    except BundleInvalid as error:
        if (path / MANIFEST_NAME).exists():
            raise
        raise BundleInvalid(f"the model {default.name} has not been prepared; run `make prepare-model`") from error
    return path


def copy_to(bundle: Path, target: Path) -> None:
    """The bundle at another place: hard links where the file system allows, else copies; whole or not at all.

    Replaces an older bundle there, refuses any other directory that holds something. Raises PreparationError.
    """
    target = target.absolute()
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST_NAME).is_file())):
        raise PreparationError(f"--output {target}: something that is no bundle is there already")
    try:
        with cache.scratch(target) as made:
            for item in sorted(bundle.iterdir()):
                try:
                    os.link(item, made / item.name)
                except OSError:
                    shutil.copyfile(item, made / item.name)
            cache.put_in_place(made, target)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(f"--output {target}", target.parent) from error
        raise PreparationError(f"--output {target}: {error.strerror or error}") from error


@contextmanager
def _written(what: str, root: Path) -> Iterator[None]:
    """What the file system refuses is a PreparationError that says what could not be written."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(what, root) from error
        raise PreparationError(f"{what} can't be written: {error}") from error


def _prepared(
    target: Path, manifest: Manifest, clock: Clock, *, found: bool, removed: tuple[str, ...] = ()
) -> Prepared:
    return Prepared(
        path=target,
        manifest=manifest,
        found=found,
        size_bytes=cache.size_bytes(target),
        stages=clock.stages(),
        removed=removed,
    )
