"""The parts of a preparation that take gigabytes, in a process of its own: they are given back when it ends.

`python -m scripts.prepare_model.worker JOB` reads a Job, says one JSON event per line on standard output, and writes
everything that its libraries print to standard error. It ends when its standard input closes, so that it never
outlives the process that started it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import msgspec
from msgspec import Struct

from edge_agent.kv.transform import TRANSFORM_FILE
from edge_agent.model.manifest import Prompt
from edge_agent.model.signature import ROTATION_FILE
from scripts.prepare_model.answered import Asked, passage_tokens, question_for
from scripts.prepare_model.architecture import Architecture, describe, leading_ids, refuse_if_unsuitable
from scripts.prepare_model.errors import (
    DiskFull,
    ExportFailed,
    ModelRefused,
    PreparationError,
    is_disk_full,
)
from scripts.prepare_model.export_graph import MODEL_FILE, ExportGraph
from scripts.prepare_model.identity import tokenizer_digest
from scripts.prepare_model.progress import Clock
from scripts.prepare_model.prompt import make_prompt, tokenize
from scripts.prepare_model.weights import Weights

HALF_TRANSFORM_FILE = "transform-half.npz"
"""In an export: fitted to every second passage only. Ladders are measured with it, on the others."""
_CHECK_TOKENS = 160


class ExportJob(Struct, frozen=True, kw_only=True, tag="export"):
    """Export a model and fit its transform. scratch: a directory of the job's own; into: where both go.

    passages: texts to fit to, beside `samples` texts that are drawn from the model itself.
    """

    name: str
    gguf: str | None = None
    directory: str | None = None
    scratch: str
    into: str
    check_text: str
    passages: tuple[str, ...] = ()
    samples: int = 0
    sample_tokens: int = 150
    seed: int = 0


class RewriteJob(Struct, frozen=True, kw_only=True, tag="rewrite"):
    """Make graphs of the wanted weight precisions from the export in `export`, in into/WEIGHTS each.

    texts: token ids, read to see what flows through the graph.
    """

    scratch: str
    export: str
    into: str
    architecture: Architecture
    texts: tuple[tuple[int, ...], ...]
    wanted: tuple[Weights, ...] = tuple(Weights)


Job = ExportJob | RewriteJob


class Exported(Struct, frozen=True, kw_only=True, tag="exported"):
    """What the export found. leading_ids: what the model wants before any text."""

    fingerprint: str
    tokenizer: str
    architecture: Architecture
    check: str
    samples: tuple[str, ...]
    leading_ids: tuple[int, ...] = ()


class Rewritten(Struct, frozen=True, kw_only=True, tag="rewritten"):
    """What the rewrite chose for int8, for a person; empty if that was not wanted."""

    forms: str


Outcome = Exported | Rewritten


class Stage(Struct, frozen=True, kw_only=True, tag="stage"):
    """A stage begins."""

    title: str


class Step(Struct, frozen=True, kw_only=True, tag="step"):
    """So much of the stage is done."""

    done: int
    total: int


class Failed(Struct, frozen=True, kw_only=True, tag="failed"):
    """The worker gave up. kind: the name of the error's class."""

    kind: str
    message: str


Event = Exported | Rewritten | Stage | Step | Failed


def run_worker(job: Job, log: Path, clock: Clock) -> Outcome:
    """Start the worker and follow it to its end. Raises PreparationError; what the libraries said is in `log`."""
    path = Path(job.scratch) / "job.json"
    path.write_bytes(msgspec.json.encode(job))
    environment = {
        **os.environ,
        "TMPDIR": job.scratch,
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # torch's threads would spin against whatever else runs here
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, "-W", "ignore", "-m", "scripts.prepare_model.worker", str(path)]
    with (
        log.open("wb") as log_file,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            env=environment,
            start_new_session=True,
        ) as process,
    ):
        try:
            outcome = _follow(process, clock)
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.kill()
    if isinstance(outcome, Exported | Rewritten):
        return outcome
    raise _as_error(outcome, process.returncode, log, Path(job.scratch))


