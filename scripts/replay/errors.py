"""The errors of replays, one tree.

ReplayError
├── SettingInvalid     what is to be replayed can't be, by file and field
├── ScheduleInvalid    a file of questions can't be used, by file and line
└── ResultInvalid      a file is no result of a replay
"""

from __future__ import annotations

from pathlib import Path


class ReplayError(Exception):
    """Root of all errors of this package. str() is one line, fit for a person."""


class SettingInvalid(ReplayError):
    """What is to be replayed can't be."""


class ScheduleInvalid(ReplayError):
    """A file of questions can't be used. `line` counts from 1, 0 if the whole file is meant."""

    def __init__(self, path: Path, line: int, why: str) -> None:
        super().__init__(f"{path}, line {line}: {why}" if line else f"{path}: {why}")


class ResultInvalid(ReplayError):
    """A file is no result of a replay."""
