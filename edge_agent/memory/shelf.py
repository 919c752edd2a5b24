"""In which form a cache is kept, what it can be sent at as it is, and how it goes from one to the next.

A cache is computed as floats. As memory fills it is coded at one rung of the bundle's ladder after another: those of
the transform that follow from each other by shifting, up to the loss that is accepted in memory. A rung that chooses
by attention needs floats, with which alone the attention mass is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from broker_config.messages import SLICE_TOKENS, Rung
from edge_agent.errors import RecipeInvalid
from edge_agent.facts import Fact
from edge_agent.kv.cache import Cache
from edge_agent.kv.header import Header
from edge_agent.kv.payload import slice_bodies, slice_body
from edge_agent.kv.recipe import WHOLE, Layout, Recipe, recipe
from edge_agent.kv.shelved import Shelved, bodies_for, nests, shelve, taken_down, tightened
from edge_agent.kv.transform import Transform
from edge_agent.model.exchange import payload_header, to_send
from edge_agent.model.manifest import Manifest

Form = Cache | Shelved
EXACT = "float32"
ADDED_LOSS = 0.1
"""Coding again what was coded may add this share of a rung's own loss."""
_FAR_LEVELS = 5
"""Levels of the other parity so far apart add less: a thirty-second of the squared step."""


def rung_of(form: Form) -> str:
    """The rung at which a cache is kept."""
    return EXACT if isinstance(form, Cache) else form.rung


