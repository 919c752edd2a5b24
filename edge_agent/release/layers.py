"""Layers: archives of plain files that are unpacked under their digest, whole or not at all."""

from __future__ import annotations

import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from broker_config import files
from edge_agent.release.errors import LayerDamaged, SystemFailed
from edge_agent.release.manifest import Layer

BLOCK_BYTES = 1 << 20
UNFINISHED = ".tmp-"


def unpack(archive: Path, layer: Layer, store: Path, progress: Callable[[int], None] = lambda _: None) -> Path:
    """Unpack an archive into store/SHA256, unless it is there. progress: called with the bytes unpacked by now.

    Raises LayerDamaged for an archive that isn't the layer, or that holds anything but files and folders below its
    root; SystemFailed if it can't be read or written. Then nothing of it is left.
    """
    target = store / layer.sha256
    if target.is_dir():
        return target
    unfinished = store / f"{UNFINISHED}{layer.sha256}"
    try:
        store.mkdir(parents=True, exist_ok=True)
        if files.file_digest(archive) != layer.sha256:
            raise LayerDamaged(f"{archive.name} is not the layer {layer.sha256[:12]}: its digest is another", archive)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o755)
        _extract(archive, layer, unfinished, progress)
        os.sync()
        unfinished.rename(target)
        files.sync(store)
    except OSError as error:
        raise SystemFailed(f"can't unpack {archive.name}: {error.strerror or error}") from None
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError) as error:
        raise LayerDamaged(f"{archive.name} is no archive: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _extract(archive: Path, layer: Layer, target: Path, progress: Callable[[int], None]) -> None:
    done = 0
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            inside = PurePosixPath(member.name)
            if inside.is_absolute() or ".." in inside.parts or not (member.isreg() or member.isdir()):
                raise LayerDamaged(f"{archive.name} holds {member.name!r}, which no layer may hold")
            if done + member.size > layer.unpacked_bytes:
                raise LayerDamaged(f"{archive.name} holds more than the {layer.unpacked_bytes} bytes it is said to")
            path = target / inside
            if member.isdir():
                path.mkdir(mode=0o755, parents=True, exist_ok=True)
                continue
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None  # noqa: S101  (it is a regular file)
            with path.open("xb") as file:
                shutil.copyfileobj(source, file, BLOCK_BYTES)
            path.chmod(0o755 if member.mode & 0o100 else 0o644)
            os.utime(path, (member.mtime, member.mtime))
            done += member.size
            progress(done)
    if done != layer.unpacked_bytes:
        raise LayerDamaged(f"{archive.name} holds {done} bytes, not {layer.unpacked_bytes}")


def forget_others(store: Path, kept: set[str]) -> int:
    """Remove layers that nobody uses and what was left unfinished. Returns how many bytes were freed."""
    freed = 0
    for path in store.iterdir() if store.is_dir() else ():
        if path.name not in kept:
            freed += sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
            shutil.rmtree(path, ignore_errors=True)
    return freed


def write_whole(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace a file in one step; the old one or the new one is there after a power cut. Raises OSError."""
    files.write_whole(path, content, mode)
    files.sync(path.parent)
