"""What the rest of the system needs of a bus. Tests have one in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeVar

from broker_config.messages import Message
from broker_config.topics import Topic

M = TypeVar("M")

Handler = Callable[[M, Mapping[str, str]], None]
"""Takes a message and the parameters of its topic (without site). Quick: it runs between two messages."""


class BusState(Enum):
    """Where the session stands. BACKOFF: the last attempt failed and the next one is waited for."""

    STOPPED = "stopped"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    BACKOFF = "backoff"


@dataclass(frozen=True, kw_only=True)
class Will:
    """What the broker publishes for us when the connection ends without a goodbye."""

    topic: Topic[Any]
    message: Message
    parameters: Mapping[str, str] = field(default_factory=dict)


class Subscription(Protocol):
    """A handler that is being called."""

    async def close(self) -> None:
        """Stop the calls; the broker is told when nobody else listens to the same topics. Never raises."""


class Bus(Protocol):
    """Typed publish and subscribe in one site. Delivery is at least once for QoS 1: handlers see duplicates."""

    @property
    def site(self) -> str:
        """The site all topics are in."""

    async def publish(self, topic: Topic[M], message: M, **parameters: str) -> None:
        """Hand a message to the broker; with QoS 1 wait for its acknowledgement.

        parameters: those of the topic, without site. Raises BrokerUnreachable if there was no connection in time,
        PublishTimeout if there was no acknowledgement in time (the message may arrive all the same), MessageRejected
        if it is longer than the topic allows.
        """

    async def subscribe(self, topic: Topic[M], handler: Handler[M], **parameters: str) -> Subscription:
        """Call the handler for every message on the topic; parameters left out match any one level.

        Without a connection the subscription is made at the next one. Raises BrokerUnreachable if the broker refuses
        it or does not answer.
        """
