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
    tokens = passages = answers = 0
    for references in answered.by_passage():
        cache = references[0].cache
        for recipe in recipes:
            payload = relay.sent(answered.model, cache, recipe)
            back = relay.received(answered.model, payload)[1]
            for reference in references:
                _add(sums[recipe.name], answered, reference, back, len(payload))
        passages, tokens, answers = passages + 1, tokens + cache.entries, answers + len(references)
        on_answer(answers)
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


def _add(total: _Sum, answered: Answered, reference: relay.Reference, back: Cache, payload_bytes: int) -> None:
    log_q = relay.along_behind(answered.prefix, back, reference)
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
