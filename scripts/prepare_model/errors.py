"""The errors of a preparation, one tree.

PreparationError
├── SourceUnavailable      the weights can't be had: no network, no such directory, a damaged download
├── ModelRefused           not a causal language model, or one whose cache could not be moved
├── ExportFailed           the export broke off, or does not compute what its source computes
└── DiskFull               no space left; names what was being written
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path


class PreparationError(Exception):
    """Root of all errors of this package. str() is one line, fit for a person."""


class SourceUnavailable(PreparationError):
    """The weights can't be had."""


class ModelRefused(PreparationError):
    """The model is not one whose cache an agent could move."""


class ExportFailed(PreparationError):
    """The export ended with an error, or what it wrote is not what was to be exported."""


class DiskFull(PreparationError):
    """No space left while something was written."""

    def __init__(self, what: str, where: Path) -> None:
        super().__init__(
            f"disk full while writing {what}: {free_mb(where)} MB free under {where}; "
            "make room, or point KVBUS_CACHE at another disk"
        )
        self.what, self.where = what, where


def free_mb(path: Path) -> int:
    """Free megabytes of the file system that holds `path` (or its nearest parent that exists)."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free // 1_000_000


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one it was raised from, says that the disk or the quota is full.

    Libraries that write from C++ or Rust give no errno, only the sentence.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        if "no space left on device" in str(seen).lower():
            return True
        seen = seen.__cause__ or seen.__context__
    return False
