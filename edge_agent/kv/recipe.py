"""Recipes: how a cache is compressed. A ladder's rung is a recipe's name with its measured figures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from edge_agent.errors import RecipeInvalid
from edge_agent.kv.bitpack import check_bits

Codec = Literal["float32", "fp16", "affine"]

DEFAULT_SLICE_TOKENS = 128


@dataclass(frozen=True)
class Recipe:
    """codec "affine" is Q-KVComm's per-tensor quantization at `bits`; one tensor is one layer's keys, or values, of a
    slice of slice_tokens tokens. float32 is lossless, fp16 rounds to half precision.
    """

    name: str
    codec: Codec
    bits: int
    slice_tokens: int = DEFAULT_SLICE_TOKENS


def recipe(name: str) -> Recipe:
    """The recipe of a rung's name: float32, fp16, or q1 … q8. Raises RecipeInvalid for any other."""
    if name == "float32":
        return Recipe(name, "float32", 32)
    if name == "fp16":
        return Recipe(name, "fp16", 16)
    match = re.fullmatch(r"q(\d{1,3})", name)
    if match is None:
        raise RecipeInvalid(f"unknown rung {name!r}: known are float32, fp16 and q1 to q8")
    return Recipe(name, "affine", check_bits(int(match[1])))


FIRST_LADDER: tuple[Recipe, ...] = tuple(recipe(name) for name in ("float32", "fp16", "q8", "q6", "q4"))
