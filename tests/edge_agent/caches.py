"""Caches made up for tests, and strategies for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import msgspec
import numpy as np
from hypothesis import strategies as st

from edge_agent.kv.cache import Cache, Layer
from edge_agent.kv.eviction import taken
from edge_agent.kv.header import Header, Shape, kept_of, pack_ids
from edge_agent.kv.profile import Profile
from edge_agent.kv.reader import Expectation
from edge_agent.kv.recipe import Recipe
from edge_agent.kv.transform import Transform

FINGERPRINT, TOKENIZER, PREFIX, CONTEXT = "a" * 32, "b" * 32, "c" * 32, "d" * 32


def made_up(
    *, layers: int = 2, heads: int = 2, entries: int = 5, dim: int = 4, seed: int = 0, scale: float = 1.0
) -> Cache:
    """Random entries at positions 0 … entries-1."""
    rng = np.random.default_rng(seed)
    shape = (heads, entries, dim)
    positions = np.arange(entries, dtype=np.int32)
    return Cache(
        tuple(
            Layer(
                (scale * rng.standard_normal(shape)).astype(np.float32),
                (scale * rng.standard_normal(shape)).astype(np.float32),
                positions,
            )
            for _ in range(layers)
        )
    )


def transform_for(cache: Cache, *, seed: int = 0, finest: float = 0.02) -> Transform:
    """A transform for caches of this shape: any invertible one, deviations from one step to many of them.

    finest: the step of level 0, in deviations of the made-up entries.
    """
    rng = np.random.default_rng(seed)
    heads, _, dim = cache.layers[0].keys.shape
    layers, width = len(cache.layers), 2 * heads * dim
    rotations = np.linalg.qr(rng.standard_normal((layers, width, width)))[0]
    spread = np.geomspace(1.0, 0.02, width)
    return Transform(
        mean=(0.1 * rng.standard_normal((layers, width))).astype(np.float32),
        scale=np.tile(spread / finest, (layers, 1)).astype(np.float32),
        analysis=rotations.astype(np.float16),
        deviation=np.tile(spread / finest, (layers, 1)).astype(np.float32),
    )


def header_for(
    cache: Cache, rung: Recipe, *, own: int = 0, slice_tokens: int | None = None, profile: Profile | None = None
) -> Header:
    """A header under which `cache` can be sent, but for its first `own` tokens."""
    heads, tokens, dim = cache.layers[0].keys.shape
    layout = rung.layout(len(cache.layers), profile, cache)
    return Header(
        fingerprint=FINGERPRINT,
        tokenizer=TOKENIZER,
        weight_precision="fp32",
        context_id=CONTEXT,
        prefix=PREFIX,
        shape=Shape(layers=len(cache.layers), kv_heads=heads, head_dim=dim, sent_layers=layout.layers),
        codec=rung.codec,
        widths=layout.widths,
        rung=rung.name,
        transform=transform_for(cache).id if rung.codec == "klt" else None,
        level=rung.level,
        slice_tokens=slice_tokens or rung.slice_tokens,
        tokens=tokens,
        id_bytes=2,
        token_ids=pack_ids(list(range(tokens)), 2),
        own_tokens=own,
    )


def evicted_for(cache: Cache, rung: Recipe, *, own: int = 0, slice_tokens: int | None = None) -> tuple[Header, Cache]:
    """The same for a rung that evicts, and the entries that are then sent."""
    header = header_for(cache, rung, own=own, slice_tokens=slice_tokens)
    rest = rung.reduced(cache.between(own, header.tokens))
    kept = kept_of(rest, own_tokens=own, tokens=header.tokens, layers=header.shape.sent_layers)
    return msgspec.structs.replace(header, kept=kept), rest


def attended(cache: Cache, *, seed: int = 0) -> Cache:
    """The same with attention mass, by chance."""
    rng = np.random.default_rng(seed)
    masses = [rng.dirichlet(np.full(cache.entries, 0.3), len(layer.keys)).astype(np.float32) for layer in cache.layers]
    return Cache(tuple(replace(layer, mass=mass) for layer, mass in zip(cache.layers, masses, strict=True)))


def expectation_for(cache: Cache, **changes: object) -> Expectation:
    """What a receiver expects that can use `cache`, by a transform for its shape if need be."""
    heads, _, dim = cache.layers[0].keys.shape
    fields: dict[str, object] = {
        "fingerprint": FINGERPRINT,
        "tokenizer": TOKENIZER,
        "prefix": PREFIX,
        "layers": len(cache.layers),
        "kv_heads": heads,
        "head_dim": dim,
        "vocabulary": 1_000,
        "window_tokens": 4_096,
        "limit_bytes": 1 << 30,
        "transform": transform_for(cache),
    }
    return Expectation(**(fields | changes))  # type: ignore[arg-type]


def without(cache: Cache, hidden: Sequence[Collection[int]]) -> Cache:
    """A cache without the entries at these positions of each layer."""
    layers = []
    for layer, gone in zip(cache.layers, hidden, strict=True):
        kept = ~np.isin(layer.positions, sorted(gone))
        layers.append(Layer(layer.keys[:, kept], layer.values[:, kept], layer.positions[kept]))
    return Cache(tuple(layers))


def without_by_head(cache: Cache, hidden: Sequence[Sequence[Collection[int]]]) -> Cache:
    """A cache without the entries at these positions of each layer and KV head, as many in each head of a layer."""
    layers = []
    for layer, heads in zip(cache.layers, hidden, strict=True):
        kept = np.stack([np.flatnonzero(~np.isin(layer.positions, sorted(gone))) for gone in heads])
        places = kept[0] if (kept == kept[0]).all() else kept
        layers.append(Layer(taken(layer.keys, places), taken(layer.values, places), layer.positions[places]))
    return Cache(tuple(layers))


def equal(one: Cache, other: Cache) -> bool:
    """The same entries, bit for bit."""
    return len(one.layers) == len(other.layers) and all(
        np.array_equal(a.keys, b.keys)
        and np.array_equal(a.values, b.values)
        and np.array_equal(a.positions, b.positions)
        for a, b in zip(one.layers, other.layers, strict=True)
    )


shapes = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "entries": st.integers(1, 20),
        "dim": st.sampled_from([2, 4, 6]),
        "seed": st.integers(0, 2**16),
    }
)
