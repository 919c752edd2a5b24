"""A rung's coding stage by stage, with the functions of edge_agent.kv that a payload is made and read by.

A payload's header, digests and joined slices are in none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_agent.errors import RecipeInvalid
from edge_agent.kv import bitpack, coded, quantize
from edge_agent.kv.cache import Cache
from edge_agent.kv.recipe import Recipe
from edge_agent.kv.transform import Transform
from scripts.peers.method import assembled, tensors

QUANTIZE, PACK, UNPACK, DEQUANTIZE = "quantize", "pack", "unpack", "dequantize"


@dataclass(frozen=True)
class Stages:
    """What each stage does to all slices of one cache, in the order of slices.

    quantize: from entries to integers, by the transform if there is one; pack: those as bytes, entropy-coded or
    bit-packed; unpack and dequantize: the way back, to a cache each.
    """

    quantize: Callable[[], object]
    pack: Callable[[], list[bytes]]
    unpack: Callable[[], object]
    dequantize: Callable[[], list[Cache]]

    def named(self) -> dict[str, Callable[[], object]]:
        return {QUANTIZE: self.quantize, PACK: self.pack, UNPACK: self.unpack, DEQUANTIZE: self.dequantize}


def stages_of(rung: Recipe, cache: Cache, transform: Transform | None) -> Stages:
    """The stages of a rung of the transform, or of one width for all layers. Raises RecipeInvalid for any other."""
    starts = range(0, cache.entries, rung.slice_tokens)
    parts = [cache.between(start, start + rung.slice_tokens) for start in starts]
    if rung.codec == "affine" and rung.mix is None and rung.selection is None:
        return _affine(rung.bits, parts)
    if rung.codec == "klt" and rung.level is not None and transform is not None:
        return _transformed(transform, rung.level, parts)
    raise RecipeInvalid(f"{rung.name} has no stages to be timed here")


def _transformed(transform: Transform, level: int, parts: list[Cache]) -> Stages:
    layers = range(transform.layers)
    kv_heads = parts[0].layers[0].keys.shape[0]

    def symbols() -> list[coded.Symbols]:
        return [coded.symbols_of(transform, level, part, layers) for part in parts]

    known = symbols()

    def pack() -> list[bytes]:
        return [coded.pack(transform, level, each) for each in known]

    bodies = pack()

    def unpack() -> list[coded.Symbols]:
        entries = (dict.fromkeys(layers, part.entries) for part in parts)
        return [coded.unpack(transform, level, body, each) for body, each in zip(bodies, entries, strict=True)]

    def caches() -> list[Cache]:
        places = [dict.fromkeys(layers, part.layers[0].positions) for part in parts]
        return [
            coded.cache_of(transform, level, each, kv_heads=kv_heads, positions=positions)
            for each, positions in zip(known, places, strict=True)
        ]

    return Stages(symbols, pack, unpack, caches)


def _affine(bits: int, parts: list[Cache]) -> Stages:
    starts = [int(part.layers[0].positions[0]) for part in parts]

    def quantized() -> list[list[quantize.Quantized]]:
        return [[quantize.quantize(tensor, bits) for tensor in tensors(part)] for part in parts]

    known = quantized()

    def pack() -> list[bytes]:
        return [bitpack.pack(np.concatenate([q.codes.reshape(-1) for q in each]), bits) for each in known]

    bodies = pack()

    def unpack() -> list[bitpack.UInt8]:
        return [bitpack.unpack(body, bits, part.elements) for body, part in zip(bodies, parts, strict=True)]

    def caches() -> list[Cache]:
        return [
            assembled([quantize.dequantize(q) for q in each], start) for each, start in zip(known, starts, strict=True)
        ]

    return Stages(quantized, pack, unpack, caches)
