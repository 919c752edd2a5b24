"""Which rungs a link may use, and how high it may climb. The same rule for every policy (design, "A recipe").

Allowed is what keeps the request's quality floor (KL) and is small enough for the memory of both ends. Media are chosen
with the tightest allowed rung; then quality is raised with the time that is left (`raising`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from broker_config.messages import ModelInfo, Rung
from coordinator.errors import RequestImpossible


@dataclass(frozen=True)
class PressureCaps:
    """Bits per element at most, from a memory pressure on. Below the first threshold there is no cap."""

    steps: tuple[tuple[float, float], ...] = ((0.70, 2.5), (0.80, 1.6), (0.90, 1.1))

    def at_most(self, pressure: float) -> float:
        """The largest allowed bits per element at this pressure; infinite without a cap."""
        return min((bits for threshold, bits in self.steps if pressure >= threshold), default=float("inf"))


def allowed_rungs(ladder: Sequence[Rung], floor: float, pressure: float, caps: PressureCaps) -> tuple[Rung, ...]:
    """The rungs within floor and cap from tightest to most faithful, without those that cost more and keep less."""
    cap = caps.at_most(pressure)
    fitting = (rung for rung in ladder if rung.kl <= floor and rung.bits_per_element <= cap)
    allowed: list[Rung] = []
    for rung in sorted(fitting, key=lambda rung: (rung.bits_per_element, rung.kl, rung.name)):
        if not allowed or rung.kl < allowed[-1].kl:
            allowed.append(rung)
    return tuple(allowed)


def common_rungs(rungs: Sequence[Rung], sender: ModelInfo, receiver: ModelInfo) -> tuple[Rung, ...]:
    """Those of a sender's rungs that a receiver can decode."""
    same = sender.transform is not None and sender.transform == receiver.transform
    return tuple(rung for rung in rungs if same or not rung.transformed)


def named_rung(ladder: Sequence[Rung], name: str, pressure: float, caps: PressureCaps) -> tuple[Rung, ...]:
    """The rung of that name, whatever its loss, if memory at this pressure allows it. Raises RequestImpossible."""
    rung = next((rung for rung in ladder if rung.name == name), None)
    if rung is None:
        known = ", ".join(rung.name for rung in ladder)
        raise RequestImpossible(f"the model's ladder has no rung {name}; it has {known}")
    return (rung,) if rung.bits_per_element <= caps.at_most(pressure) else ()


def why_no_rung(floor: float, pressure: float, caps: PressureCaps) -> str:
    """The note of a link that has no rung."""
    squeezed = f" under memory pressure {pressure:.2f}" if np.isfinite(caps.at_most(pressure)) else ""
    return f"no rung keeps KL {floor:g}{squeezed}: sent as text"
