"""Where a report comes from: the machine and the versions that made it."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata


def machine() -> dict[str, str]:
    """This machine's system, processor and Python."""
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "python": platform.python_version(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of installed packages, without importing them; "none" for what is not installed."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
