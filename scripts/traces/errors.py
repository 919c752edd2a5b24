"""The errors of traces, one tree.

TraceError
└── TraceInvalid       a file can't be used as a trace; names the file and the line
"""

from __future__ import annotations

from pathlib import Path


class TraceError(Exception):
    """Root of all errors of this package. str() is one line, fit for a person."""


class TraceInvalid(TraceError):
    """A trace file can't be used. `line` counts from 1, 0 if the whole file is meant."""

    def __init__(self, path: Path, line: int, why: str) -> None:
        super().__init__(f"{path}, line {line}: {why}" if line else f"{path}: {why}")
        self.path, self.line, self.why = path, line, why
