"""Progress of a run that takes minutes: a bar on a terminal, elsewhere a line whenever a tenth is done."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Steps:
    """Steps of known number after some of unknown length."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        self._console = console
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("", total=None)
        self._done, self._total = 0, 0

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def title(self, text: str) -> None:
        """Something of unknown length begins."""
        self._bar.update(self._task, description=text)
        if not self._console.is_terminal:
            self._console.print(f"  {text}", markup=False)

    def expect(self, total: int) -> None:
        """From now on so many steps."""
        self._total = total
        self._bar.update(self._task, completed=0, total=total)

    def next(self, text: str) -> None:
        """A step begins, and the one before it is done."""
        self._bar.update(self._task, description=text, completed=self._done)
        if not self._console.is_terminal and 10 * self._done // self._total != 10 * (self._done - 1) // self._total:
            self._console.print(f"  step {self._done + 1} of {self._total}: {text}", markup=False)
        self._done += 1
