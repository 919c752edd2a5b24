"""Recipes: how a cache is compressed. A ladder's rung is a recipe's name with its measured figures.

    float32, fp16          without loss, and half precision
    klt0 … klt15           the bundle's transform at this level: 0 is the finest, two more double the step
    q1 … q8                every tensor at so many bits
    mix4 … mix8            30 % of the layers at 8 bits, 40 % at so many, 30 % at 4, by error (Q-KVComm)
    klmix4 … klmix8        the same, ranked by what 4 bits in a layer cost in KL divergence

each but the transform's with any of these, in this order

    -l70                   the best 70 % of the layers only, by attention and prior (Q-KVComm)
    -a50 -m50 -s25         α, γ_μ and γ_σ of that choice, in percent (these are the defaults)
    -k70                   or the 70 % in which 4 bits cost most KL divergence
    -whole                 one range for a layer's keys (or values) of the whole context, not of each slice

qkvcomm-4 … qkvcomm-8 is the paper's pipeline to the letter: mix4-l70-whole and so on. To any of all these may be added

    -e30                   only the 30 % of each layer's entries that got most attention, and the context's first ones
    -h30                   the same for each KV head by itself
    -b4                    what the others' values held beyond theirs is added in 4 directions (Orthogonal BackFill)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from edge_agent.errors import RecipeInvalid
from edge_agent.kv.allocation import MAX_BITS, MIN_BITS, allocate
from edge_agent.kv.bitpack import check_bits
from edge_agent.kv.cache import Cache
from edge_agent.kv.evicted import Eviction, evicted
from edge_agent.kv.eviction import By
from edge_agent.kv.profile import Profile
from edge_agent.kv.selection import Selection, attention_on_context, best_layers, layer_scores
from edge_agent.kv.transform import LEVELS

Codec = Literal["float32", "fp16", "affine", "klt"]
Mix = Literal["error", "divergence"]

DEFAULT_SLICE_TOKENS = 128
WHOLE = 65_536
"""Tokens of a slice that holds any context."""

_NAME = re.compile(
    r"(?P<family>float32|fp16|q|mix|klmix)(?P<bits>[1-9]\d?)?"
    r"(-k(?P<costly>[1-9]\d{0,2})"
    r"|-l(?P<ratio>[1-9]\d{0,2})(-a(?P<alpha>\d{1,3}))?(-m(?P<mean>\d{1,3}))?(-s(?P<spread>\d{1,3}))?)?"
    r"(?P<whole>-whole)?"
)
_TRANSFORMED = re.compile(r"klt(0|[1-9]\d?)")
_ALIAS = re.compile(r"qkvcomm-([1-9])")
_EVICTED = re.compile(r"(?P<base>.+?)-(?P<by>[eh])(?P<kept>[1-9]\d?)(-b(?P<rank>[1-9]\d?))?")
_MIXES: dict[str, Mix] = {"mix": "error", "klmix": "divergence"}


@dataclass(frozen=True)
class Layout:
    """What of one cache is sent: layers, rising, and (codec "affine") the bits of each."""

    layers: tuple[int, ...]
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """codec "affine" is Q-KVComm's per-tensor quantization at `bits`; one tensor is one layer's keys, or values, of a
    slice of slice_tokens tokens. float32 is lossless, fp16 rounds to half precision. mix: `bits` is the target of a
    30/40/30 allocation by that figure of the profile. selection: only the best layers are sent. codec "klt" is the
    bundle's transform at `level`. eviction: only some entries are sent.
    """

    name: str
    codec: Codec
    bits: int
    slice_tokens: int = DEFAULT_SLICE_TOKENS
    mix: Mix | None = None
    selection: Selection | None = None
    level: int | None = None
    eviction: Eviction | None = None

    @property
    def needs_mass(self) -> bool:
        """Whether it chooses by the attention that a context's last tokens paid."""
        return self.eviction is not None or (self.selection is not None and self.selection.by == "attention")

    @property
    def meets(self) -> bool:
        """Whether each of its slices is of use by itself: it has all entries of its tokens, of every layer."""
        return self.eviction is None and self.selection is None

    def reduced(self, cache: Cache) -> Cache:
        """The entries that are sent of those of a cache. Raises CacheInvalid if they are chosen by mass it has not."""
        return cache if self.eviction is None else evicted(cache, self.eviction)

    def layout(self, layers: int, profile: Profile | None, cache: Cache | None) -> Layout:
        """What is sent of a cache of a model with so many layers, by the model's profile.

        cache: with attention mass, if layers are chosen. Raises RecipeInvalid if the profile is needed and missing,
        CacheInvalid if the mass is.
        """
        sent = tuple(range(layers))
        if self.selection is not None:
            sent = self._chosen(self.selection, layers, profile, cache)
        if self.codec != "affine":
            return Layout(sent)
        if self.mix is None:
            return Layout(sent, (self.bits,) * len(sent))
        figures = self._figures(self.mix, layers, profile)
        return Layout(sent, allocate([figures[layer] for layer in sent], self.bits))

    def _chosen(
        self, selection: Selection, layers: int, profile: Profile | None, cache: Cache | None
    ) -> tuple[int, ...]:
        if selection.by == "divergence":
            return best_layers(self._figures("divergence", layers, profile), selection.ratio)
        if cache is None:
            raise RecipeInvalid(f"{self.name} chooses layers by a cache's attention, and there is none")
        return best_layers(layer_scores(attention_on_context(cache), selection), selection.ratio)

    def _figures(self, by: Mix, layers: int, profile: Profile | None) -> tuple[float, ...]:
        figures: tuple[float, ...] = () if profile is None else getattr(profile, by)
        if len(figures) != layers:
            raise RecipeInvalid(f"{self.name} needs the model's profile by {by}, which its bundle lacks")
        return figures


