"""What each rung costs in bits and in loss, measured on calibration passages with the bundle's own graph.

For every passage: its cache after the prompt's prefix, a question, and the greedy answer of the uncompressed run. Then
every rung reads the same question and the same answer behind its own copy of the cache, as a receiver would: through
the payload's bytes. Loss is KL(uncompressed || rung) in nats, agreement the share of equal argmaxes, both over the
positions of the answers (the one that ends an answer included).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct

from broker_config.messages import Rung
from edge_agent.kv.recipe import BASELINES, FIRST_LADDER, Recipe
from edge_agent.model.manifest import Manifest
from edge_agent.model.session import LiveContext
from scripts import relay
from scripts.prepare_model.answered import Answered

RECIPES = (*FIRST_LADDER, *BASELINES)


class Measured(Struct, frozen=True, kw_only=True):
    """The ladder and what it rests on."""

    rungs: tuple[Rung, ...]
    passages: int
    tokens: int
    answer_positions: int


class _Sum(Struct, kw_only=True):
    payload_bits: int = 0
    elements: int = 0
    kl: float = 0.0
    agreeing: int = 0
    positions: int = 0


def measure(answered: Answered, on_passage: Callable[[int], None], *, recipes: Sequence[Recipe] = RECIPES) -> Measured:
    """The rungs of `recipes` on answered passages, in the given order (lossless first).

    on_passage is called with the number of passages done.
    """
    sums = {recipe.name: _Sum() for recipe in recipes}
    tokens = 0
    for index, reference in enumerate(answered):
        tokens += reference.cache.entries
        for recipe in recipes:
            _add(sums[recipe.name], answered.manifest, answered.prefix, reference, recipe)
        on_passage(index + 1)
    return Measured(
        rungs=tuple(_rung(name, total) for name, total in sums.items()),
        passages=len(answered),
        tokens=tokens,
        answer_positions=max(total.positions for total in sums.values()),
    )


def _add(total: _Sum, manifest: Manifest, prefix: LiveContext, reference: relay.Reference, recipe: Recipe) -> None:
    payload = relay.sent(manifest, reference.cache, recipe)
    live = relay.behind(prefix, relay.received(manifest, payload)[1], reference.cache.entries, room=reference.room)
    log_q = relay.along(live, relay.read_question(live, reference.question), reference.answer)
    total.payload_bits += 8 * len(payload)
    total.elements += reference.cache.elements
    total.kl += float(relay.divergence(reference.log_p, log_q).sum())
    total.agreeing += relay.agreeing(reference.log_p, log_q)
    total.positions += reference.positions


def _rung(name: str, total: _Sum) -> Rung:
    return Rung(
        name=name,
        bits_per_element=round(total.payload_bits / total.elements, 4),
        kl=round(total.kl / total.positions, 9),
        agreement=round(total.agreeing / total.positions, 6),
    )
