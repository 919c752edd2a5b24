"""What every policy is, and what it gives: a plan, from a scenario, without looking at anything else.

A policy differs from another in `choose` alone: which tokens of which links travel as cache. Rungs, shares and
prediction are the same code for all, so that they can be compared (methods, section 2: one evaluator).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal, Protocol

from broker_config.messages import LinkReport, RateStep, Stages
from coordinator.latency import Decision, Link, Prediction, Scenario, payload_bytes
from coordinator.numbers import Flags
from coordinator.policy.conserve import conserve, in_steps
from coordinator.policy.raising import raise_rungs
from coordinator.policy.shares import Allocation, Shares
from coordinator.policy.standing import Laid, Standing

Medium = Literal["tokens", "cache", "split"]

MEET_S = 0.5
"""A cache that is due later than this may come late: its receiver goes on computing then, as in a split. For one that
comes sooner the finer slices and smaller windows of a meeting are not worth it."""


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What a policy decided for all requests planned together. predicted_e2e_s is that of the slowest of them.

    within_s is the round's E2E that min-max allocation guarantees; the prediction is never above it. Held as columns:
    requests, links and bound_s are worked out when they are first asked for, by by_request and bound, which are pure.
    Plans are equal if all of these are. standing: what another plan can be made of.
    """

    policy: str
    predicted_e2e_s: float
    predicted_question_s: float
    within_s: float
    known: bool
    by_request: Callable[[], tuple[RequestPlan, ...]] = field(repr=False)
    bound: Callable[[], float | None] = field(repr=False)
    standing: Standing | None = field(default=None, repr=False)

    @cached_property
    def requests(self) -> tuple[RequestPlan, ...]:
        """In the order of the scenario."""
        return self.by_request()

    @cached_property
    def links(self) -> tuple[LinkPlan, ...]:
        """The links of all requests, in their order."""
        return tuple(link for request in self.requests for link in request.links)

    @cached_property
    def bound_s(self) -> float | None:
        """An E2E below which no plan of constant rates is, where it is known.

        Never above the prediction, which may be of rates that change.
        """
        found = self.bound()
        return None if found is None else min(found, self.predicted_e2e_s)

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values())

    def _values(self) -> tuple[object, ...]:
        figures = self.predicted_e2e_s, self.predicted_question_s, self.within_s, self.known
        return self.policy, *figures, self.requests, self.bound_s


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
    """Whether both ends of a split link go on until they meet, and of one with a whole cache that takes its time."""
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
        return plan_of(self, Standing.of(chosen, raised), shares, raised)


class BinaryPolicy(StagedPolicy):
    """A policy that gives every link one medium whole: its tokens or its cache."""

    def media(self, shares: Shares) -> Flags:
        """Which links carry their cache, (K,) bool; only where `shares.may_cache`."""
        raise NotImplementedError

    def choose(self, shares: Shares) -> Allocation:
        """Min-max shares of these media."""
        return shares.allocate(shares.own_of(self.media(shares)))


def unbounded() -> None:
    """The bound where none is known."""


def nothing(policy: str) -> Plan:
    """The plan of a scenario without links."""
    return Plan(
        policy=policy,
        predicted_e2e_s=0.0,
        predicted_question_s=0.0,
        within_s=0.0,
        known=True,
        by_request=tuple,
        bound=unbounded,
    )


def plan_of(
    policy: StagedPolicy, standing: Standing, shares: Shares | None = None, raised: Allocation | None = None
) -> Plan:
    """What stands as a plan, idle shares given out. shares, raised: of what stands, where they are at hand."""
    told = standing.raised
    if policy.conserves and in_steps(len(standing.scenario.links)):
        shares = shares or Shares(standing.scenario, standing.table)
        told = Laid.of(conserve(shares, raised or standing.allocation(standing.raised)))
    return Plan(
        policy=policy.name,
        predicted_e2e_s=float(told.request_e2e_s.max()),
        predicted_question_s=float(standing.question_s.max()),
        within_s=float(standing.raised.within_s.max()),
        known=bool(standing.known.all()),
        by_request=partial(_request_plans, standing, told, meets=policy.meets),
        bound=partial(_bound_s, policy, standing),
        standing=standing,
    )


def _bound_s(policy: StagedPolicy, standing: Standing) -> float | None:
    return policy.bound_s(Shares(standing.scenario, standing.table), standing.allocation(standing.chosen))


def _request_plans(standing: Standing, told: Laid, *, meets: bool) -> tuple[RequestPlan, ...]:
    allocation = standing.allocation(told)
    scenario, prediction = allocation.table.scenario, allocation.prediction
    by_request: list[list[LinkPlan]] = [[] for _ in scenario.requests]
    known = allocation.table.known.tolist()
    for index, decision in enumerate(allocation.decisions):
        plan = _link_plan(scenario, index, decision, prediction, known=known[index], meets=meets)
        by_request[scenario.links[index].request].append(plan)
    return tuple(
        RequestPlan(
            request=terms.request,
            receiver=terms.receiver,
            predicted_e2e_s=e2e_s,
            predicted_question_s=question_s,
            deadline_s=terms.deadline_s,
            late_s=max(0.0, e2e_s - terms.deadline_s) if terms.deadline_s else 0.0,
            known=all(plan.known for plan in plans),
            links=tuple(plans),
        )
        for terms, e2e_s, question_s, plans in zip(
            scenario.requests, prediction.request_e2e_s, prediction.question_s, by_request, strict=True
        )
    )


def _medium(link: Link, own_tokens: int) -> Medium:
    if own_tokens >= link.tokens:
        return "tokens"
    return "split" if own_tokens else "cache"


def _link_plan(
    scenario: Scenario, index: int, decision: Decision, prediction: Prediction, *, known: bool, meets: bool
) -> LinkPlan:
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
        known=known,
        note=link.note,
        meet=meets and (0 if prediction.arrive_s[index] > MEET_S else 1) <= decision.own_tokens < link.tokens,
        later_rates=tuple(RateStep(after_s=at, rate_bps=rate) for at, rate in decision.later),
    )
