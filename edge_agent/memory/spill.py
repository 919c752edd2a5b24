"""Caches on disk: one payload a file, written whole or not at all, bounded, checked when it is read again."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import threading
from pathlib import Path

from broker_config.files import write_whole
from edge_agent.errors import PayloadRejected, RecipeInvalid, SpillFailed
from edge_agent.kv.reader import BodyReader, Expectation
from edge_agent.kv.recipe import recipe
from edge_agent.kv.shelved import Shelved, as_payload, from_payload

log = logging.getLogger(__name__)

SUFFIX = ".kvb"
RESERVE_BYTES = 64_000_000
"""Disk that stays free, whatever the limit."""
_NAME = re.compile(r"[0-9a-f]{32}\.kvb")
_HEAD_BYTES = 1 << 16


class Spill:
    """A folder of caches, at most limit_bytes of them; the longest unused make room.

    It is for one agent. What is there when it is opened is taken over if it is of this model in this weight precision;
    everything else of ours is removed. Files of other names are left alone. Safe from several threads. Raises
    SpillFailed if the folder can't be made or read.
    """

    def __init__(self, folder: Path, limit_bytes: int, expectation: Expectation, weight_precision: str) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes
        self._expectation, self._weight_precision = expectation, weight_precision
        self._lock = threading.Lock()
        self._files: dict[str, tuple[str, int]] = {}
        """Context id → rung and bytes, the longest unused first."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._take_over()
            self._make_room(0)
        except OSError as error:
            raise SpillFailed(f"{folder} can't be used for caches: {error.strerror}") from None

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in list(self._files.values()))

    def rung(self, context_id: str) -> str | None:
        """The rung at which a context's cache is on disk; None if it is not."""
        found = self._files.get(context_id)
        return found[0] if found else None

    def write(self, shelved: Shelved) -> None:
        """Keep a cache. Raises SpillFailed; what was there of it is there still."""
        data, context_id = as_payload(shelved), shelved.header.context_id
        with self._lock:
            if len(data) > self._limit_bytes:
                raise SpillFailed(f"{len(data):,} bytes are beyond the {self._limit_bytes:,} for caches on disk")
            self._make_room(len(data), context_id)
            try:
                if shutil.disk_usage(self._folder).free < len(data) + RESERVE_BYTES:
                    raise SpillFailed(f"{self._folder} has no room for a cache of {len(data):,} bytes")
                write_whole(self._path(context_id), data)
            except OSError as error:
                raise SpillFailed(f"{self._path(context_id)} can't be written: {error.strerror}") from None
            self._files.pop(context_id, None)
            self._files[context_id] = (shelved.rung, len(data))

    def read(self, context_id: str) -> Shelved | None:
        """A cache that was kept; None if there is none. One that is damaged is removed, and said so once."""
        with self._lock:
            if context_id not in self._files:
                return None
            path = self._path(context_id)
            try:
                shelved = self._checked(path.read_bytes(), context_id)
                with contextlib.suppress(OSError):  # a disk that can only be read serves, too
                    os.utime(path)
            except (OSError, PayloadRejected) as error:
                log.warning("%s is dropped: %s", path, error)
                self._remove(context_id)
                return None
            self._files[context_id] = self._files.pop(context_id)
            return shelved

    def remove(self, context_id: str) -> None:
        """Forget a cache, if it is there."""
        with self._lock:
            if context_id in self._files:
                self._remove(context_id)

    def _checked(self, data: bytes, context_id: str) -> Shelved:
        shelved = from_payload(data, self._expectation)
        if shelved.header.context_id != context_id:
            raise PayloadRejected("context_id", "is another than the file's name")
        return shelved

    def _make_room(self, size: int, but: str = "") -> None:
        """Remove the longest unused until so many bytes more fit, in the place of what there is of one context."""
        known = self._files.get(but, ("", 0))[1]
        for other in list(self._files):
            if self.nbytes - known + size <= self._limit_bytes:
                return
            if other != but:
                self._remove(other)

    def _path(self, context_id: str) -> Path:
        return self._folder / f"{context_id}{SUFFIX}"

    def _remove(self, context_id: str) -> None:
        self._files.pop(context_id, None)
        try:
            self._path(context_id).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s can't be removed: %s", self._path(context_id), error.strerror)

    def _take_over(self) -> None:
        found = []
        for path in self._folder.iterdir():
            if path.name.startswith(".") and _NAME.match(path.name[1:]):  # a write that its end cut off
                path.unlink(missing_ok=True)
            elif _NAME.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # somebody has just removed it
                    status = path.stat()
                    found.append((status.st_mtime_ns, path, status.st_size))
        for _, path, size in sorted(found):
            context_id = path.name.removesuffix(SUFFIX)
            try:
                self._files[context_id] = (self._rung(path), size)
            except (OSError, PayloadRejected, RecipeInvalid) as error:
                log.warning("%s is dropped: %s", path, error)
                self._remove(context_id)

    def _rung(self, path: Path) -> str:
        """What a file's header says. Raises PayloadRejected for another model's, RecipeInvalid for an unknown rung."""
        reader = BodyReader(self._expectation)
        with path.open("rb") as file:
            while reader.header is None and (data := file.read(_HEAD_BYTES)):
                reader.feed(data)
        header = reader.header
        if header is None:
            raise PayloadRejected("header", "missing")
        made = recipe(header.rung)
        if (made.codec, made.level) != (header.codec, header.level):
            raise PayloadRejected("rung", f"{header.rung} with codec {header.codec} at level {header.level}")
        if header.weight_precision != self._weight_precision:
            raise PayloadRejected("weight_precision", f"{header.weight_precision}, this is {self._weight_precision}")
        return header.rung
