"""Files that are there whole or not at all. Standard library only: the installer of devices carries this module."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_alone = threading.local()


def write_whole(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace a file in one step, readable by its owner alone unless mode says otherwise: others see the old one or the
    new one, and a crash leaves one of them. Its folder is made if it is missing. Raises OSError; what was there is
    there still.
    """
    with ready_to_replace(path, content, mode):
        pass


@contextmanager
def ready_to_replace(path: Path, content: bytes, mode: int = 0o600) -> Iterator[None]:
    """The same in two steps: the content is on the disk when the block begins, and in its place when it has ended well,
    for which no room is needed any more. Raises OSError.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            unfinished = Path(file.name)
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield
        unfinished.replace(path)
    finally:
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until nobody else is between reading a folder's files and replacing them; the lock ends with its process.
    The folder is made if it is missing. Whoever is alone in it already may enter again. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        inside: set[tuple[int, int]] = _alone.__dict__.setdefault("inside", set())
        found = os.fstat(number)
        key = (found.st_dev, found.st_ino)
        if key in inside:
            yield
            return
        fcntl.flock(number, fcntl.LOCK_EX)
        inside.add(key)
        try:
            yield
        finally:
            inside.discard(key)
    finally:
        os.close(number)


def sync(path: Path) -> None:
    """So that what a file holds, or the names in a folder, are there after a power cut. Raises OSError."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
