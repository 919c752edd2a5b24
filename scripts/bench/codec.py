"""The codec on a real cache: seconds to encode and decode, beside the prefill that they save and plain peers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from msgspec import Struct

from edge_agent.kv.cache import Cache
from edge_agent.kv.payload import encode
from edge_agent.kv.reader import decode
from edge_agent.kv.recipe import FIRST_LADDER, Recipe
from edge_agent.model.exchange import expectation, payload_header
from edge_agent.model.manifest import Manifest
from edge_agent.model.session import Model, Runtime
from edge_agent.model.text import Text
from scripts.bench.measure import Timed, in_turn

TOKENS = 512


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
    """Encode and decode of TOKENS tokens of real text for every rung of the first ladder, and two peers."""
    model = Model(bundle, Runtime(threads=threads))
    text = Text(bundle, model.manifest)
    ids = text.ids(" ".join(texts))[:TOKENS]
    prefix = model.new_context()
    prefix.prefill(model.manifest.prompt.prefix_ids)
    live = prefix.fork()
    live.prefill(ids)
    cache = live.extract(prefix.next_position, live.next_position)
    made = {recipe.name: _encode(model.manifest, cache, recipe) for recipe in FIRST_LADDER}
    halves = [array.astype(np.float16) for layer in cache.layers for array in (layer.keys, layer.values)]
    raw = b"".join(array.tobytes() for array in halves)
    deflated = zlib.compress(raw, 1)
    work: dict[str, Callable[[], object]] = {"prefill": lambda: prefix.fork().prefill(ids)}
    for recipe in FIRST_LADDER:
        work[f"encode {recipe.name}"] = partial(_encode, model.manifest, cache, recipe)
        work[f"decode {recipe.name}"] = partial(_decode, model.manifest, made[recipe.name])
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


def _encode(manifest: Manifest, cache: Cache, recipe: Recipe) -> bytes:
    header = payload_header(manifest, "0" * 32, [0] * cache.entries, own_tokens=0, rung=recipe)
    return b"".join(encode(header, cache))


def _decode(manifest: Manifest, data: bytes) -> Cache | None:
    return decode(data, expectation(manifest, 1 << 34))[1]
