"""One way to send a cache, whoever it is from: what can be measured of each alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from edge_agent.facts import Fact
from edge_agent.kv.cache import Cache, Float32, Layer
from edge_agent.kv.recipe import Recipe
from edge_agent.model.session import Model
from scripts import relay

Sent = TypeVar("Sent")


@dataclass(frozen=True)
class Method(Generic[Sent]):
    """encode: of a whole cache; decode: a cache of what encode gave; nbytes: of that, with all scales and metadata.

    packages: those that do it, of which kvbus itself needs none to run.
    """

    name: str
    encode: Callable[[Cache], Sent]
    decode: Callable[[Sent], Cache]
    nbytes: Callable[[Sent], int]
    packages: tuple[str, ...] = ()


def rung_method(model: Model, rung: Recipe, *, facts: Sequence[Fact] = ()) -> Method[bytes]:
    """A rung, as the bytes of its whole payload."""
    return Method(
        rung.name,
        encode=lambda cache: relay.sent(model, cache, rung, facts=facts),
        decode=lambda payload: relay.received(model, payload)[1],
        nbytes=len,
    )


def tensors(cache: Cache) -> list[Float32]:
    """Keys, then values of each layer, float32 (kv_heads, tokens, head_dim) each."""
    return [array for layer in cache.layers for array in (layer.keys, layer.values)]


def assembled(arrays: Sequence[Float32], start: int = 0) -> Cache:
    """The cache of such tensors, of tokens at positions from `start` on."""
    positions = np.arange(start, start + arrays[0].shape[1], dtype=np.int32)
    pairs = zip(arrays[::2], arrays[1::2], strict=True)
    return Cache(tuple(Layer(keys, values, positions) for keys, values in pairs))
