"""What every policy is, and what it gives: a plan, from a scenario, without looking at anything else.

A policy differs from another in `choose` alone: which tokens of which links travel as cache. Rungs, shares and
prediction are the same code for all, so that they can be compared (methods, section 2: one evaluator).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from broker_config.messages import LinkReport, RateStep, Stages
from coordinator.latency import Decision, Link, Prediction, Scenario, payload_bytes
from coordinator.numbers import Flags
from coordinator.policy.conserve import conserve
from coordinator.policy.rungs import raise_rungs
from coordinator.policy.shares import Allocation, Shares

Medium = Literal["tokens", "cache", "split"]


@dataclass(frozen=True, kw_only=True)
class LinkPlan:
    """What is planned for one link. Sizes in bytes as the model expects them, fp16_bytes and text_bytes without header.

    share_bps 0: unpaced, since the link was not measured. kl is the loss of the chosen rung, 0 for tokens.
    arrive_s: when the last bit is due at the receiver. known: the prediction rests on measurements only. meet: both
    ends go on until they meet, wherever that is. later_rates: what the share becomes later.
    """

    request: str
    sender: str
    receiver: str
    context: str
    context_id: str
    tokens: int
    own_tokens: int
    medium: Medium
    rung: str
    kl: float
    link_bps: float
    share_bps: float
    sender_pressure: float
    receiver_pressure: float
    planned_bytes: int
    fp16_bytes: int
    text_bytes: int
    predicted: Stages
    arrive_s: float
    known: bool
    note: str = ""
    meet: bool = False
    later_rates: tuple[RateStep, ...] = ()

    def report(self) -> LinkReport:
        """As the message that tells of it."""
        return LinkReport(
            sender=self.sender,
            context=self.context,
            context_id=self.context_id,
            tokens=self.tokens,
            own_tokens=self.own_tokens,
            medium=self.medium,
            rung=self.rung,
            link_bps=self.link_bps,
            share_bps=self.share_bps,
            sender_pressure=self.sender_pressure,
            receiver_pressure=self.receiver_pressure,
            planned_bytes=self.planned_bytes,
            fp16_bytes=self.fp16_bytes,
            text_bytes=self.text_bytes,
            predicted=self.predicted,
            note=self.note,
        )


@dataclass(frozen=True, kw_only=True)
class RequestPlan:
    """What is planned for one request. late_s: by how much it is expected to miss its deadline, 0 if it has none."""

    request: str
    receiver: str
    predicted_e2e_s: float
    predicted_question_s: float
    deadline_s: float | None
    late_s: float
    known: bool
    links: tuple[LinkPlan, ...]

    @property
    def meets_deadline(self) -> bool:
        """Whether it is expected in time; so is one without a deadline."""
        return self.late_s <= 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a policy decided for all requests planned together. predicted_e2e_s is that of the slowest of them.

    within_s is the round's E2E that min-max allocation guarantees; the prediction is never above it. bound_s, where it
    is known: an E2E below which no plan of constant rates is; never above the prediction, which may be of rates that
    change.
    """

    policy: str
    requests: tuple[RequestPlan, ...]
    predicted_e2e_s: float
    predicted_question_s: float
    within_s: float
    known: bool
    bound_s: float | None = None

    @property
    def links(self) -> tuple[LinkPlan, ...]:
        """The links of all requests, in their order."""
        return tuple(link for request in self.requests for link in request.links)


class Policy(Protocol):
    """Pure and deterministic."""

    @property
    def name(self) -> str:
        """As it is asked for and reported."""

    def plan(self, scenario: Scenario) -> Plan:
        """Medium, rung and share of every link."""


