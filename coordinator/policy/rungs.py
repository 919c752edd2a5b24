"""Which rungs a link may use, and how high it may climb. The same rule for every policy (design, "A recipe").

Allowed is what keeps the request's quality floor (KL) and is small enough for the memory of both ends. Media are chosen
with the tightest allowed rung; then quality is raised with the time that is left (methods, section 2, "Order of aims").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from broker_config.messages import ModelInfo, Rung
from coordinator.errors import RequestImpossible
from coordinator.numbers import Floats, Ints
from coordinator.policy.shares import ROUNDING, Allocation, Shares, Timing
from coordinator.table import Groups

SLIGHTLY = 1e-4
"""By so much what min-max shares allow may end later by the evaluator, as it does without any raising."""


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


def raise_rungs(shares: Shares, base: Allocation, round_s: float = 0.0) -> Allocation:
    """The same media on the most faithful rungs that time allows.

    A request with a deadline that it meets may take until the deadline; one that misses it takes no longer than now;
    without a deadline all may take `tie_fraction` longer than the round takes now. The links with the largest loss
    climb first (ties: in the order of the scenario), each as long as its channels hold what it takes more. round_s:
    what the round takes of which these links are a part.
    """
    limits_s = _limits(shares, base, round_s)
    ladders, links = shares.table.ladders, np.arange(shares.table.count)
    needs, rungs, steps = _Needs(shares, base.own, limits_s), base.rungs, []
    rates = needs.at(rungs)
    climbing = base.carries & (rungs < ladders.top)
    while climbing.any():
        loss = ladders.loss[links, rungs]
        lossiest = climbing & (loss == loss[climbing].max())
        raised = np.where(lossiest, rungs + 1, rungs)
        wanted = needs.at(raised)
        held, held_alone = shares.roomy(base.own, rungs, raised, lossiest)
        fit, alone = shares.affordable(rates, wanted, held_alone)
        fit, alone = fit & held, alone & held_alone
        rungs, rates = np.where(fit, raised, rungs), np.where(fit, wanted, rates)
        climbing &= (~lossiest | alone) & (rungs < ladders.top)
        if fit.any():
            steps.append(rungs)
    return _highest(shares, base, steps, needs)


class _Needs:
    """The rates that end links by their limits, (K,), on these splits: what doesn't change with rungs is kept."""

    def __init__(self, shares: Shares, own: Floats, limits_s: Floats) -> None:
        self._shares, self._own, self.limits_s = shares, own[None, :], limits_s
        self._texts = shares.texts(self._own)
        self._coding: Floats = np.empty(0)
        self._timing: Timing | None = None

    def at(self, rungs: Ints) -> Floats:
        """The least; infinite where none does."""
        token_bits, encode_s, decode_s = self._shares.coded(rungs)
        coding = np.stack([encode_s, decode_s])
        if self._timing is None or not np.array_equal(self._coding, coding):
            self._coding, self._timing = coding, self._shares.timing(self._own, encode_s, decode_s, self._texts)
        rates, late = self._timing.rows(self._shares.table, token_bits).needed(self.limits_s)
        return np.where(late[0], np.inf, rates[0])


def _highest(shares: Shares, base: Allocation, steps: list[Ints], needs: _Needs) -> Allocation:
    """The last of these steps for which there are rates: what a link takes more, others of its receiver may pay for.

    And whose end the evaluator sees within the limits, too.
    """
    table = shares.table
    by_request_s = Groups(table.request, len(base.found.request_e2e_s)).least(needs.limits_s)
    found, low, high, at = base, 0, len(steps), len(steps) - 1
    while low < high:
        rates = needs.at(steps[at])
        fits = bool(np.isfinite(rates).all()) and bool(np.all(table.used(rates) <= table.free * (1 + ROUNDING)))
        held = shares.allocate_within(base.own, steps[at], needs.limits_s) if fits else None
        if held is not None and np.all(held.found.request_e2e_s <= by_request_s * (1 + SLIGHTLY)):
            found, low = held, at + 1
        else:
            high = at
        at = (low + high) // 2
    return found


def _limits(shares: Shares, base: Allocation, round_s: float) -> Floats:
    """Per link, until when its receiver must have ended all its requests (the earliest limit of them)."""
    scenario, table = shares.scenario, shares.table
    tied_s = max(base.e2e_s, round_s) * (1 + scenario.tie_fraction)
    own_s = np.where(np.isinf(table.deadlines_s), tied_s, np.maximum(table.deadlines_s, base.found.request_e2e_s))
    return np.asarray(table.receivers.least(own_s[table.request])[table.receivers.index])