class Shelf:
    """tightest_kl: the loss in nats up to which a cache is tightened in memory."""

    def __init__(self, manifest: Manifest, transform: Transform | None, *, tightest_kl: float) -> None:
        self._manifest, self._transform = manifest, transform
        self._rungs = {rung.name: rung for rung in (*manifest.baselines, *manifest.ladder)}
        self.rungs = _chain(manifest.ladder, tightest_kl, transformed=transform is not None)
        """From floats to the tightest form, each following from the one before."""

    def tighter(self, rung: str) -> str | None:
        """The next rung of the chain; None at its end, or for a rung that is not on it."""
        rest = self.rungs[self.rungs.index(rung) + 1 :] if rung in self.rungs else ()
        return rest[0] if rest else None

    def serves(self, held: str, wanted: str) -> bool:
        """Whether a cache kept at a rung can be sent at another, losing little more than floats would."""
        if held in {EXACT, wanted}:
            return True
        one, other = recipe(held), recipe(wanted)
        if other.needs_mass or wanted == EXACT:
            return False
        if nests(one, other) or one.codec == "fp16":  # its rounding is far below any step
            return True
        if one.level is not None and other.level is not None:
            return other.level - one.level >= _FAR_LEVELS
        return self._kl(held) <= ADDED_LOSS * self._kl(wanted, 0.0)

    def fits(self, form: Form, wanted: Recipe, *, own_tokens: int = 0) -> bool:
        """Whether what is kept can be sent at a rung, the first own_tokens as ids."""
        if not self.serves(rung_of(form), wanted.name):
            return False
        if isinstance(form, Cache):
            return True
        again = own_tokens > 0 and wanted.codec == "affine" and rung_of(form) == wanted.name  # in other slices
        return not wanted.needs_mass and not again

    def keeps(self, held: str, wanted: str) -> bool:
        """Whether a cache kept at a rung is no worse than another rung."""
        return held == EXACT or self._kl(held) <= self._kl(wanted, 0.0)

    def ready(self, held: str) -> tuple[str, ...] | None:
        """The rungs, of the ladder and beside it, that a cache kept at one serves; None: all of them."""
        return None if held == EXACT else tuple(name for name in self._rungs if self.serves(held, name))

    def size_bytes(self, tokens: int, rung: str) -> int:
        """About what a cache of so many tokens takes at a rung."""
        elements = self._manifest.info().elements_per_token * tokens
        return int(elements * self._rungs[rung].bits_per_element / 8)

    def put(self, form: Form, rung: str, context_id: str, ids: Sequence[int]) -> Shelved:
        """A cache coded at its own rung or a tighter one of the chain. Raises like exchange.to_send."""
        wanted = recipe(rung)
        if isinstance(form, Shelved) and self._transform is not None and nests(recipe(form.rung), wanted):
            return tightened(form, wanted, self._transform)
        header, cache = to_send(self._manifest, context_id, ids, self.take(form), own_tokens=0, rung=wanted)
        if cache is None:
            raise RecipeInvalid(f"context {context_id} has no entries to be kept")
        return shelve(header, cache, self._transform)

    def take(self, form: Form) -> Cache:
        """The cache as floats."""
        return form if isinstance(form, Cache) else taken_down(form, self._transform)

    def slice_tokens(self, kept: str | None, rung: Recipe, *, meet: bool) -> int:
        """Tokens of a slice, when a cache that is kept at a rung (None: none is) is sent at another.

        Fine ones where both ends go on until they meet; but what goes as it is kept keeps its slices.
        """
        if not meet or rung.needs_mass or rung.slice_tokens == WHOLE or kept == rung.name != EXACT:
            return rung.slice_tokens
        return SLICE_TOKENS

    def header(
        self,
        rung: Recipe,
        context_id: str,
        ids: Sequence[int],
        *,
        own_tokens: int,
        facts: Sequence[Fact] = (),
        slice_tokens: int | None = None,
    ) -> Header:
        """The header of a payload, before there is a cache. Raises RecipeInvalid for a rung that chooses by one."""
        layout = Layout(())
        if own_tokens < len(ids):
            if rung.eviction is not None:
                raise RecipeInvalid(f"{rung.name} chooses entries by a cache's attention, and there is none")
            layout = rung.layout(len(self._manifest.layers), self._manifest.profile, None)
        return payload_header(
            self._manifest,
            context_id,
            ids,
            own_tokens=own_tokens,
            rung=rung,
            layout=layout,
            facts=facts,
            slice_tokens=slice_tokens,
        )

    def bodies(self, header: Header, form: Form, *, last_first: bool = False) -> Iterator[bytes]:
        """Slices of a payload with such a header, out of what is kept.

        A whole cache that is kept at the rung itself is sent as it is, and what nests in it is shifted. Raises like
        payload.slice_bodies.
        """
        if isinstance(form, Shelved):
            if _as_it_is(header, form.header):
                return iter(form.bodies[::-1] if last_first else form.bodies)
            if self._transform is not None and nests(recipe(form.rung), recipe(header.rung)):
                return bodies_for(header, form, self._transform, last_first=last_first)
        return slice_bodies(header, self.take(form), self._transform, last_first=last_first)

    def body(self, header: Header, start: int, part: Cache) -> bytes:
        """One slice of it, out of its own entries. Raises like payload.slice_bodies."""
        return slice_body(header, start, part, self._transform)

    def to_send(
        self,
        form: Form | None,
        rung: Recipe,
        context_id: str,
        ids: Sequence[int],
        *,
        own_tokens: int,
        facts: Sequence[Fact] = (),
    ) -> tuple[Header, Iterator[bytes]]:
        """Header and slices of a payload, out of what is kept; form: None if only ids are sent.

        Raises like exchange.to_send.
        """
        if form is None or not rung.needs_mass:
            header = self.header(rung, context_id, ids, own_tokens=own_tokens, facts=facts)
            return header, iter(()) if form is None else self.bodies(header, form)
        cache = self.take(form)
        header, sent = to_send(self._manifest, context_id, ids, cache, own_tokens=own_tokens, rung=rung, facts=facts)
        return header, slice_bodies(header, sent, self._transform)

    def _kl(self, rung: str, unknown: float = float("inf")) -> float:
        return self._rungs[rung].kl if rung in self._rungs else unknown


def _as_it_is(header: Header, held: Header) -> bool:
    """Whether the slices of a cache that is kept are those that a payload is to have."""
    fields = ("rung", "level", "transform", "widths", "shape", "slice_tokens", "tokens", "own_tokens")
    return all(getattr(header, field) == getattr(held, field) for field in fields)


def _chain(ladder: Sequence[Rung], tightest_kl: float, *, transformed: bool) -> tuple[str, ...]:
    """Floats, then the transform's rungs of the parity that goes furthest; without a transform, the plain ones."""
    known = {rung.name: recipe(rung.name) for rung in ladder if rung.kl <= tightest_kl}
    coded = [name for name, made in known.items() if made.level is not None and made.eviction is None]
    if transformed and coded:
        coded.sort(key=lambda name: known[name].level or 0)
        return EXACT, *(name for name in coded if nests(known[name], known[coded[-1]]))
    plain = [name for name, made in known.items() if made.codec in {"fp16", "affine"} and not made.needs_mass]
    bits = {rung.name: rung.bits_per_element for rung in ladder}
    return EXACT, *sorted(plain, key=lambda name: -bits[name])
