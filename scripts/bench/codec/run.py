"""The codec on a real cache: seconds to encode and decode, beside the prefill that they save and plain peers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from msgspec import Struct

from edge_agent.kv.recipe import recipe
from edge_agent.model.session import Model, Runtime
from edge_agent.model.text import Text
from scripts import relay
from scripts.bench.measure import Timed, in_turn

TOKENS = 512
RUNGS = tuple(
    recipe(name)
    for name in ("float32", "fp16", "q8", "q4", "qkvcomm-6", "klt0", "klt2", "klt4", "klt5", "klt6", "klt8")
)


class CodecRow(Struct, frozen=True, kw_only=True):
    """One rung. share_of_prefill: encode plus decode over the prefill of the same tokens, in the same run."""

    name: str
    bits_per_element: float
    encode: Timed
    decode: Timed
    share_of_prefill: float


class CodecBench(Struct, frozen=True, kw_only=True):
    """tokens and threads of the model run; cache_mb is the float32 cache."""

    tokens: int
    threads: int
    cache_mb: float
    prefill: Timed
    rows: tuple[CodecRow, ...]


def codec_bench(bundle: Path, texts: list[str], *, threads: int, repeats: int) -> CodecBench:
    """Encode and decode of TOKENS tokens of real text at each of RUNGS, and a peer."""
    runtime = Runtime(threads=threads)
    runtime.share_with_numpy()
    model = Model(bundle, runtime)
    text = Text(bundle, model.manifest)
    ids = text.ids(" ".join(texts))[:TOKENS]
    prefix = relay.after_prefix(model)
    cache = relay.read_context(prefix, ids)
    made = {rung.name: relay.sent(model, cache, rung) for rung in RUNGS}
    halves = [array.astype(np.float16) for layer in cache.layers for array in (layer.keys, layer.values)]
    raw = b"".join(array.tobytes() for array in halves)
    deflated = zlib.compress(raw, 1)
    work: dict[str, Callable[[], object]] = {"prefill": lambda: prefix.fork().prefill(ids)}
    for rung in RUNGS:
        work[f"encode {rung.name}"] = partial(relay.sent, model, cache, rung)
        work[f"decode {rung.name}"] = partial(relay.received, model, made[rung.name])
    work |= {
        "encode fp16 + zlib 1": lambda: zlib.compress(raw, 1),
        "decode fp16 + zlib 1": lambda: np.frombuffer(zlib.decompress(deflated), np.float16).astype(np.float32),
    }
    timed = in_turn(work, repeats)
    sizes = {name: len(data) for name, data in made.items()} | {"fp16 + zlib 1": len(deflated)}
    return CodecBench(
        tokens=len(ids),
        threads=threads,
        cache_mb=cache.nbytes / 1e6,
        prefill=timed["prefill"],
        rows=tuple(
            CodecRow(
                name=name,
                bits_per_element=8 * size / cache.elements,
                encode=timed[f"encode {name}"],
                decode=timed[f"decode {name}"],
                share_of_prefill=(timed[f"encode {name}"].median_s + timed[f"decode {name}"].median_s)
                / timed["prefill"].median_s,
            )
            for name, size in sizes.items()
        ),
    )