def _follow(process: subprocess.Popen[bytes], clock: Clock) -> Outcome | Failed | None:
    outcome: Outcome | Failed | None = None
    for line in process.stdout or ():
        event = msgspec.json.decode(line, type=Event)
        if isinstance(event, Stage):
            clock.stage(event.title)
        elif isinstance(event, Step):
            clock.progress.step(event.done, event.total)
        else:
            outcome = event
    return outcome


def _as_error(failed: Failed | None, code: int, log: Path, scratch: Path) -> PreparationError:
    said = log.read_text(errors="replace").strip() if log.exists() else ""
    if failed is None:
        if "no space left on device" in said.lower():
            return DiskFull("the export", scratch)
        why = "was killed (out of memory?)" if code < 0 else f"ended with code {code}"
        return ExportFailed(
            f"the export process {why}; its last words: {said.splitlines()[-1][:200] if said else 'none'}"
        )
    if failed.kind == DiskFull.__name__:
        return DiskFull(failed.message, scratch)
    kinds = {kind.__name__: kind for kind in (ModelRefused, ExportFailed)}
    return kinds.get(failed.kind, PreparationError)(failed.message)


def work(job: Job, say: Callable[[Event], None]) -> Outcome:
    """Do what a job says. Raises PreparationError."""
    return rewrite_all(job, say) if isinstance(job, RewriteJob) else export_model(job, say)


def rewrite_all(job: RewriteJob, say: Callable[[Event], None]) -> Rewritten:
    """The export's graph, rewritten, in the wanted weight precisions. Needs no torch."""
    from scripts.prepare_model.graph import capture, rewrite, storing, weights  # noqa: PLC0415

    say(Stage(title="rewrite the graph"))
    graph = rewrite.read_export(Path(job.export) / MODEL_FILE)
    rewrite.rewrite(graph, job.architecture)
    places = {choice: Path(job.into) / choice / MODEL_FILE for choice in job.wanted}
    shape = job.architecture
    for place in places.values():
        place.parent.mkdir()
        rotation = place.with_name(ROTATION_FILE)
        storing.save_rotation(rotation, head_dim=shape.head_dim, opset=graph.opset)
    if Weights.FP32 in places:
        with graph.kept():
            weights.to_fp32(graph)
            storing.save(graph, places[Weights.FP32])
    if Weights.INT4 in places:
        say(Stage(title="quantize the weights to int4"))
        with graph.kept():
            weights.to_int4(graph)
            storing.save(graph, places[Weights.INT4])
    if Weights.INT8 not in places:
        return Rewritten(forms="")
    say(Stage(title="see what flows through it"))
    samples = capture.capture(graph, Path(job.scratch), job.architecture, job.texts)
    say(Stage(title="quantize the weights to int8"))
    chosen = weights.to_int8(graph, samples)
    storing.save(graph, places[Weights.INT8])
    return Rewritten(forms=weights.forms(chosen))


