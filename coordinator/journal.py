"""What a coordinator must remember across a crash: the questions it has taken, and those that have their end.

One JSON object a line, appended: {"began": …} when a question is taken, {"ended": id} when it has its end. A last line
that was cut short by a crash is ignored. Ended ones are remembered for a while, since a broker may deliver a question
again to the coordinator that comes next.
"""

from __future__ import annotations

import os
from collections import deque
from io import FileIO
from pathlib import Path

import msgspec
from msgspec import Struct

from broker_config.messages import Ask
from coordinator.errors import JournalUnwritable

COMPACT_BYTES = 1_000_000
ENDED_KEPT = 256


class InFlight(Struct, frozen=True, kw_only=True):
    """A question that was taken, and the agents that have orders for it."""

    ask: Ask
    agents: tuple[str, ...]


class _Line(Struct, frozen=True, kw_only=True, omit_defaults=True):
    began: InFlight | None = None
    ended: str | None = None


class Journal:
    """Opens (and compacts) the file. `left_over` are the questions that an earlier coordinator did not end.

    `known_ended` are the ids of the last ENDED_KEPT that have their end.
    """

    def __init__(self, path: Path, compact_bytes: int = COMPACT_BYTES) -> None:
        self._path, self._compact_bytes = path, compact_bytes
        self.left_over, ended = _read(path)
        self._ended = deque(ended, maxlen=ENDED_KEPT)
        self._open = {entry.ask.request: entry for entry in self.left_over}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._compacted()
        except OSError as error:
            raise JournalUnwritable(f"journal {path} can't be written: {error.strerror}") from None

    def began(self, entry: InFlight) -> None:
        """Before any order goes out. Raises JournalUnwritable."""
        self._append(_Line(began=entry))
        self._open[entry.ask.request] = entry

    def ended(self, request: str) -> None:
        """After the end was told. Raises JournalUnwritable."""
        self._append(_Line(ended=request))
        self._open.pop(request, None)
        self._ended.append(request)

    @property
    def known_ended(self) -> tuple[str, ...]:
        return tuple(self._ended)

    def close(self) -> None:
        self._file.close()

    def _append(self, line: _Line) -> None:
        data = _encode(line)
        try:
            at = self._size()
            if at > self._compact_bytes:
                self._file, old = self._compacted(), self._file
                old.close()
                at = self._size()
                self._compact_bytes = max(self._compact_bytes, 2 * at)  # many are open: not at every line
            if self._file.write(data) == len(data):
                return
            problem = "disk full"
        except OSError as error:
            problem = error.strerror or str(error)
        os.ftruncate(self._file.fileno(), at)  # half a line would spoil the next one
        raise JournalUnwritable(f"journal {self._path} can't be written: {problem}")

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _compacted(self) -> FileIO:
        """A new file, in the place of the old one: the open questions and the ids of the last that ended."""
        lines = [_Line(ended=request) for request in self._ended] + [
            _Line(began=entry) for entry in self._open.values()
        ]
        compact = self._path.with_suffix(".new")
        compact.write_bytes(b"".join(map(_encode, lines)))
        compact.replace(self._path)
        return self._path.open("ab", buffering=0)


def _encode(line: _Line) -> bytes:
    return msgspec.json.encode(line) + b"\n"


def _read(path: Path) -> tuple[tuple[InFlight, ...], list[str]]:
    """The open questions, and the ids of ended ones, oldest first."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return (), []
    except OSError as error:
        raise JournalUnwritable(f"journal {path} can't be read: {error.strerror}") from None
    open_: dict[str, InFlight] = {}
    ended: list[str] = []
    for row in raw.split(b"\n"):
        try:
            line = msgspec.json.decode(row, type=_Line)
        except (ValueError, RecursionError):  # msgspec.DecodeError, UnicodeDecodeError
            continue  # cut short by a crash
        if line.began:
            open_[line.began.ask.request] = line.began
        if line.ended:
            open_.pop(line.ended, None)
            ended.append(line.ended)
    return tuple(open_.values()), ended
