"""The parent's end of a worker process: asked one thing at a time, and left only once it is idle again."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[3]
WORKER = "scripts.bench.runtime.worker"
ANSWER_S = 900.0
"""A prefill of thousands of tokens by a slow variant on a small device takes minutes; more is a hang."""
IDLE_WITHIN_S, IDLE_STEP_S = 2.0, 0.05
GRACE_S = 5.0


class WorkerFailed(Exception):
    """A worker can't be started, or can't do what it was asked; str() is one line."""


class WorkerEnded(WorkerFailed):
    """A worker ended, or had to be ended, before it answered."""


class Child:
    """One worker process. Leave the block to end it."""

    def __init__(self, python: str, *, answer_s: float = ANSWER_S) -> None:
        self._answer_s = answer_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 closed by close()
        try:
            self._process = subprocess.Popen(
                [python, "-m", WORKER],
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            self._errors.close()
            raise WorkerFailed(f"{Path(python).name} can't be started: {error.strerror}") from None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def ask(self, do: str, **terms: object) -> float:
        """The number that answers a command. Raises WorkerFailed."""
        return float(self.answer(do, **terms)["value"])

    def answer(self, do: str, **terms: object) -> dict[str, Any]:
        """All that answers a command, once the process is idle again. Raises WorkerFailed."""
        assert self._process.stdin is not None  # noqa: S101 they are pipes
        assert self._process.stdout is not None  # noqa: S101
        with contextlib.suppress(BrokenPipeError):  # it has ended: said below
            self._process.stdin.write(json.dumps({"do": do, **terms}) + "\n")
            self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], self._answer_s)
        if not ready:
            self._process.kill()
            raise WorkerEnded(f"no answer to {do} within {self._answer_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerEnded(self._ending())
        found: dict[str, Any] = json.loads(line)
        if "failed" in found:
            raise WorkerFailed(str(found["failed"]))
        self._settle()
        return found

    def close(self) -> None:
        """End the process: its input ends, and it is killed if that is not enough."""
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _settle(self) -> None:
        """Wait until its threads no longer spin, so that the next one's turn is its own."""
        until, before = time.monotonic() + IDLE_WITHIN_S, -1.0
        with contextlib.suppress(psutil.Error):  # it has ended, and the next command will say so
            process = psutil.Process(self._process.pid)
            while (now := _busy_s(process)) != before and time.monotonic() < until:
                before = now
                time.sleep(IDLE_STEP_S)

    def _ending(self) -> str:
        try:
            status = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:  # it gave up its output, but goes on
            self._process.kill()
            status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return f"the worker ended with {how}" + (f": {lines[-1]}" if lines else "")


def _busy_s(process: psutil.Process) -> float:
    """Processor seconds that a process has used."""
    times = process.cpu_times()
    return times.user + times.system
