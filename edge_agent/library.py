"""The contexts an agent is given: files in a folder, and texts published to it; each tokenized, held and prefilled."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import tempfile
from pathlib import Path

from broker_config.messages.base import Name
from edge_agent.engine import Engine
from edge_agent.errors import AgentError
from edge_agent.memory import ContextStore, Held

log = logging.getLogger(__name__)

SUFFIXES = (".txt", ".md")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_TEXT_BYTES = 262_144
BACKGROUND = "~contexts"
"""The asker in whose name contexts are prefilled ahead of any question."""


class Library:
    """Contexts in, caches made in the background, files followed as they change."""

    def __init__(self, *, engine: Engine, store: ContextStore, folder: Path | None) -> None:
        self._engine, self._store, self._folder = engine, store, folder
        self._seen: dict[str, tuple[int, int]] = {}
        self._to_prefill: asyncio.Queue[str] = asyncio.Queue()

    def add(self, name: str, text: str) -> Held:
        """Hold a text under a name, and keep it in the folder if there is one. Raises AgentError."""
        held = self._hold(name, text)
        if self._folder is not None:
            path = self._path(name)
            _write(path, text)
            self._seen[path.name] = _stamp(path)
        return held

    def remove(self, name: str) -> None:
        """Forget a context, its file too. Raises ContextUnknown."""
        self._store.remove(name)
        if self._folder is not None:
            for path in [self._folder / f"{name}{suffix}" for suffix in SUFFIXES]:
                path.unlink(missing_ok=True)
                self._seen.pop(path.name, None)

    def scan(self) -> None:
        """Take in new and changed files of the folder, forget removed ones. What can't be taken is logged, once."""
        if self._folder is None:
            return
        files = {path.name: path for path in sorted(self._folder.glob("*")) if path.suffix in SUFFIXES}
        for file in [file for file in self._seen if file not in files]:
            del self._seen[file]
            if Path(file).stem in self._store.names():
                self._store.remove(Path(file).stem)
        for file, path in files.items():
            try:
                stamp = _stamp(path)
                if self._seen.get(file) == stamp:
                    continue
                self._seen[file] = stamp
                self._hold(path.stem, _read(path))
            except (AgentError, OSError, UnicodeDecodeError) as error:
                log.error("%s is not taken in: %s", path, error)

    async def prefill(self) -> None:
        """Make caches for ever, one context after another, as they are taken in."""
        while True:
            name = await self._to_prefill.get()
            held = self._store.by_name(name)
            if held is None or self._store.cache(held.context_id) is not None:
                continue
            try:
                with self._store.pinned(held.context_id):
                    cache, seconds = await self._engine.prefill_context(list(held.ids), BACKGROUND)
                    out = self._store.put(held.context_id, cache)
            except AgentError as error:
                log.warning("%s is held as text only: %s", name, error)
                continue
            log.info("%s: %d tokens cached in %.2f s, %d other caches put out", name, len(held.ids), seconds, len(out))

    def _hold(self, name: str, text: str) -> Held:
        if not NAME_PATTERN.fullmatch(name):
            raise AgentError(f"{name!r} can't be a context's name: letters, digits, '.', '_' and '-', at most 64")
        ids = self._engine.text.context_ids(text)
        self._engine.check_fits(len(ids))
        held = self._store.add(name, self._engine.text.context_id(ids), tuple(ids))
        self._to_prefill.put_nowait(name)
        return held

    def _path(self, name: Name) -> Path:
        folder = self._folder or Path()
        return next((path for s in SUFFIXES if (path := folder / f"{name}{s}").exists()), folder / f"{name}.txt")


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise AgentError(f"{path.stat().st_size:,} bytes, more than a context may have ({MAX_TEXT_BYTES:,})")
    return path.read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(path)
    except OSError as error:
        raise AgentError(f"{path} can't be written: {error.strerror}") from None
