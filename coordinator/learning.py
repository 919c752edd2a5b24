"""What outcomes teach: how fast links really are, what a receiver needs beside its stages, how wrong predictions were.

A state without I/O or clock. Nothing here changes what a device says of itself, and no measured E2E is fed back as a
factor: a link's rate is scaled by what its transfers achieved, a receiver gets a constant, and errors are only shown.

    ratio       goodput of a delivered transfer over the rate it was planned with, times the factor of that plan: what
                it got of the rate that was measured. Transfers that say nothing of the link are left out.
    factor      a low quantile of a link's last ratios, recent ones weighing more; 1 before there are three
    overhead    median of measured less predicted E2E of a receiver's last rounds, from 0 to half a second

All of it as a value is `Learned`, from which the learning of a coordinator that comes next begins.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from typing import Annotated, Generic, TypeVar

from msgspec import Meta, Struct

from broker_config.messages import PredictionError, RoundReport, SendOutcome
from broker_config.messages.base import AgentId
from broker_config.messages.rounds import PolicyName
from coordinator.policy import LinkPlan
from coordinator.probing import KEPT_PACE, PROBING
from coordinator.round import Round

QUANTILE = 0.3
"""Being late costs more than being early: shares are given by rates that seven transfers in ten reach."""
REMEMBERED, DECAY = 16, 0.9
"""So many outcomes of each link and receiver, each older one counting a tenth less."""
LEAST_OBSERVATIONS = 3
LEAST_FACTOR, LARGEST_FACTOR = 0.2, 1.2
LARGEST_OVERHEAD_S = 0.5
LEAST_BYTES = 256 * 1024
"""A shorter transfer says more of round trips than of rates."""
WORKED_SHARE = 0.5
"""Where coding took more of a transfer than this, the link may have waited for it."""
ERRORS_REMEMBERED = 64
LARGEST_ERROR = 1e6
MOST_LINKS, MOST_RECEIVERS, MOST_POLICIES = 512, 256, 64
"""Of more, those that were heard of longest ago are forgotten."""

LinkName = tuple[str, str]
"""Sender and receiver."""

Name = TypeVar("Name", bound=Hashable)


class LearnedLink(Struct, frozen=True, kw_only=True):
    """What the last transfers of a link got of its measured rate, oldest first."""

    sender: AgentId
    receiver: AgentId
    ratios: Annotated[
        tuple[Annotated[float, Meta(ge=LEAST_FACTOR / 2, le=2 * LARGEST_FACTOR)], ...],
        Meta(min_length=1, max_length=REMEMBERED),
    ]


class LearnedReceiver(Struct, frozen=True, kw_only=True):
    """What the last rounds of a receiver took beside their stages, oldest first."""

    receiver: AgentId
    excess_s: Annotated[
        tuple[Annotated[float, Meta(ge=0, le=LARGEST_OVERHEAD_S)], ...], Meta(min_length=1, max_length=REMEMBERED)
    ]


class LearnedPolicy(Struct, frozen=True, kw_only=True):
    """By what shares the last predictions of E2E exceeded what was measured, oldest first."""

    policy: PolicyName
    errors: Annotated[
        tuple[Annotated[float, Meta(ge=-1, le=LARGEST_ERROR)], ...],
        Meta(min_length=1, max_length=ERRORS_REMEMBERED),
    ]


class Learned(Struct, frozen=True, kw_only=True):
    """All that was learned; of each kind, what was heard of longest ago comes first."""

    links: Annotated[tuple[LearnedLink, ...], Meta(max_length=MOST_LINKS)] = ()
    receivers: Annotated[tuple[LearnedReceiver, ...], Meta(max_length=MOST_RECEIVERS)] = ()
    policies: Annotated[tuple[LearnedPolicy, ...], Meta(max_length=MOST_POLICIES)] = ()


class Learning:
    """Fed with every round that ended, asked when the next is planned. learned: where an earlier one stood."""

    def __init__(self, quantile: float = QUANTILE, learned: Learned | None = None) -> None:
        self._quantile = quantile
        self._ratios: _Last[LinkName] = _Last(REMEMBERED, MOST_LINKS)
        self._excess_s: _Last[str] = _Last(REMEMBERED, MOST_RECEIVERS)
        self._errors: _Last[str] = _Last(ERRORS_REMEMBERED, MOST_POLICIES)
        self.rounds = 0
        """Taken since it was made."""
        for link in learned.links if learned else ():
            self._ratios.add((link.sender, link.receiver), *link.ratios)
        for receiver in learned.receivers if learned else ():
            self._excess_s.add(receiver.receiver, *receiver.excess_s)
        for policy in learned.policies if learned else ():
            self._errors.add(policy.policy, *policy.errors)

    @property
    def learned(self) -> Learned:
        """All of it as a value."""
        return Learned(
            links=tuple(
                LearnedLink(sender=sender, receiver=receiver, ratios=tuple(ratios))
                for (sender, receiver), ratios in self._ratios.items()
            ),
            receivers=tuple(
                LearnedReceiver(receiver=receiver, excess_s=tuple(excess))
                for receiver, excess in self._excess_s.items()
            ),
            policies=tuple(
                LearnedPolicy(policy=policy, errors=tuple(errors)) for policy, errors in self._errors.items()
            ),
        )

    @property
    def link_factors(self) -> dict[LinkName, float]:
        """By which the measured rate of each known link is to be multiplied."""
        return {
            name: _clip(quantile(ratios, self._quantile), LEAST_FACTOR, LARGEST_FACTOR)
            for name, ratios in self._ratios.items()
            if len(ratios) >= LEAST_OBSERVATIONS
        }

    @property
    def overheads_s(self) -> dict[str, float]:
        """What each known receiver needs beside the stages of a round."""
        known = {name: excess for name, excess in self._excess_s.items() if len(excess) >= LEAST_OBSERVATIONS}
        return {name: statistics.median(excess) for name, excess in known.items()}

    def errors(self) -> tuple[PredictionError, ...]:
        """How far predictions of E2E were off, for each policy."""
        return tuple(
            PredictionError(
                policy=policy,
                rounds=len(errors),
                median_error=statistics.median(abs(error) for error in errors),
                median_bias=statistics.median(errors),
            )
            for policy, errors in sorted(self._errors.items())
        )

    def take(self, round_: Round, report: RoundReport) -> bool:
        """Learn from a round that ended. Whether `errors` has changed."""
        self.rounds += 1
        for link, outcome in round_.transferred():
            ratio = achieved(link, outcome, paced=round_.paced(link), factor=round_.factor(link))
            if ratio is not None:
                self._ratios.add((link.sender, link.receiver), ratio)
        plan = round_.plan
        if plan is None or not plan.known or report.state != "answered" or report.fallbacks or not report.e2e_s:
            return False
        without_s = max(0.0, report.predicted_e2e_s - round_.overhead_s)
        self._excess_s.add(report.receiver, _clip(report.e2e_s - without_s, 0.0, LARGEST_OVERHEAD_S))
        self._errors.add(report.policy, min(report.predicted_e2e_s / report.e2e_s - 1, LARGEST_ERROR))
        return True


class _Last(dict[Name, deque[float]], Generic[Name]):
    """The last values of each name, `kept` of them; of more names than `names` the longest unheard are forgotten."""

    def __init__(self, kept: int, names: int) -> None:
        super().__init__()
        self._kept, self._names = kept, names

    def add(self, name: Name, *values: float) -> None:
        last = self.pop(name, None) or deque(maxlen=self._kept)
        last.extend(values)
        self[name] = last
        while len(self) > self._names:
            del self[next(iter(self))]


def achieved(link: LinkPlan, outcome: SendOutcome, *, paced: bool, factor: float) -> float | None:
    """What a transfer got of its link's measured rate, or None if it says nothing of that.

    factor: by which the plan had multiplied the measured rate.
    """
    if outcome.state != "delivered" or link.share_bps <= 0 or outcome.payload_bytes < LEAST_BYTES:
        return None
    working_s = outcome.encode_s + (outcome.prefill_s if link.own_tokens else 0.0)  # in a split the ids go before it
    if outcome.transfer_s <= 0 or working_s > WORKED_SHARE * outcome.transfer_s:
        return None
    predicted_s, planned_bits = link.predicted.transfer_s, 8.0 * link.planned_bytes
    planned_bps = max(link.share_bps, planned_bits / predicted_s) if predicted_s > 0 else link.share_bps  # it may rise
    waiting_s = max(0.0, predicted_s - planned_bits / planned_bps)
    moving_s = outcome.transfer_s - waiting_s
    if moving_s < outcome.transfer_s / 2:
        return None
    ratio = 8 * outcome.payload_bytes / moving_s / planned_bps
    if paced and ratio >= KEPT_PACE:
        return max(factor, min(1.0, PROBING * factor))
    return _clip(ratio * factor, LEAST_FACTOR / 2, 2 * LARGEST_FACTOR)


def quantile(values: Iterable[float], share: float) -> float:
    """The least value that so large a share of the weight does not exceed; the last weighs 1, each before it less."""
    weighed = sorted((value, DECAY**age) for age, value in enumerate(reversed(list(values))))
    if not weighed:
        raise ValueError("no values")
    wanted, below = share * sum(weight for _, weight in weighed), 0.0
    for value, weight in weighed:
        below += weight
        if below >= wanted:
            return value
    return weighed[-1][0]


def factor_of(factors: Mapping[LinkName, float], sender: str, receiver: str) -> float:
    """A link's factor, 1 if nothing was learned of it."""
    return factors.get((sender, receiver), 1.0)


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
