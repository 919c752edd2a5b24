"""The field types every message is built from, and the base class of all messages.

A limit stands on every field, so that a message from a stranger can neither exhaust memory nor smuggle a NaN into the
policy: a lower bound refuses NaN too, since NaN compares false with everything.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated

from msgspec import Meta, Struct

PROTOCOL_VERSION = 1
"""The newest version that is understood here."""

SPOKEN_VERSION = max(1, PROTOCOL_VERSION - 1)
"""What messages say of themselves: the version before, so that neighbours understand one another while a fleet is being
updated. A field that came later has a default, which is what a receiver that doesn't know it does. A message that the
version before would misread says its own version, and goes to those only whose presence has it.
"""

COORDINATOR = "coordinator"
"""Where an agent's id may stand for the coordinator itself, this is its name; no agent may have it."""

Id = Annotated[str, Meta(pattern="^[0-9a-f]{16}\\Z", title="identifier", description="16 hexadecimal digits")]
Digest = Annotated[
    str, Meta(pattern="^[0-9a-f]{32}\\Z", title="digest", description="128 bits of SHA-256 in hexadecimal")
]
AgentId = Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9_-]{0,31}\\Z", title="agent id")]
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", title="context name")]
RungName = Annotated[
    str, Meta(min_length=1, max_length=32, pattern=r"^[a-z0-9][a-z0-9._-]*\Z", title="rung of the ladder")
]
Question = Annotated[str, Meta(min_length=1, max_length=4_096)]
ContextText = Annotated[str, Meta(min_length=1, max_length=262_144)]
Reason = Annotated[str, Meta(max_length=1_024)]
Answer = Annotated[str, Meta(max_length=65_536)]

Count = Annotated[int, Meta(ge=0, le=2**40)]
Tokens = Annotated[int, Meta(ge=0, le=2**24)]
Bytes = Annotated[int, Meta(ge=0, le=2**48)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
BitsPerSecond = Annotated[float, Meta(ge=0, le=1e15)]
PerSecond = Annotated[float, Meta(ge=0, le=1e15)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Nats = Annotated[float, Meta(ge=0, le=1e6)]


class Message(Struct, frozen=True, kw_only=True, tag_field="type"):
    """Root of everything that travels. version: the least that has to be known to read it.

    Fields that are not known here are ignored on arrival.
    """

    version: Annotated[int, Meta(ge=1, le=PROTOCOL_VERSION)] = SPOKEN_VERSION


_random_bytes: ContextVar[Callable[[int], bytes]] = ContextVar("random bytes of ids", default=secrets.token_bytes)


def new_id() -> str:
    """A fresh random Id (64 bits)."""
    return _random_bytes.get()(8).hex()


@contextmanager
def ids_from(random_bytes: Callable[[int], bytes]) -> Iterator[None]:
    """Inside the block, and in tasks begun there, ids are made of these bytes: for runs that are to be repeated."""
    token = _random_bytes.set(random_bytes)
    try:
        yield
    finally:
        _random_bytes.reset(token)
