"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file in one step, readable by its owner alone: others see the old one or the new one, and a crash
    leaves one of them. Its folder is made if it is missing. Raises OSError; what was there is there still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            unfinished = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)
