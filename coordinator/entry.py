"""The entry point of the command `coordinator`, which a device's installation has without what it needs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command; say in one line what is missing where only the device's part is installed."""
    try:
        from coordinator.cli import app  # noqa: PLC0415  what it imports is what may be missing
    except ModuleNotFoundError as error:
        sys.exit(f"coordinator: {error.name} is not installed; on a laptop: pip install 'kvbus[coordinator]'")
    app()