@lru_cache(maxsize=256)
def recipe(name: str) -> Recipe:
    """The recipe of a rung's name (see above). Raises RecipeInvalid for any other."""
    less = _EVICTED.fullmatch(name)
    if less is not None:
        by: By = "layer" if less["by"] == "e" else "head"
        eviction = Eviction(int(less["kept"]) / 100, by, int(less["rank"] or 0))
        base = recipe(less["base"])
        if base.eviction is not None:
            raise RecipeInvalid(f"{name} evicts twice")
        return replace(base, name=name, eviction=eviction)
    transformed = _TRANSFORMED.fullmatch(name)
    if transformed is not None and int(transformed[1]) < LEVELS:
        return Recipe(name, "klt", 0, level=int(transformed[1]))
    alias = _ALIAS.fullmatch(name)
    match = _NAME.fullmatch(f"mix{alias[1]}-l70-whole" if alias else name)
    if match is None or (match["bits"] is None) != (match["family"] in {"float32", "fp16"}):
        raise RecipeInvalid(
            f"unknown rung {name!r}: known are float32, fp16, klt0 to klt{LEVELS - 1}, q1 to q8, mix4 to mix8, klmix4 "
            "to klmix8 (with -l70 or -k70 for 70 % of the layers, -whole for whole tensors), qkvcomm-4 to qkvcomm-8, "
            "each with -e30 or -h30 for 30 % of the entries (-b4: backfilled)"
        )
    codec, bits = _codec(match["family"], int(match["bits"] or 0))
    return Recipe(
        name,
        codec,
        bits,
        slice_tokens=WHOLE if match["whole"] else DEFAULT_SLICE_TOKENS,
        mix=_MIXES.get(match["family"]),
        selection=_selection(match),
    )


def _selection(match: re.Match[str]) -> Selection | None:
    if match["costly"] is not None:
        return Selection(ratio=int(match["costly"]) / 100, by="divergence")
    if match["ratio"] is None:
        return None
    usual = Selection()
    return Selection(
        ratio=int(match["ratio"]) / 100,
        alpha=_share(match["alpha"], usual.alpha),
        prior_mean=_share(match["mean"], usual.prior_mean),
        prior_spread=_share(match["spread"], usual.prior_spread),
    )


def _share(percent: str | None, usual: float) -> float:
    return usual if percent is None else int(percent) / 100


def _codec(family: str, bits: int) -> tuple[Codec, int]:
    if family in {"float32", "fp16"}:
        return ("float32", 32) if family == "float32" else ("fp16", 16)
    if family in _MIXES and not MIN_BITS <= bits <= MAX_BITS:
        raise RecipeInvalid(f"{family}{bits}: the target of a mix must be {MIN_BITS} to {MAX_BITS} bits")
    return "affine", check_bits(bits)


CANDIDATES: tuple[Recipe, ...] = tuple(
    recipe(name)
    for name in (
        *("float32", "fp16", "q8"),
        *(f"klt{level}" for level in range(10)),
        *("klt6-h50", "klt6-h30-b2", "klt8-h50"),
    )
)
"""Of these a ladder keeps the ones that no other beats in all figures."""
BASELINES: tuple[Recipe, ...] = tuple(
    recipe(name) for name in ("q6", "q4", *(f"qkvcomm-{target}" for target in (8, 6, 4)))
)
"""Measured with every ladder, to stand beside it; a question may ask for them by name."""
