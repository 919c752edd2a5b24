"""The question sets that lie beside the repository, for tests that read real files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "KVBUS_DATA"


def shared_data() -> Path:
    """$KVBUS_DATA, or `../shared/data` beside the repository; skips the test where there is neither."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get(VARIABLE) or beside)
    if not (path / "squad.jsonl").is_file():
        pytest.skip(f"no question sets in {path}; set {VARIABLE} to the directory that holds squad.jsonl")
    return path
