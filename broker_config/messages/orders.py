"""What the coordinator (or a peer that fetches text) orders of an agent, and what the agent answers."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from broker_config.messages.agents import ContextInfo
from broker_config.messages.base import (
    AgentId,
    Answer,
    BitsPerSecond,
    Bytes,
    ContextText,
    Count,
    Digest,
    Id,
    Message,
    Name,
    Question,
    Reason,
    RungName,
    Seconds,
    Tokens,
)

ClientId = Annotated[
    str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", title="client id")
]


class AddContext(Message, frozen=True, kw_only=True, tag="add_context"):
    """Hold this text under this name, prefill it, keep its cache. Answered by ContextReply."""

    correlation: Id
    client: ClientId
    name: Name
    text: ContextText


class RemoveContext(Message, frozen=True, kw_only=True, tag="remove_context"):
    """Forget the context of this name, text and cache. Answered by ContextReply."""

    correlation: Id
    client: ClientId
    name: Name


class ListContexts(Message, frozen=True, kw_only=True, tag="list_contexts"):
    """Answered by ContextReply."""

    correlation: Id
    client: ClientId


class ContextReply(Message, frozen=True, kw_only=True, tag="context_reply"):
    """State after the operation; error is one line, empty when it succeeded."""

    correlation: Id
    agent: AgentId
    contexts: Annotated[tuple[ContextInfo, ...], Meta(max_length=4_096)] = ()
    error: Reason = ""


SLICE_TOKENS = 64
"""Of the slices that a receiver meets; what the coordinator plans in, too. Half a slice is lost at the meeting.

Of SmolLM2-135M's caches such slices take 0.5 % more bytes and 15 % more coding than those of 128 tokens; those of 32,
1.4 % and up to 60 %.
"""


class RateStep(Struct, frozen=True, kw_only=True):
    """From after_s seconds after an order on, a transfer has rate_bps."""

    after_s: Seconds
    rate_bps: Annotated[float, Meta(gt=0, le=1e15)]


RateSteps = Annotated[tuple[RateStep, ...], Meta(max_length=64)]


class PaceOrder(Message, frozen=True, kw_only=True, tag="pace"):
    """A transfer under way has another share from now on: what an order said of its rates before is void."""

    request: Id
    transfer: Id
    rate_bps: BitsPerSecond | None
    later_rates: RateSteps = ()


class SendOrder(Message, frozen=True, kw_only=True, tag="send"):
    """Send a context to `receiver` as one transfer.

    All token ids go first; then the entries of the others than the first own_tokens, which the receiver prefills
    itself, as cache at `rung`. So own_tokens = all is the token medium, 0 the cache medium. meet: the receiver goes on
    prefilling behind own_tokens, and the sender on sending before them, until they meet. facts_tokens: facts of the
    context go beside its cache, as many as take that many tokens in the prompt. rate_bps is this link's share (None:
    unpaced), later_rates what it is from so many seconds after the order on.
    """

    request: Id
    transfer: Id
    context_id: Digest
    receiver: AgentId
    own_tokens: Tokens
    rung: RungName
    meet: bool = False
    facts_tokens: Tokens = 0
    expires_s: Seconds
    chunk_bytes: Annotated[int, Meta(ge=1_024, le=262_144)] = 65_536
    rate_bps: BitsPerSecond | None = None
    later_rates: RateSteps = ()


class Part(Struct, frozen=True, kw_only=True):
    """One context of a question: which transfer brings it, and who holds its text if the transfer fails.

    own_tokens, meet: as in the sender's order; due_s: when all of it is planned to be there, from the order on, up to
    which the receiver computes no more than own_tokens if it comes as planned. text_holders in the order to be asked.
    The entry "coordinator" stands for the coordinator itself, which keeps the texts that were given to it; agents' ids
    may not be that word.
    """

    transfer: Id
    sender: AgentId
    context_id: Digest
    tokens: Tokens
    own_tokens: Tokens
    meet: bool = False
    due_s: Seconds = 0.0
    rung: RungName
    text_holders: Annotated[tuple[AgentId, ...], Meta(max_length=64)] = ()


class AnswerOrder(Message, frozen=True, kw_only=True, tag="answer"):
    """Join the parts in this order, prefill the question, generate, stream the answer to `answers/{request}`.

    What of a part has not arrived part_timeout_s after the order is given up: if the ids of its tokens have come, the
    receiver computes the rest from them, else its text is fetched.
    """

    request: Id
    asker: Annotated[str, Meta(max_length=64)]
    question: Question
    parts: Annotated[tuple[Part, ...], Meta(min_length=1, max_length=64)]
    part_timeout_s: Seconds
    expires_s: Seconds
    max_new_tokens: Annotated[int, Meta(ge=1, le=4_096)] = 32


class CancelOrder(Message, frozen=True, kw_only=True, tag="cancel"):
    """Stop whatever is under way for this request; its transfers end cancelled."""

    request: Id
    reason: Reason = ""


class TextReply(Message, frozen=True, kw_only=True, tag="text"):
    """The coordinator's answer to TextRequest: the text of a context, or None if it is not kept (any more)."""

    request: Id
    transfer: Id
    context_id: Digest
    text: ContextText | None


