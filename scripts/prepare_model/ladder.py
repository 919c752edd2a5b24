"""What each rung costs in bits and in loss, measured on calibration passages with the bundle's own graph.

For every passage: its cache after the prompt's prefix, questions, and the greedy answers of the uncompressed run. Then
every rung reads the same question and the same answer behind its own copy of the cache, as a receiver would: through
the payload's bytes. Loss is KL(uncompressed || rung) in nats, agreement the share of equal argmaxes, both over the
positions of the answers (the one that ends an answer included).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct

from broker_config.messages import Rung
from edge_agent.kv.cache import Cache
from edge_agent.kv.recipe import BASELINES, CANDIDATES, Recipe
from edge_agent.model.session import Model
from scripts import relay
from scripts.prepare_model.answered import Answered


class Measured(Struct, frozen=True, kw_only=True):
    """The ladder, most faithful first, other rungs to stand beside it, and what both rest on."""

    rungs: tuple[Rung, ...]
    baselines: tuple[Rung, ...]
    passages: int
    tokens: int
    answer_positions: int


class _Sum(Struct, kw_only=True):
    payload_bits: int = 0
    elements: int = 0
    kl: float = 0.0
    agreeing: int = 0
    positions: int = 0


def measure(
    answered: Answered,
    on_answer: Callable[[int], None],
    *,
    candidates: Sequence[Recipe] = CANDIDATES,
    baselines: Sequence[Recipe] = BASELINES,
) -> Measured:
    """The front of the candidates on answered passages, and the baselines as they are.

    on_answer is called with the number of answers done.
    """
    recipes = (*candidates, *baselines)
    sums = {recipe.name: _Sum() for recipe in recipes}
    tokens, passages, relayed = 0, 0, _Relayed(answered.model)
    for index, reference in enumerate(answered):
        if relayed.take(reference.cache):
            passages += 1
            tokens += reference.cache.entries
        for recipe in recipes:
            _add(sums[recipe.name], answered, reference, relayed.by(recipe))
        on_answer(index + 1)
    return Measured(
        rungs=front([_rung(recipe, sums[recipe.name]) for recipe in candidates]),
        baselines=tuple(_rung(recipe, sums[recipe.name]) for recipe in baselines),
        passages=passages,
        tokens=tokens,
        answer_positions=max(total.positions for total in sums.values()),
    )


def front(rungs: Sequence[Rung]) -> tuple[Rung, ...]:
    """The rungs that no other beats or equals in bits per element, loss and agreement at once; most bits first."""
    kept: list[Rung] = []
    for rung in sorted(rungs, key=lambda rung: (rung.bits_per_element, rung.kl, -rung.agreement)):
        if not any(by.kl <= rung.kl and by.agreement >= rung.agreement for by in kept):
            kept.append(rung)
    return tuple(reversed(kept))


class _Relayed:
    """One cache as it comes over each rung, coded once however many questions there are."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._cache: Cache | None = None
        self._by: dict[str, tuple[Cache, int]] = {}

    def take(self, cache: Cache) -> bool:
        """The cache from here on; whether it is another one than before."""
        if cache is self._cache:
            return False
        self._cache, self._by = cache, {}
        return True

    def by(self, recipe: Recipe) -> tuple[Cache, int]:
        """What comes of it, and the payload's bytes."""
        if recipe.name not in self._by and self._cache is not None:
            payload = relay.sent(self._model, self._cache, recipe)
            self._by[recipe.name] = relay.received(self._model, payload)[1], len(payload)
        return self._by[recipe.name]


def _add(total: _Sum, answered: Answered, reference: relay.Reference, relayed: tuple[Cache, int]) -> None:
    back, payload_bytes = relayed
    live = relay.behind(answered.prefix, back, reference.cache.entries, room=reference.room)
    log_q = relay.along(live, relay.read_question(live, reference.question), reference.answer)
    total.payload_bits += 8 * payload_bytes
    total.elements += reference.cache.elements
    total.kl += float(relay.divergence(reference.log_p, log_q).sum())
    total.agreeing += relay.agreeing(reference.log_p, log_q)
    total.positions += reference.positions


def _rung(recipe: Recipe, total: _Sum) -> Rung:
    return Rung(
        name=recipe.name,
        transformed=recipe.codec == "klt",
        bits_per_element=round(total.payload_bits / total.elements, 4),
        kl=round(total.kl / total.positions, 9),
        agreement=round(total.agreeing / total.positions, 6),
    )
