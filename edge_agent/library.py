"""The contexts an agent is given: files in a folder, and texts published to it; each tokenized, held and prefilled."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path

from broker_config.files import write_whole
from broker_config.messages.base import Name
from edge_agent.engine import Engine
from edge_agent.errors import AgentError
from edge_agent.memory import ContextStore, Held, rung_of

log = logging.getLogger(__name__)

SUFFIXES = (".txt", ".md")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_TEXT_BYTES = 262_144
BACKGROUND = "~contexts"
"""The asker in whose name contexts are prefilled ahead of any question."""

Stamp = tuple[int, int]
"""Of a file: time of its last change in ns, and size. Another stamp means another content."""


class Library:
    """Contexts in, caches made in the background, files followed as they change."""

    def __init__(self, *, engine: Engine, store: ContextStore, folder: Path | None) -> None:
        self._engine, self._store, self._folder = engine, store, folder
        self._seen: dict[str, Stamp] = {}
        self._to_prefill: asyncio.Queue[str] = asyncio.Queue()
        self._changing = asyncio.Lock()

    async def add(self, name: str, text: str) -> Held:
        """Hold a text under a name, and keep it in the folder if there is one. Raises AgentError; nothing changes then.

        Tokenizing and writing are done in a thread; the store is touched in the loop alone.
        """
        async with self._changing:
            ids = await asyncio.to_thread(self._ids, name, text)
            if self._folder is not None:
                path = self._path(name)
                self._seen[path.name] = await asyncio.to_thread(_write, path, text)
            return self._hold(name, ids)

    async def remove(self, name: str) -> None:
        """Forget a context, its file too. Raises ContextUnknown, AgentError for a file that can't be removed."""
        async with self._changing:
            self._store.remove(name)
            if self._folder is not None:
                for path in [self._folder / f"{name}{suffix}" for suffix in SUFFIXES]:
                    _unlink(path)
                    self._seen.pop(path.name, None)

    async def scan(self) -> None:
        """Take in new and changed files of the folder, forget removed ones. What can't be taken is logged, once."""
        if self._folder is None:
            return
        async with self._changing:
            files = await asyncio.to_thread(_stamps, self._folder)
            for file in [file for file in self._seen if file not in files]:
                self._forget(Path(file).stem)
            for file, stamp in files.items():
                if self._seen.get(file) == stamp:
                    continue
                self._seen[file] = stamp
                path = self._folder / file
                try:
                    self._hold(path.stem, await asyncio.to_thread(self._read_ids, path))
                except (AgentError, OSError, UnicodeDecodeError) as error:
                    log.error("%s is not taken in: %s", path, error)

    async def prefill(self) -> None:
        """Make caches for ever, one context after another, as they are taken in."""
        while True:
            name = await self._to_prefill.get()
            held = self._store.by_name(name)
            if held is None or self._store.rung(held.context_id) is not None:
                continue
            try:
                with self._store.pinned(held.context_id):
                    cache, seconds = await self._engine.prefill_context(list(held.ids), BACKGROUND, mass=True)
                    kept = await self._store.put(held.context_id, cache)
            except AgentError as error:
                log.warning("%s is held as text only: %s", name, error)
                continue
            log.info("%s: %d tokens cached in %.2f s at %s", name, len(held.ids), seconds, rung_of(kept))

    def _ids(self, name: str, text: str) -> list[int]:
        """The ids of a text that can be held under this name. Raises AgentError."""
        if not NAME_PATTERN.fullmatch(name):
            raise AgentError(f"{name!r} can't be a context's name: letters, digits, '.', '_' and '-', at most 64")
        ids = self._engine.text.context_ids(text)
        self._engine.check_fits(len(ids))
        return ids

    def _read_ids(self, path: Path) -> list[int]:
        return self._ids(path.stem, _read(path))

    def _hold(self, name: str, ids: list[int]) -> Held:
        held = self._store.add(name, self._engine.text.context_id(ids), tuple(ids))
        self._to_prefill.put_nowait(name)
        return held

    def _forget(self, name: str) -> None:
        """A file is gone; another one of the same name (of the other suffix) is taken in again."""
        if name in self._store.names():
            self._store.remove(name)
        for suffix in SUFFIXES:
            self._seen.pop(f"{name}{suffix}", None)

    def _path(self, name: Name) -> Path:
        folder = self._folder or Path()
        return next((path for s in SUFFIXES if (path := folder / f"{name}{s}").exists()), folder / f"{name}.txt")


def _stamps(folder: Path) -> dict[str, Stamp]:
    """The folder's texts; of a file that can't be looked at (a link to nowhere) the stamp is always the same."""
    found = {}
    for path in sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES):
        try:
            found[path.name] = _stamp(path)
        except OSError:
            found[path.name] = (0, 0)
    return found


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise AgentError(f"{path.stat().st_size:,} bytes, more than a context may have ({MAX_TEXT_BYTES:,})")
    return path.read_text(encoding="utf-8")


def _write(path: Path, text: str) -> Stamp:
    """Whole or not at all."""
    try:
        write_whole(path, text.encode())
        return _stamp(path)
    except OSError as error:
        raise AgentError(f"{path} can't be written: {error.strerror}") from None


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise AgentError(f"{path} can't be removed: {error.strerror}") from None
