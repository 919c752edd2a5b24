"""From the fleet and what is asked to a scenario: everything a policy may look at, and nothing else.

Here every reason is found why a request can't be carried out (raised, coordinator.errors) or why a link can only go as
text (a note on the link): no rung within quality floor and memory pressure, or something that was not measured yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from broker_config.messages import DEFAULT_QUALITY_FLOOR, Ask, ContextInfo, ModelInfo
from coordinator.errors import ModelsDiffer, RequestImpossible
from coordinator.fleet import (
    EXPIRY_S,
    Channel,
    Fleet,
    link_bps,
    link_channels,
    resolve_source,
)
from coordinator.latency import HEADER_BYTES, TIE_FRACTION, Link, RequestTerms, Scenario, usable
from coordinator.policy.rungs import PressureCaps, allowed_rungs, common_rungs, named_rung, why_no_rung

FLOAT_BYTES = 4
"""An element of a cache as it is computed with."""
LEAST_FREE = 0.05
"""A round that comes while a channel is full is planned as if a twentieth were free: what is in flight will end."""
LARGEST_BPS = 1e15
"""As messages have it."""
BYTES_PER_TOKEN = 4
"""English text in the vocabularies used here; the question is short beside the contexts."""
QUESTION_FRAME_TOKENS = 12
"""What the prompt puts around a question."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A question as the planner needs it."""

    request: str
    sources: tuple[str, ...]
    receiver: str
    question_tokens: int
    deadline_s: float | None = None
    quality_floor: float = DEFAULT_QUALITY_FLOOR
    rung: str | None = None
    max_new_tokens: int = 0

    @classmethod
    def of(cls, ask: Ask) -> PlanRequest:
        """From the message, the length of the question estimated (a coordinator has no tokenizer), with its facts."""
        return cls(
            request=ask.request,
            sources=ask.sources,
            receiver=ask.receiver,
            question_tokens=QUESTION_FRAME_TOKENS
            + -(-len(ask.question.encode()) // BYTES_PER_TOKEN)
            + ask.facts_tokens * len(ask.sources),
            deadline_s=ask.deadline_s,
            quality_floor=ask.quality_floor,
            rung=ask.rung,
            max_new_tokens=ask.max_new_tokens,
        )


def build_scenario(
    fleet: Fleet,
    requests: Sequence[PlanRequest],
    channels: Sequence[Channel] = (),
    airtime_free: Mapping[str, float] | None = None,
    now_s: float = 0.0,
    *,
    caps: PressureCaps | None = None,
    tie_fraction: float = TIE_FRACTION,
    slice_tokens: int | None = None,
    header_bytes: int = HEADER_BYTES,
    expiry_s: float = EXPIRY_S,
    link_factors: Mapping[tuple[str, str], float] | None = None,
    overheads_s: Mapping[str, float] | None = None,
) -> Scenario:
    """The links of all requests, in the order of the requests and of their sources.

    airtime_free: what transfers in flight leave of each channel (1 if not named; raised to LEAST_FREE). link_factors:
    by (sender, receiver), what is multiplied with the measured rate of a link; overheads_s: by receiver.
    Raises AgentUnknown, AgentOffline, ContextNotHeld, ContextAmbiguous, ModelsDiffer, RequestImpossible (also where a
    sender's ladder lacks the rung that is asked for).
    """
    links: list[Link] = []
    terms: list[RequestTerms] = []
    for index, request in enumerate(requests):
        fleet.require_online(request.receiver, now_s, expiry_s)
        sources = [resolve_source(fleet, source, now_s, expiry_s) for source in request.sources]
        _check(fleet, request, sources)
        links += [
            replace(
                scaled(
                    _link(fleet, index, request, source, channels=channels, caps=caps or PressureCaps()),
                    (link_factors or {}).get((source[0], request.receiver), 1.0),
                ),
                receiver_overhead_s=(overheads_s or {}).get(request.receiver, 0.0),
            )
            for source in sources
        ]
        terms.append(
            RequestTerms(
                request=request.request,
                receiver=request.receiver,
                question_tokens=request.question_tokens,
                deadline_s=request.deadline_s,
                quality_floor=request.quality_floor,
            )
        )
    return Scenario(
        requests=tuple(terms),
        links=with_room(fleet, links),
        airtime_free={name: to_plan_with(free) for name, free in sorted((airtime_free or {}).items())},
        header_bytes=header_bytes,
        tie_fraction=tie_fraction,
        slice_tokens=slice_tokens,
    )


def with_room(fleet: Fleet, links: Sequence[Link]) -> tuple[Link, ...]:
    """The links with what is free at their receivers, less the caches of all their contexts, which must be there
    whatever travels.
    """
    joined: Counter[str] = Counter()
    for link in links:
        joined[link.receiver] += FLOAT_BYTES * link.tokens * link.elements_per_token
    free = {
        receiver: max(0, state.telemetry.memory.available_bytes - taken)
        for receiver, taken in joined.items()
        if (state := fleet.agents[receiver]).telemetry is not None
    }
    return tuple(replace(link, receiver_room_bytes=free.get(link.receiver, link.receiver_room_bytes)) for link in links)


def scaled(link: Link, factor: float) -> Link:
    """The link at so many times its rate, on all its channels."""
    return replace(
        link,
        link_bps=min(factor * link.link_bps, LARGEST_BPS),
        channels=tuple((name, min(factor * bps, LARGEST_BPS)) for name, bps in link.channels),
    )


def to_plan_with(free: float) -> float:
    """What of a channel is planned with, where transfers in flight leave so much, both as fractions."""
    return min(1.0, max(LEAST_FREE, free))


def _model(fleet: Fleet, agent: str) -> ModelInfo:
    model = fleet.agents[agent].model
    if model is None:
        raise RequestImpossible(f"{agent} has not said which model it runs; start it with a model bundle")
    return model


def _check(fleet: Fleet, request: PlanRequest, sources: Sequence[tuple[str, ContextInfo]]) -> None:
    if not sources:
        raise RequestImpossible("it names no source; name at least one agent that holds a context")
    mine = _model(fleet, request.receiver)
    seen: set[tuple[str, str]] = set()
    for agent, context in sources:
        theirs = _model(fleet, agent)
        if theirs.fingerprint != mine.fingerprint:
            raise ModelsDiffer(agent, theirs.name, request.receiver, mine.name)
        if (agent, context.context_id) in seen:
            raise RequestImpossible(f"it names {agent}:{context.name} twice; name each context once")
        seen.add((agent, context.context_id))
    tokens = sum(context.tokens for _, context in sources) + request.question_tokens + request.max_new_tokens
    if tokens > mine.window_tokens:
        raise RequestImpossible(
            f"{tokens} tokens of contexts, question and answer exceed the {mine.window_tokens} that {mine.name} on "
            f"{request.receiver} can hold; name fewer or shorter contexts"
        )


def _link(
    fleet: Fleet,
    index: int,
    request: PlanRequest,
    source: tuple[str, ContextInfo],
    *,
    channels: Sequence[Channel],
    caps: PressureCaps,
) -> Link:
    agent, context = source
    model = _model(fleet, agent)
    sent, received = fleet.agents[agent].telemetry, fleet.agents[request.receiver].telemetry
    if sent is None or received is None:
        raise RequestImpossible(f"no telemetry of {agent} or {request.receiver} yet; ask again in a few seconds")
    pressure = max(sent.memory.pressure, received.memory.pressure)
    rate_bps = link_bps(fleet, agent, request.receiver)
    ladder, baselines = (
        common_rungs(rungs, model, _model(fleet, request.receiver)) for rungs in (model.ladder, model.baselines)
    )
    if request.rung is None:
        rungs = allowed_rungs(ladder, request.quality_floor, pressure, caps)
        without = why_no_rung(request.quality_floor, pressure, caps)
    else:
        rungs = named_rung((*ladder, *baselines), request.rung, pressure, caps)
        without = f"rung {request.rung} is too large under memory pressure {pressure:.2f}: sent as text"
    notes = {
        "link not measured yet: sent as text": rate_bps is None,
        f"speed of {agent} not measured yet: sent as text": not usable(sent.speed),
        f"speed of {request.receiver} not measured yet: sent as text": not usable(received.speed),
        "prompt prefixes differ: sent as text": model.prefix != _model(fleet, request.receiver).prefix,
        without: not rungs,
    }
    ready = rungs if context.ready is None else tuple(rung for rung in rungs if rung.name in context.ready)
    note = next((note for note, applies in notes.items() if applies), "")
    return Link(
        request=index,
        sender=agent,
        receiver=request.receiver,
        context=context.name,
        context_id=context.context_id,
        tokens=context.tokens,
        elements_per_token=model.elements_per_token,
        bytes_per_token_id=model.bytes_per_token_id,
        cached=context.cached and bool(ready),
        reference=min(model.ladder, key=lambda rung: (rung.kl, -rung.bits_per_element, rung.name)),
        sender_speed=sent.speed,
        receiver_speed=received.speed,
        sender_rtt_s=sent.link.round_trip_s or 0.0,
        receiver_rtt_s=received.link.round_trip_s or 0.0,
        link_bps=rate_bps or 0.0,
        channels=link_channels(fleet, agent, request.receiver, channels),
        rungs=() if note else ready or rungs,
        sender_pressure=sent.memory.pressure,
        receiver_pressure=received.memory.pressure,
        note=note,
        kept=context.rung if context.cached else None,
    )