Order = AddContext | RemoveContext | ListContexts | SendOrder | PaceOrder | AnswerOrder | CancelOrder | TextReply


class TextRequest(Message, frozen=True, kw_only=True, tag="text_request"):
    """A receiver whose part failed asks the coordinator for the text (it asks an agent with a SendOrder)."""

    request: Id
    transfer: Id
    context_id: Digest
    agent: AgentId


FROM_IDS = "ids"
"""What replaced a transfer that failed after its header had come: its context's ids. No agent may have this id."""

EndState = Literal["delivered", "refused", "cancelled", "expired"]


class SendOutcome(Message, frozen=True, kw_only=True, tag="send_outcome"):
    """How one transfer ended at its sender. wire_bytes counts every chunk sent, repeats too."""

    request: Id
    transfer: Id
    agent: AgentId
    state: EndState
    payload_bytes: Bytes = 0
    wire_bytes: Bytes = 0
    prefill_s: Seconds = 0.0
    encode_s: Seconds = 0.0
    transfer_s: Seconds = 0.0
    reason: Reason = ""


class PartOutcome(Struct, frozen=True, kw_only=True):
    """How one part reached the receiver. state: how its transfer ended there.

    fallback: what replaced a transfer that failed: the holder of the text, or FROM_IDS where the receiver computed
    what was missing from the ids that had come; "" if nothing had to. own_tokens: so many of its tokens the receiver
    computed in the end, whatever the medium, in prefill_s. waited_s: nothing was left to do but wait.
    """

    transfer: Id
    sender: AgentId
    state: EndState
    payload_bytes: Bytes = 0
    receive_s: Seconds = 0.0
    decode_s: Seconds = 0.0
    prefill_s: Seconds = 0.0
    own_tokens: Tokens = 0
    waited_s: Seconds = 0.0
    fallback: Annotated[str, Meta(max_length=64)] = ""
    reason: Reason = ""


class AnswerPiece(Message, frozen=True, kw_only=True, tag="answer_piece"):
    """A piece of the answer as it is generated; index counts from 0."""

    request: Id
    agent: AgentId
    index: Count
    text: Answer
    token_ids: Annotated[tuple[Annotated[int, Meta(ge=0, le=2**24)], ...], Meta(max_length=4_096)] = ()


class AnswerOutcome(Message, frozen=True, kw_only=True, tag="answer_outcome"):
    """How the question ended at the receiver, with the seconds of each stage."""

    request: Id
    agent: AgentId
    state: Literal["answered", "failed", "cancelled", "expired"]
    answer: Answer = ""
    answer_tokens: Tokens = 0
    context_tokens: Tokens = 0
    parts: Annotated[tuple[PartOutcome, ...], Meta(max_length=64)] = ()
    queued_s: Seconds = 0.0
    question_s: Seconds = 0.0
    first_token_s: Seconds = 0.0
    total_s: Seconds = 0.0
    reason: Reason = ""


Outcome = SendOutcome | AnswerOutcome | TextRequest
