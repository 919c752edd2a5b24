"""A large payload in pieces. Acknowledged end to end: a broker may acknowledge what it then drops."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from broker_config.messages.base import AgentId, Bytes, Count, Id, Message, Reason, Seconds
from broker_config.messages.orders import EndState

MAX_CHUNK_BYTES = 262_144
MAX_PROBE_BYTES = 1_048_576
"""Larger than a chunk, so that what a shaper lets through in one burst is a small part of it."""

ChunkIndex = Annotated[int, Meta(ge=0, le=2**24)]


class Open(Message, frozen=True, kw_only=True, tag="open"):
    """Announces a transfer. total_bytes is None while the payload is still being made."""

    transfer: Id
    request: Id
    sender: AgentId
    chunk_bytes: Annotated[int, Meta(ge=1_024, le=MAX_CHUNK_BYTES)]
    expires_s: Seconds
    total_bytes: Bytes | None = None


class Chunk(Message, frozen=True, kw_only=True, tag="chunk"):
    """One piece. (transfer, index) names it: duplicates are harmless. `last` closes the sequence.

    crc32 is over place and data, see broker_config.transfer.
    """

    transfer: Id
    index: ChunkIndex
    crc32: Annotated[int, Meta(ge=0, le=2**32 - 1)]
    data: Annotated[bytes, Meta(max_length=MAX_CHUNK_BYTES)]
    last: bool = False


class Abort(Message, frozen=True, kw_only=True, tag="abort"):
    """The sender gives the transfer up; `state` is what it ended as there, so that both ends say the same."""

    transfer: Id
    reason: Reason = ""
    state: Literal["cancelled", "expired"] = "cancelled"


Bulk = Open | Chunk | Abort


class Ack(Message, frozen=True, kw_only=True, tag="ack"):
    """From the receiver: all chunks below next_index are here, `missing` are gaps above them.

    state is None while the transfer runs; otherwise the end state, with its reason. enough: delivered although chunks
    are missing, which the receiver has no use for any more.
    """

    transfer: Id
    receiver: AgentId
    next_index: Count
    missing: Annotated[tuple[ChunkIndex, ...], Meta(max_length=256)] = ()
    state: EndState | None = None
    enough: bool = False
    reason: Reason = ""


class Probe(Message, frozen=True, kw_only=True, tag="probe"):
    """An agent sends it to itself over its bulk connection to measure its access link."""

    sequence: Count
    padding: Annotated[bytes, Meta(max_length=MAX_PROBE_BYTES)] = b""