class StagedPolicy:
    """A policy that first ends the round as early as it can, on the tightest rungs, and then raises these."""

    name: str
    meets = False
    """Whether both ends of a split link go on until they meet."""
    conserves = False
    """Whether what links leave idle of their shares is given to others."""

    def choose(self, shares: Shares) -> Allocation:
        """What each link carries, with its rates, on the tightest rungs."""
        raise NotImplementedError

    def bound_s(self, shares: Shares, chosen: Allocation) -> float | None:  # noqa: ARG002
        """An E2E below which no plan of constant rates is; None where the policy knows of none."""
        return None

    def plan(self, scenario: Scenario) -> Plan:
        """Chosen, then raised; then idle shares are given out."""
        if not scenario.links:
            return nothing(self.name)
        shares = Shares(scenario)
        chosen = self.choose(shares)
        raised = raise_rungs(shares, chosen)
        found = conserve(shares, raised) if self.conserves else raised
        bound_s = self.bound_s(shares, chosen)
        return describe(self, scenario, found, bound_s=None if bound_s is None else min(bound_s, found.e2e_s))


class BinaryPolicy(StagedPolicy):
    """A policy that gives every link one medium whole: its tokens or its cache."""

    def media(self, shares: Shares) -> Flags:
        """Which links carry their cache, (K,) bool; only where `shares.may_cache`."""
        raise NotImplementedError

    def choose(self, shares: Shares) -> Allocation:
        """Min-max shares of these media."""
        return shares.allocate(shares.own_of(self.media(shares)))


def nothing(policy: str) -> Plan:
    """The plan of a scenario without links."""
    return Plan(policy=policy, requests=(), predicted_e2e_s=0.0, predicted_question_s=0.0, within_s=0.0, known=True)


def describe(policy: StagedPolicy, scenario: Scenario, allocation: Allocation, *, bound_s: float | None = None) -> Plan:
    """An allocation as a plan."""
    prediction, decisions = allocation.prediction, allocation.decisions
    links = [
        _link_plan(scenario, index, decision, prediction, meets=policy.meets)
        for index, decision in enumerate(decisions)
    ]
    by_request: list[list[LinkPlan]] = [[] for _ in scenario.requests]
    for link, plan in zip(scenario.links, links, strict=True):
        by_request[link.request].append(plan)
    requests = tuple(
        RequestPlan(
            request=terms.request,
            receiver=terms.receiver,
            predicted_e2e_s=prediction.request_e2e_s[index],
            predicted_question_s=prediction.question_s[index],
            deadline_s=terms.deadline_s,
            late_s=max(0.0, prediction.request_e2e_s[index] - terms.deadline_s) if terms.deadline_s else 0.0,
            known=all(plan.known for plan in by_request[index]),
            links=tuple(by_request[index]),
        )
        for index, terms in enumerate(scenario.requests)
    )
    return Plan(
        policy=policy.name,
        requests=requests,
        predicted_e2e_s=prediction.e2e_s,
        predicted_question_s=max(prediction.question_s),
        within_s=allocation.within_s,
        known=scenario.known,
        bound_s=bound_s,
    )


def _medium(link: Link, own_tokens: int) -> Medium:
    if own_tokens >= link.tokens:
        return "tokens"
    return "split" if own_tokens else "cache"


def _link_plan(scenario: Scenario, index: int, decision: Decision, prediction: Prediction, *, meets: bool) -> LinkPlan:
    link = scenario.links[index]
    rung = decision.rung or link.reference
    return LinkPlan(
        request=scenario.requests[link.request].request,
        sender=link.sender,
        receiver=link.receiver,
        context=link.context,
        context_id=link.context_id,
        tokens=link.tokens,
        own_tokens=decision.own_tokens,
        medium=_medium(link, decision.own_tokens),
        rung=rung.name,
        kl=decision.rung.kl if decision.rung else 0.0,
        link_bps=link.link_bps,
        share_bps=decision.rate_bps,
        sender_pressure=link.sender_pressure,
        receiver_pressure=link.receiver_pressure,
        planned_bytes=payload_bytes(
            link, decision.own_tokens, decision.rung, scenario.header_bytes, scenario.slice_tokens
        ),
        fp16_bytes=2 * link.tokens * link.elements_per_token,
        text_bytes=link.tokens * link.bytes_per_token_id,
        predicted=prediction.stages[index],
        arrive_s=prediction.arrive_s[index],
        known=link.known,
        note=link.note,
        meet=meets and 0 < decision.own_tokens < link.tokens,
        later_rates=tuple(RateStep(after_s=at, rate_bps=rate) for at, rate in decision.later),
    )
