"""Bits by layer: the most sensitive get most (Q-KVComm, section III-B; methods.md 1.2)."""

from __future__ import annotations

from collections.abc import Sequence

from edge_agent.errors import RecipeInvalid

MIN_BITS, MAX_BITS = 4, 8
OUTER_SHARE = 0.3


def allocate(sensitivity: Sequence[float], target: int) -> tuple[int, ...]:
    """Bits of each layer that is sent: of n, the round(0.3 n) most sensitive get 8, the last round(0.3 n) get 4, the
    others `target`.

    sensitivity: one figure for each of those layers, more is more sensitive; among equals the earlier layer counts as
    the more sensitive. Raises RecipeInvalid for a target outside 4-8.
    """
    if not MIN_BITS <= target <= MAX_BITS:
        raise RecipeInvalid(f"target {target} bits: must be {MIN_BITS} to {MAX_BITS}")
    outer = round(OUTER_SHARE * len(sensitivity))
    order = sorted(range(len(sensitivity)), key=lambda layer: (-sensitivity[layer], layer))
    bits = [target] * len(sensitivity)
    for layer in order[:outer]:
        bits[layer] = MAX_BITS
    for layer in order[len(order) - outer :]:
        bits[layer] = MIN_BITS
    return tuple(bits)