def export_model(job: ExportJob, say: Callable[[Event], None]) -> Exported:
    """Load, identify, export, check and sample. Raises PreparationError."""
    say(Stage(title="load torch and transformers"))
    import tokenizers  # noqa: PLC0415

    from scripts.prepare_model import export, sensitivity  # noqa: PLC0415

    directory = Path(job.directory) if job.directory else Path(job.scratch) / "source"
    if job.gguf:
        say(Stage(title="unpack the weights"))
        export.from_gguf(Path(job.gguf), directory)
    refuse_if_unsuitable(directory, job.name)
    say(Stage(title="identify the model"))
    model = export.load(directory)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    architecture = describe(model, tokenizer)
    digest = tokenizer_digest(directory / "tokenizer.json")
    leading = leading_ids(directory, tokenizer)
    ids = [*leading, *tokenizer.encode(job.check_text, add_special_tokens=False).ids][:_CHECK_TOKENS]
    export.check_rotation(model, ids, architecture)
    fingerprint = export.fingerprint(model, architecture, digest)
    say(Stage(title="export to ONNX"))
    export.export(directory, Path(job.scratch) / "onnx")
    for path in sorted((Path(job.scratch) / "onnx").glob("model.onnx*")):
        path.rename(Path(job.into) / path.name)
    shutil.copyfile(directory / "tokenizer.json", Path(job.into) / "tokenizer.json")
    say(Stage(title="compare with the source"))
    graph = ExportGraph(Path(job.into) / MODEL_FILE, architecture)
    check = export.check_export(model, graph, ids)
    samples: tuple[str, ...] = ()
    if job.samples:
        say(Stage(title="sample calibration text"))
        drawn = export.sample(
            graph,
            _first_id(model, tokenizer),
            list(architecture.eos_ids),
            count=job.samples,
            tokens=job.sample_tokens,
            seed=job.seed,
        )
        texts = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in drawn)
        samples = tuple(text for text in texts if text)
    passages = [*job.passages, *samples]
    if passages:
        say(Stage(title="fit the transform"))
        prompt = make_prompt(tokenizer, leading)
        followed = sensitivity.Followed(
            model=model,
            architecture=architecture,
            prefix=prompt.prefix_ids,
            ends=_ends(tokenizer, architecture, prompt),
        )
        asked = _asked(passages, tokenizer, architecture, prompt)
        found = followed.fit(asked, lambda done: say(Step(done=done, total=len(passages))))
        for transform, name in zip(found, (TRANSFORM_FILE, HALF_TRANSFORM_FILE), strict=True):
            transform.save(Path(job.into) / name)
    return Exported(
        fingerprint=fingerprint,
        tokenizer=digest,
        architecture=architecture,
        check=str(check),
        samples=samples,
        leading_ids=leading,
    )


def _asked(passages: Sequence[str], tokenizer: Any, shape: Architecture, prompt: Prompt) -> list[Asked]:
    """Passages as contexts, as much of each as fits, with a question each."""
    most = passage_tokens(shape.window_tokens, len(prompt.prefix_ids))
    return [
        Asked(
            context=tokenize(tokenizer, prompt.context_format.replace("{text}", passage))[:most],
            question=tokenize(tokenizer, prompt.question_format.replace("{question}", question_for(index))),
        )
        for index, passage in enumerate(passages)
    ]


def _ends(tokenizer: Any, shape: Architecture, prompt: Prompt) -> frozenset[int]:
    """Tokens that end an answer: by their meaning, or because a stop stands in their text."""
    texts = tokenizer.decode_batch([[token] for token in range(shape.vocabulary)], skip_special_tokens=False)
    stops = (token for token, text in enumerate(texts) if any(stop in text for stop in prompt.stop))
    return frozenset((*shape.eos_ids, *stops))


def _first_id(model: Any, tokenizer: Any) -> int:
    """The id after which a text of the model's own begins."""
    candidates = (tokenizer.token_to_id("<|endoftext|>"), model.config.bos_token_id, model.config.eos_token_id)
    return next((token for token in candidates if isinstance(token, int)), 0)


def _main(path: str) -> int:
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes to the log

    def say(event: Event) -> None:
        _write(events, event)

    job = msgspec.json.decode(Path(path).read_bytes(), type=Job)
    try:
        say(work(job, say))
    except Exception as error:
        if is_disk_full(error):
            say(Failed(kind=DiskFull.__name__, message="the export or the rewritten graphs"))
        elif isinstance(error, PreparationError):
            say(Failed(kind=type(error).__name__, message=str(error)))
        else:
            name = job.name if isinstance(job, ExportJob) else "the rewrite"
            say(Failed(kind=ExportFailed.__name__, message=f"{name}: {type(error).__name__}: {_first_line(error)}"))
        raise
    return 0


def _write(stream: TextIO, event: Event) -> None:
    stream.write(msgspec.json.encode(event).decode() + "\n")
    stream.flush()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
