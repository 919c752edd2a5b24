"""What was learned, in one JSON file of the state folder, so that a coordinator that starts begins with it.

Nothing here fails a round: a file that can't be used, or can't be written, is one warning. One that can't be used stays
where it is until there is something to write; then it is set aside under another name.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import structlog
from msgspec import Struct

from coordinator.learning import Learned, Learning

log = structlog.get_logger()

VERSION = 1
KEEP_INTERVAL_S = 5.0
"""Written at most so often: what a crash can lose."""
LARGEST_BYTES = 4_000_000
"""Several times what the bounds of `Learned` allow."""


class _Header(Struct, frozen=True, kw_only=True):
    kvbus_learned: int
    """The version of what follows."""


class _File(_Header, frozen=True, kw_only=True):
    learned: Learned


class Keeper:
    """The file of one site. `learned` is what was found in it; nothing, if it was not there or can't be used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._spoilt = False
        self._troubled = False
        self._kept_rounds = 0
        self._next_s = 0.0
        self.learned = self._read()

    def keep(self, learning: Learning, now_s: float) -> None:
        """Write what was learned, if it has changed and the last time is a while ago. Never raises."""
        if now_s >= self._next_s:
            self._next_s = now_s + KEEP_INTERVAL_S
            self.close(learning)

    def close(self, learning: Learning) -> None:
        """Write it, however lately it was written, if it has changed. Never raises."""
        if learning.rounds == self._kept_rounds:
            return
        try:
            self._write(msgspec.json.encode(_File(kvbus_learned=VERSION, learned=learning.learned)))
        except OSError as error:
            if not self._troubled:
                log.warning("what was learned can't be kept", file=str(self._path), error=error.strerror or str(error))
            self._troubled = True
        else:
            self._troubled, self._kept_rounds = False, learning.rounds

    def _write(self, data: bytes) -> None:
        new = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(data)
            if self._spoilt:
                self._path.replace(self._path.with_suffix(".unusable"))
                self._spoilt = False
            new.replace(self._path)
        except OSError:
            _remove(new)
            raise

    def _read(self) -> Learned:
        try:
            with self._path.open("rb") as file:
                data = file.read(LARGEST_BYTES + 1)
            return _decoded(data)
        except FileNotFoundError:
            return Learned()
        except OSError as error:
            why = error.strerror or str(error)
        except (ValueError, RecursionError) as error:  # msgspec's are ValueErrors
            why = str(error)
        self._spoilt = True
        log.warning("what was learned can't be used: learning begins afresh", file=str(self._path), error=why)
        return Learned()


def _decoded(data: bytes) -> Learned:
    """Raises ValueError or RecursionError, whose line says what is wrong."""
    if len(data) > LARGEST_BYTES:
        raise ValueError(f"longer than {LARGEST_BYTES} bytes")
    version = msgspec.json.decode(data, type=_Header).kvbus_learned
    if version != VERSION:
        raise ValueError(f"of version {version}, this coordinator knows {VERSION}")
    return msgspec.json.decode(data, type=_File).learned


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        return  # it was not written, or nothing can be done
