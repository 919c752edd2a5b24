"""What a person sees of flashing: a line for each host while it goes on, and what came of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from scripts.flash.flasher import Flashed
from scripts.flash.fleet import Ended
from scripts.flash.keeping import Kept
from scripts.provenance import machine, versions

progress = Console(stderr=True, highlight=False, markup=False)


class Shown:
    """One host's line."""

    def __init__(self, bars: Progress, name: str) -> None:
        self.bars, self._name, self._text = bars, name, ""
        self._task: TaskID = bars.add_task(f"{name}: begins", total=None)

    def say(self, text: str, share: float | None) -> None:
        """What is being done."""
        if not self.bars.console.is_terminal and text != self._text:
            self.bars.console.print(f"{self._name}: {text}")
        self._text = text
        self.bars.update(
            self._task, description=f"{self._name}: {text}", total=None if share is None else 1.0, completed=share or 0
        )

    def bytes(self, what: str, done: int, total: int) -> None:
        """The same, of a bundle being built."""
        self.say(f"building: {what}", done / total if total else None)

    def end(self, text: str) -> None:
        """It is done."""
        self.say(text, 1.0)


def bars() -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), TimeElapsedColumn())
    return Progress(*columns, console=progress, disable=not progress.is_terminal)


def lines_of(ended: Ended[Flashed]) -> list[str]:
    if ended.error is not None:
        return [str(ended.error)]
    if ended.result is None:
        return [f"{ended.host}: not begun, since another failed"]
    flashed = ended.result
    if flashed.proof is None:
        return [f"{ended.host}:", *(f"  {line}" for line in flashed.plan)]
    proof = flashed.proof
    change = f"sent {flashed.sent_bytes / 1e6:.1f} MB" if flashed.changed else "was there already"
    rates = f"prefill {proof.prefill_tps:.0f} and decode {proof.decode_tps:.0f} tokens/s"
    runs = f"agent {flashed.agent} runs {flashed.release} ({change}, {flashed.seconds:.0f} s)"
    return [f"{ended.host}: {runs}; it answered in {proof.first_token_s:.2f} s, {rates}"]


def plain(ended: Ended[Any]) -> dict[str, Any]:
    return {
        "host": ended.host,
        "error": str(ended.error) if ended.error else None,
        "result": msgspec.to_builtins(ended.result) if ended.result else None,
    }


def write(path: Path | None, content: dict[str, Any]) -> None:
    if path is None:
        return
    whole = {
        "command": sys.argv,
        "machine": machine(),
        "versions": versions(("kvbus", "fabric", "paramiko")),
        **content,
    }
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(whole)) + b"\n")
    except OSError as error:
        fail(error)


def exit_by(ended: tuple[Ended[Any], ...], *, say: bool = False) -> None:
    failed = [each for each in ended if each.result is None]
    if say:
        for each in failed:
            typer.echo(f"flash: {each.error}", err=True)
    if failed:
        raise typer.Exit(1)


def fail(error: Exception) -> NoReturn:
    typer.echo(f"flash: {error}", err=True)
    raise typer.Exit(1) from None


def line_of(ended: Ended[Kept]) -> str:
    return f"{ended.host}: {ended.result.text}" if ended.result else str(ended.error)
