"""`python -m scripts.bench.runtime.worker`: one loaded model that answers commands, a JSON object a line.

{"do": "load", "engine": …, "path": …, "threads": …, "room": …, "ids": […]}   seconds from construction to ready
{"do": "prefill", "tokens": 512}                                             seconds
{"do": "decode", "past": 512, "tokens": 16}                                  seconds a token, the median
{"do": "mass", "tokens": 512}                                                seconds of a prefill and attention mass
{"do": "memory"}                                                             the process's peak resident bytes
{"do": "quantize", "path": …, "target": …, "threads": …}                      seconds (llama.cpp, to Q8_0)

Each is answered by {"value": …} or {"failed": "one line"}; a load also says the runtime's "version". Between commands
the process waits for its input and computes nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from scripts.bench.runtime.engines import ENGINES, NEEDS, Engine, Watching, quantize_q8


class Worker:
    """The commands. Token ids are those of `load`, from the first on."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._ids: list[int] = []
        self._held = 0

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command; the answer's fields."""
        terms = dict(command)
        verbs: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self.load,
            "prefill": self.prefill,
            "decode": self.decode,
            "mass": self.mass,
            "memory": self.memory,
            "quantize": self.quantize,
        }
        return verbs[terms.pop("do")](**terms)

    def load(self, *, engine: str, path: str, threads: int, room: int, ids: list[int]) -> dict[str, Any]:
        """Load a model; what it imports is not counted."""
        module, package = NEEDS[engine]
        importlib.import_module(module)
        start = time.perf_counter()
        self._engine = ENGINES[engine](path, threads, room)
        seconds = time.perf_counter() - start
        self._ids = ids
        return {"value": seconds, "version": f"{package} {metadata.version(package)}"}

    def prefill(self, *, tokens: int) -> dict[str, Any]:
        """Read the first `tokens` ids in an empty context."""
        engine = self._loaded()
        engine.clear()
        seconds = _seconds(lambda: engine.read(self._ids[:tokens]))
        self._held = tokens
        return {"value": seconds}

    def decode(self, *, past: int, tokens: int) -> dict[str, Any]:
        """Read `tokens` ids one by one after `past` others, which a prefill just before has read already."""
        engine = self._loaded()
        if self._held != past:
            self.prefill(tokens=past)
        self._held = -1
        following = self._ids[past : past + tokens]
        return {"value": statistics.median(_seconds(partial(engine.read, [one])) for one in following)}

    def mass(self, *, tokens: int) -> dict[str, Any]:
        """Read like `prefill`, and compute what the last queries attend to."""
        engine = self._loaded()
        if not isinstance(engine, Watching):
            raise TypeError("this runtime does not give its attention")
        engine.clear()
        self._held = -1
        return {"value": _seconds(lambda: engine.read_watched(self._ids[:tokens]))}

    def memory(self) -> dict[str, Any]:
        """The most that this process has had in memory."""
        return {"value": peak_bytes()}

    def quantize(self, *, path: str, target: str, threads: int) -> dict[str, Any]:
        """Write a Q8_0 GGUF file."""
        return {"value": _seconds(lambda: quantize_q8(path, target, threads))}

    def _loaded(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("nothing is loaded")
        return self._engine


def peak_bytes() -> int:
    """Peak resident memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count what the parent had when it started us
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _own_output() -> TextIO:
    """Standard output for answers alone: what a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def main() -> None:
    """Answer until the input ends."""
    answers, worker = _own_output(), Worker()
    for line in sys.stdin:
        try:
            found = worker.do(json.loads(line))
        except Exception as error:  # noqa: BLE001 a peer may raise anything, and the parent says it in one line
            found = {"failed": _reason(error)}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
