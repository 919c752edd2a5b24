"""Stages of a preparation: who hears of them, and how long each took."""

from __future__ import annotations

import time


class Progress:
    """Hears of stages as they begin and of steps within one; the default hears and says nothing."""

    def stage(self, title: str) -> None:
        """A stage begins (and the one before it ends)."""

    def step(self, done: int, total: int) -> None:
        """Part of the running stage is done."""

    def note(self, text: str) -> None:
        """Something a person should know."""


class Clock:
    """Hands stages on to a Progress and keeps their seconds."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._stages: list[tuple[str, float]] = []
        self._running: tuple[str, float] | None = None

    def stage(self, title: str) -> None:
        self._end()
        self._running = (title, time.monotonic())
        self.progress.stage(title)

    def stages(self) -> tuple[tuple[str, float], ...]:
        self._end()
        return tuple(self._stages)

    def _end(self) -> None:
        if self._running is not None:
            title, start = self._running
            self._stages.append((title, round(time.monotonic() - start, 3)))
            self._running = None
