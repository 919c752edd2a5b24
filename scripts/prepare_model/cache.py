"""The cache of prepared bundles: where it is, who may write it, what leaves it when it grows too large.

$KVBUS_CACHE or ~/.cache/kvbus
    lock                 held by the one preparation that runs
    downloads/           fetched packages
    exports/NAME-KEY/    what optimum exported, from which bundles of any weight precision are made without torch
    bundles/NAME-KEY/    bundles; like exports whole ones only: each arrives by one rename
    bundles/.tmp-*/      a preparation at work; what a dead one left is removed by the next
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from broker_config.files import sync
from edge_agent.errors import BundleInvalid
from edge_agent.model.manifest import MANIFEST_NAME, MANIFEST_VERSION, Manifest, read_manifest
from scripts.prepare_model.errors import DiskFull, PreparationError, is_disk_full
from scripts.prepare_model.prompt import PROMPT_VERSION
from scripts.provenance import versions

CACHE_VARIABLE = "KVBUS_CACHE"
# Raise it when bundles made by older code must be made again though nothing else in their key changed
# (another export, another way to measure the ladder).
RECIPE_VERSION = 12
EXPORT_VERSION = 5

# What decides how the exported graph and its figures come out, and so belongs to a bundle's key.
SHAPING_PACKAGES = ("torch", "transformers", "optimum-onnx", "onnx", "onnxruntime", "tokenizers")

_TEMPORARY = ".tmp-"
EXPORT_NAME = "exported.json"
_ROOMS = ("bundles", "exports", "downloads")


class Entry(Struct, frozen=True, kw_only=True):
    """Something the cache holds. used_at: seconds since the epoch."""

    path: Path
    size_bytes: int
    used_at: float


class _Noted(Struct, frozen=True, kw_only=True):
    """exported.json."""

    about: msgspec.Raw
    sizes_bytes: dict[str, int]


def cache_root() -> Path:
    """`$KVBUS_CACHE`, or `~/.cache/kvbus`."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser().absolute() if given else Path.home() / ".cache" / "kvbus"


def shaping_versions() -> dict[str, str]:
    """Versions of the packages that shape a bundle, without importing them."""
    return versions(SHAPING_PACKAGES)


def bundle_key(source_key: str, texts_digest: str, versions: Mapping[str, str], weights: str) -> str:
    """16 hexadecimal digits of a hash of everything a bundle is made from."""
    return _key(
        source_key,
        texts_digest,
        f"weights {weights}",
        f"prompt {PROMPT_VERSION}",
        f"manifest {MANIFEST_VERSION}",
        f"recipe {RECIPE_VERSION}",
        *(f"{name} {version}" for name, version in sorted(versions.items())),
    )


def export_key(source_key: str, texts_digest: str, versions: Mapping[str, str]) -> str:
    """16 hexadecimal digits of a hash of everything an export and its transform are made from."""
    made_by = (f"{name} {version}" for name, version in sorted(versions.items()) if name != "onnxruntime")
    return _key(source_key, texts_digest, f"prompt {PROMPT_VERSION}", f"export {EXPORT_VERSION}", *made_by)


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def bundle_path(root: Path, name: str, key: str) -> Path:
    """Where the cache keeps that bundle."""
    return root / "bundles" / _safe(name, key)


def export_path(root: Path, name: str, key: str) -> Path:
    """Where the cache keeps that export."""
    return root / "exports" / _safe(name, key)


def _safe(name: str, key: str) -> str:
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name).lstrip(".-") or "model"
    return f"{safe[:64]}-{key}"


def find(path: Path) -> Manifest | None:
    """The manifest of a whole bundle at `path`, which now counts as just used; None if there is none."""
    try:
        manifest = read_manifest(path)
    except BundleInvalid:
        return None
    with contextlib.suppress(OSError):  # a read-only cache serves too
        os.utime(path)
    return manifest


@contextlib.contextmanager
def locked(root: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the cache for one preparation; calls on_wait before waiting for another. The lock dies with its process."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / "lock").open("w")
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull("the cache's lock", root) from error
        raise PreparationError(
            f"the cache {root} can't be written ({error.strerror}); set {CACHE_VARIABLE} to a directory of yours"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_leftovers(root: Path) -> int:
    """Remove what dead preparations left. Call with the lock held. Returns how many directories went."""
    stale = [path for room in _ROOMS for path in (root / room).glob(f"{_TEMPORARY}*")]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return len(stale)


@contextlib.contextmanager
def scratch(beside: Path) -> Iterator[Path]:
    """A temporary directory beside `beside`, on the same file system, removed whatever happens."""
    path = beside.parent / f"{_TEMPORARY}{beside.name}"
    shutil.rmtree(path, ignore_errors=True)
    try:
        path.mkdir(parents=True)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def put_in_place(made: Path, target: Path) -> None:
    """Make a finished directory durable, then let it appear at `target` in one step, instead of what was there."""
    for path in made.iterdir():
        sync(path)
    sync(made)
    if target.exists():
        old = target.parent / f"{_TEMPORARY}old-{target.name}-{os.getpid()}"
        target.rename(old)
        made.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        made.rename(target)
    sync(target.parent)


def entries(root: Path) -> list[Entry]:
    """Bundles, exports and downloads, least recently used first."""
    found = []
    for room in _ROOMS:
        for path in (root / room).glob("*"):
            if path.name.startswith(_TEMPORARY):
                continue
            with contextlib.suppress(FileNotFoundError):  # another process may be removing it
                found.append(Entry(path=path, size_bytes=size_bytes(path), used_at=path.stat().st_mtime))
    return sorted(found, key=lambda entry: (entry.used_at, entry.path.name))


def shrink(root: Path, limit_bytes: int, keep: Path) -> list[Entry]:
    """Remove the least recently used entries until the cache is within its limit; never `keep`. Returns what went."""
    held = entries(root)
    total = sum(entry.size_bytes for entry in held)
    gone = []
    for entry in held:
        if total <= limit_bytes:
            break
        if entry.path == keep:
            continue
        _remove(entry.path)
        total -= entry.size_bytes
        gone.append(entry)
    return gone


def note_export(made: Path, about: bytes) -> None:
    """Write what is to be known of a finished export (JSON) beside its files, with their sizes."""
    sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
    (made / EXPORT_NAME).write_bytes(msgspec.json.encode(_Noted(about=msgspec.Raw(about), sizes_bytes=sizes)))


def find_export(path: Path) -> bytes | None:
    """What is noted of a whole export at `path`, which now counts as just used; None if there is none.

    An export is whole if all its files have the sizes they had when it was made.
    """
    try:
        noted = msgspec.json.decode((path / EXPORT_NAME).read_bytes(), type=_Noted)
        if any((path / name).stat().st_size != size for name, size in noted.sizes_bytes.items()):
            return None
    except (OSError, msgspec.DecodeError):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return bytes(noted.about)


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())


def _remove(path: Path) -> None:
    """Remove an entry so that no half of it is ever taken for a whole one."""
    if path.is_dir():
        for name in (MANIFEST_NAME, EXPORT_NAME):
            (path / name).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
