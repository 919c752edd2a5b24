"""What a worker runs: one class a runtime, each with the same two verbs.

A worker may run under an interpreter that has a peer and no kvbus: nothing but the standard library is imported here
until an engine is asked for, and a peer's engine then imports numpy and the peer alone.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

LLAMA_UBATCH, LLAMA_BATCH = 512, 2048
LLAMA_CONTEXT_STEP = 256
"""llama.cpp rounds a context's size up to a multiple of this."""


class Engine(Protocol):
    """A loaded model and one context."""

    def __init__(self, path: str, threads: int, room: int) -> None:
        """Load what lies at `path`; room: tokens a context must hold."""

    def clear(self) -> None:
        """Forget what was read."""

    def read(self, ids: Sequence[int]) -> None:
        """Read ids after what was read, until the logits after the last are there."""


@runtime_checkable
class Watching(Protocol):
    """An engine that can say what the last tokens attended to."""

    def read_watched(self, ids: Sequence[int]) -> None:
        """Like `Engine.read`, and compute the attention mass."""


class Ours:
    """A bundle as an agent runs it."""

    def __init__(self, path: str, threads: int, room: int) -> None:
        from edge_agent.model.session import Model, Runtime  # noqa: PLC0415

        self._model = Model(Path(path), Runtime(threads=threads))
        self._room = room
        self.clear()

    def clear(self) -> None:
        self._live = self._model.new_context(capacity=self._room)

    def read(self, ids: Sequence[int]) -> None:
        import numpy as np  # noqa: PLC0415

        if len(ids) == 1:  # as an answer is generated
            self._live.step(np.array(ids, dtype=np.int32), logits="last")
        else:
            self._live.prefill(ids)

    def read_watched(self, ids: Sequence[int]) -> None:
        self._live.prefill(ids, queries=True)
        self._live.attention_mass()


class OptimumExport:
    """The graph as optimum exports it: the prompt in one run, the past as arrays that grow."""

    def __init__(self, path: str, threads: int, room: int) -> None:
        import numpy as np  # noqa: PLC0415
        import onnxruntime as ort  # noqa: PLC0415

        del room  # its past grows as it must
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.add_session_config_entry("session.force_spinning_stop", "1")  # another's turn comes after the run
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        nodes = {node.name: node for node in self._session.get_inputs()}
        self._takes_positions = "position_ids" in nodes
        self._empty: dict[str, Any] = {
            name: np.zeros((1, node.shape[1], 0, node.shape[3]), dtype=np.float32)
            for name, node in nodes.items()
            if name.startswith("past_key_values.")
        }
        self._outputs = [name.replace("past_key_values.", "present.") for name in self._empty]
        self.clear()

    def clear(self) -> None:
        self._past, self._entries = self._empty, 0

    def read(self, ids: Sequence[int]) -> None:
        import numpy as np  # noqa: PLC0415

        after = self._entries + len(ids)
        feeds = {"input_ids": np.array([ids], dtype=np.int64), "attention_mask": np.ones((1, after), dtype=np.int64)}
        if self._takes_positions:
            feeds["position_ids"] = np.arange(self._entries, after, dtype=np.int64)[None]
        _, *grown = self._session.run(["logits", *self._outputs], feeds | self._past)
        self._past, self._entries = dict(zip(self._empty, grown, strict=True)), after


class LlamaCpp:
    """A GGUF file under llama.cpp with flash attention."""

    def __init__(self, path: str, threads: int, room: int) -> None:
        llama_cpp = importlib.import_module("llama_cpp")
        self._llama = llama_cpp.Llama(
            path,
            n_ctx=-(-room // LLAMA_CONTEXT_STEP) * LLAMA_CONTEXT_STEP,
            n_batch=LLAMA_BATCH,
            n_ubatch=LLAMA_UBATCH,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            verbose=False,
        )
        self._synchronize = llama_cpp.llama_synchronize

    def clear(self) -> None:
        self._llama.reset()

    def read(self, ids: Sequence[int]) -> None:
        self._llama.eval(ids)
        self._synchronize(self._llama.ctx)


class Genai:
    """A folder made by onnxruntime-genai's own builder."""

    def __init__(self, path: str, threads: int, room: int) -> None:
        self._og = importlib.import_module("onnxruntime_genai")
        options = {"intra_op_num_threads": threads, "session.force_spinning_stop": "1"}
        config = self._og.Config(path)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = self._og.Model(config)
        self._room = room
        self.clear()

    def clear(self) -> None:
        parameters = self._og.GeneratorParams(self._model)
        # No end-of-sequence token of the prompt may end it.
        parameters.set_search_options(max_length=self._room, min_length=self._room, do_sample=False)
        self._generator = self._og.Generator(self._model, parameters)

    def read(self, ids: Sequence[int]) -> None:
        import numpy as np  # noqa: PLC0415

        self._generator.append_tokens(np.array(ids, dtype=np.int32))


ENGINES: dict[str, type[Engine]] = {"ours": Ours, "optimum": OptimumExport, "llama.cpp": LlamaCpp, "genai": Genai}

NEEDS = {
    "ours": ("edge_agent.model.session", "onnxruntime"),
    "optimum": ("onnxruntime", "onnxruntime"),
    "llama.cpp": ("llama_cpp", "llama-cpp-python"),
    "genai": ("onnxruntime_genai", "onnxruntime-genai"),
}
"""Engine → the module it imports, and the package whose version decides its speed."""


def quantize_q8(path: str, target: str, threads: int) -> None:
    """Write a GGUF file's weights as Q8_0, with llama.cpp's own quantizer. Raises OSError."""
    llama_cpp = importlib.import_module("llama_cpp")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    parameters.allow_requantize = True
    parameters.nthread = threads
    if llama_cpp.llama_model_quantize(path.encode(), target.encode(), parameters):
        raise OSError(f"llama.cpp can't quantize {Path(path).name}")
