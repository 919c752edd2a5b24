"""From a question to a planned round: the policy is asked, local sources are set aside, text holders are named."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

import msgspec

from broker_config.messages import SLICE_TOKENS, Ask, ContextInfo, ModelInfo
from broker_config.messages.base import COORDINATOR
from coordinator.drift import Rule
from coordinator.errors import RequestImpossible
from coordinator.fleet import Fleet, link_channels, resolve_source
from coordinator.learning import Learning, LinkName, factor_of
from coordinator.policy import (
    POLICIES,
    PlanRequest,
    Policy,
    PressureCaps,
    RequestPlan,
    build_scenario,
    get_policy,
)
from coordinator.round import LocalSource, Round
from coordinator.settings import CoordinatorSettings
from coordinator.texts import Texts

HOLDERS = 64
"""As many as an order may name."""


def plan_round(
    ask: Ask,
    *,
    fleet: Fleet,
    settings: CoordinatorSettings,
    running: Collection[Round],
    texts: Texts,
    now_s: float,
    learning: Learning | None = None,
    policies: Mapping[str, Policy] = POLICIES,
) -> Round:
    """The round as the policy wants it, accepted at now_s. running: rounds in flight, whose transfers occupy channels.
    learning: what earlier rounds taught.

    Raises CoordinatorError, whose line says what to change.
    """
    expiry_s = settings.planning.expiry_s
    policy = get_policy(ask.policy or settings.planning.policy, policies)
    receiver = fleet.require_online(ask.receiver, now_s, expiry_s)
    if not ask.question.strip():
        raise RequestImpossible("the question is empty; ask something")
    if len(ask.sources) != len(set(ask.sources)):
        raise RequestImpossible("it names a source twice; name each context once")
    local: dict[str, LocalSource] = {}
    for source in ask.sources:
        if source.partition(":")[0] == ask.receiver and receiver.telemetry and receiver.model:
            context = resolve_source(fleet, source, now_s, expiry_s)[1]
            if any(context.context_id == each.context.context_id for each in local.values()):
                raise RequestImpossible(f"it names {ask.receiver}:{context.name} twice; name each context once")
            local[source] = local_source(ask, receiver.model, context, receiver.telemetry.memory.pressure)
    remote = tuple(source for source in ask.sources if source not in local)
    factors = learning.link_factors if learning else {}
    overheads_s = learning.overheads_s if learning else {}
    plan: RequestPlan | None = None
    if remote:
        scenario = build_scenario(
            fleet,
            [PlanRequest.of(msgspec.structs.replace(ask, sources=remote))],
            settings.site_channels(),
            airtime_free(fleet, settings, running, factors),
            now_s,
            caps=PressureCaps(settings.planning.pressure_caps),
            tie_fraction=settings.planning.tie_fraction,
            slice_tokens=SLICE_TOKENS,
            expiry_s=expiry_s,
            link_factors=factors,
            overheads_s=overheads_s,
        )
        plan = policy.plan(scenario).requests[0]
    links = iter(plan.links if plan else ())
    return Round(
        ask=ask,
        policy=policy.name,
        accepted_s=now_s,
        receiver_instance=receiver.instance,
        plan=plan,
        sources=tuple(local[source] if source in local else next(links) for source in ask.sources),
        holders=text_holders(
            [link.context_id for link in plan.links] if plan else [],
            fleet,
            texts,
            receiver=ask.receiver,
            now_s=now_s,
            expiry_s=expiry_s,
        ),
        rule=Rule(factor=settings.planning.revise_factor, interval_s=settings.planning.revise_interval_s),
        factors=factors,
        overhead_s=overheads_s.get(ask.receiver, 0.0),
    )


def local_source(ask: Ask, model: ModelInfo, context: ContextInfo, pressure: float) -> LocalSource:
    """A context of the receiver's own: used as it is kept, unless that loses more than is asked for."""
    loss = {rung.name: rung.kl for rung in (*model.baselines, *model.ladder)}
    best = min(model.ladder, key=lambda rung: rung.kl).name
    fitting = [rung for rung in model.ladder if rung.kl <= ask.quality_floor]
    least = ask.rung or max(fitting, key=lambda rung: rung.kl, default=model.ladder[0]).name
    fits = context.rung is not None and loss.get(context.rung, float("inf")) <= loss.get(least, 0.0)
    rung = context.rung if fits and context.rung else best
    return LocalSource(context=context, pressure=pressure, least=least, rung=rung)


def airtime_free(
    fleet: Fleet,
    settings: CoordinatorSettings,
    running: Collection[Round],
    factors: Mapping[LinkName, float] = MappingProxyType({}),
) -> dict[str, float]:
    """What transfers in flight leave of each channel, as fractions; of shares that change, the largest counts.

    factors: what was learned of links' rates.
    """
    used: dict[str, float] = {}
    for round_ in running:
        for link in round_.running_links():
            for channel, alone_bps in link_channels(fleet, link.sender, link.receiver, settings.site_channels()):
                learned_bps = alone_bps * factor_of(factors, link.sender, link.receiver)
                most_bps = max(link.share_bps, *(step.rate_bps for step in link.later_rates), 0.0)
                used[channel] = used.get(channel, 0.0) + most_bps / learned_bps
    return {channel: max(0.0, 1.0 - share) for channel, share in used.items()}


def text_holders(
    context_ids: Collection[str], fleet: Fleet, texts: Texts, *, receiver: str, now_s: float, expiry_s: float
) -> dict[str, tuple[str, ...]]:
    """By context, who can give its text if its transfer fails: the coordinator first, then agents that are online."""
    holders = {each: [COORDINATOR] if texts.find(fleet, each) is not None else [] for each in context_ids}
    for agent, state in sorted(fleet.agents.items()) if holders else ():
        for context in state.telemetry.contexts if state.telemetry else ():
            found = holders.get(context.context_id)
            if found is None or len(found) == HOLDERS or found[-1:] == [agent] or agent == receiver:
                continue
            if fleet.online(agent, now_s, expiry_s):
                found.append(agent)
    return {context_id: tuple(found) for context_id, found in holders.items()}
