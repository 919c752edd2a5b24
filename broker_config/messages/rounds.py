"""What people ask of the coordinator, and what it reports. One round = one question over its links."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from broker_config.messages.base import (
    AgentId,
    Answer,
    BitsPerSecond,
    Bytes,
    ContextText,
    Count,
    Digest,
    Fraction,
    Id,
    Message,
    Name,
    Nats,
    Question,
    Reason,
    RungName,
    Seconds,
    Tokens,
)
from broker_config.messages.orders import ClientId

DEFAULT_QUALITY_FLOOR = 0.02

PolicyName = Annotated[str, Meta(min_length=1, max_length=32, pattern="^[a-z0-9_-]+\\Z")]
Source = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9][a-z0-9_-]{0,31}(:[A-Za-z0-9][A-Za-z0-9._-]{0,63})?\Z",
        description="an agent, or one context of it: pi-1 or pi-1:site-report",
    ),
]


class Ask(Message, frozen=True, kw_only=True, tag="ask"):
    """A question to be answered by `receiver` from what the sources hold. Events go to clients/{client}/events.

    rung: caches are sent at this one of the ladder, whatever its loss. facts_tokens: so many tokens of facts come with
    each cache.
    """

    request: Id
    client: ClientId
    question: Question
    sources: Annotated[tuple[Source, ...], Meta(min_length=1, max_length=64)]
    receiver: AgentId
    policy: PolicyName | None = None
    deadline_s: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    quality_floor: Nats = DEFAULT_QUALITY_FLOOR
    rung: RungName | None = None
    facts_tokens: Annotated[int, Meta(ge=0, le=1_024)] = 0
    max_new_tokens: Annotated[int, Meta(ge=1, le=4_096)] = 32


class CancelAsk(Message, frozen=True, kw_only=True, tag="cancel_ask"):
    """Withdraw a question."""

    request: Id


class Remind(Message, frozen=True, kw_only=True, tag="remind"):
    """A client that was cut off asks for the end of a question that it may have missed."""

    request: Id
    client: ClientId


class GiveContext(Message, frozen=True, kw_only=True, tag="give_context"):
    """Give an agent a text through the coordinator, which keeps a copy for fallbacks. Answered by ContextReply."""

    correlation: Id
    client: ClientId
    agent: AgentId
    name: Name
    text: ContextText


CoordinatorRequest = Ask | CancelAsk | Remind | GiveContext


class Stages(Struct, frozen=True, kw_only=True):
    """Seconds of each stage of a link, predicted or measured."""

    sender_prefill_s: Seconds = 0.0
    encode_s: Seconds = 0.0
    transfer_s: Seconds = 0.0
    decode_s: Seconds = 0.0
    receiver_prefill_s: Seconds = 0.0


class LinkReport(Struct, frozen=True, kw_only=True):
    """One link of a round: what was planned, and (once known) what came of it.

    computed_tokens: so many of its tokens the receiver computed itself in the end, where own_tokens were planned.
    """

    sender: AgentId
    context: Name
    context_id: Digest
    tokens: Tokens
    own_tokens: Tokens
    medium: Literal["tokens", "cache", "split"]
    rung: RungName
    link_bps: BitsPerSecond
    share_bps: BitsPerSecond
    sender_pressure: Fraction
    receiver_pressure: Fraction
    planned_bytes: Bytes
    fp16_bytes: Bytes
    text_bytes: Bytes
    predicted: Stages
    measured: Stages | None = None
    payload_bytes: Bytes | None = None
    wire_bytes: Bytes | None = None
    computed_tokens: Tokens | None = None
    fallback: Annotated[str, Meta(max_length=64)] = ""
    note: Reason = ""


class RoundReport(Struct, frozen=True, kw_only=True):
    """A round up to its one end. e2e_s: acceptance to first answer token, on the coordinator's clock.

    revisions: how often links had changed so much that shares were given anew under way.
    """

    request: Id
    question: Question
    receiver: AgentId
    policy: PolicyName
    state: Literal["planned", "answered", "failed", "cancelled", "expired"]
    links: Annotated[tuple[LinkReport, ...], Meta(max_length=64)] = ()
    quality_floor: Nats = DEFAULT_QUALITY_FLOOR
    deadline_s: Seconds | None = None
    predicted_e2e_s: Seconds = 0.0
    predicted_question_s: Seconds = 0.0
    e2e_s: Seconds | None = None
    total_s: Seconds | None = None
    question_s: Seconds | None = None
    answer: Answer = ""
    answer_tokens: Tokens = 0
    fallbacks: Count = 0
    revisions: Count = 0
    reason: Reason = ""


class Planned(Message, frozen=True, kw_only=True, tag="planned"):
    """The question was accepted and planned."""

    report: RoundReport


class Piece(Message, frozen=True, kw_only=True, tag="piece"):
    """A piece of the answer, passed on."""

    request: Id
    text: Answer


class Ended(Message, frozen=True, kw_only=True, tag="ended"):
    """The round's one end."""

    report: RoundReport


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """The question could not be taken; reason is the one line that says why."""

    request: Id
    reason: Reason


RoundEvent = Planned | Piece | Ended | Refused


class PredictionError(Struct, frozen=True, kw_only=True):
    """How far a policy's predictions of E2E were off in its last rounds, as shares of the measured.

    median_bias: above 0 if rounds were mostly faster than predicted.
    """

    policy: PolicyName
    rounds: Count
    median_error: Annotated[float, Meta(ge=0, le=1e6)]
    median_bias: Annotated[float, Meta(ge=-1, le=1e6)]


class CoordinatorPresence(Message, frozen=True, kw_only=True, tag="coordinator"):
    """Retained: whether a coordinator is there, and how well it has predicted its last rounds."""

    instance: Id
    state: Literal["online", "offline"]
    policies: tuple[PolicyName, ...] = ()
    errors: Annotated[tuple[PredictionError, ...], Meta(max_length=64)] = ()
