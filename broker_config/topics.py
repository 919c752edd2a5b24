"""The topic tree: every topic is declared here once, with its message type, QoS, retain flag and size limit.

MQTT 3.1.1 only. `{…}` are single levels; a topic is turned into an address with `at`, into a subscription with
`filter` (a parameter left out becomes `+`), and taken apart with `parse`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from broker_config.messages import (
    Ack,
    AnswerPiece,
    Bulk,
    ContextReply,
    CoordinatorPresence,
    CoordinatorRequest,
    Order,
    Outcome,
    Presence,
    Probe,
    RoundEvent,
    Telemetry,
)

M = TypeVar("M")

KIBI = 1024


@dataclass(frozen=True, kw_only=True)
class Topic(Generic[M]):
    """One declared topic. max_bytes bounds what is read from it; connection says which of the two carries it."""

    pattern: str
    message: Any
    qos: Literal[0, 1] = 1
    retain: bool = False
    max_bytes: int = 64 * KIBI
    connection: Literal["control", "bulk"] = "control"

    def at(self, **parameters: str) -> str:
        """The address with all parameters filled in.

        Raises KeyError for one that is missing or unknown, ValueError for one that is no single level.
        """
        self._check(parameters)
        return self.pattern.format(**parameters)

    def filter(self, **parameters: str) -> str:
        """The MQTT subscription filter; parameters not given match any one level. Raises as `at` does."""
        self._check(parameters)
        return self.pattern.format(**{name: parameters.get(name, "+") for name in self.names})

    def parse(self, address: str) -> dict[str, str] | None:
        """The parameters of an address under this topic, or None if it is not one."""
        match = self._expression.fullmatch(address)
        return match.groupdict() if match else None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters, in the order of the pattern."""
        return tuple(re.findall(r"{(\w+)}", self.pattern))

    def _check(self, parameters: Mapping[str, str]) -> None:
        for name, value in parameters.items():
            if name not in self.names:
                raise KeyError(f"{self.pattern} has no parameter {name}")
            if not re.fullmatch(r"[^/+#\0]+", value):
                raise ValueError(f"{name} of {self.pattern} must be one topic level, not {value!r}")

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        return re.compile(re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", self.pattern))


PRESENCE: Topic[Presence] = Topic(pattern="kvbus/{site}/agents/{agent}/presence", message=Presence, retain=True)
TELEMETRY: Topic[Telemetry] = Topic(
    pattern="kvbus/{site}/agents/{agent}/telemetry", message=Telemetry, qos=0, retain=True, max_bytes=1024 * KIBI
)
ORDERS: Topic[Order] = Topic(pattern="kvbus/{site}/agents/{agent}/orders", message=Order, max_bytes=1100 * KIBI)
OUTCOMES: Topic[Outcome] = Topic(pattern="kvbus/{site}/agents/{agent}/outcomes", message=Outcome, max_bytes=1024 * KIBI)
ANSWERS: Topic[AnswerPiece] = Topic(pattern="kvbus/{site}/answers/{agent}/{request}", message=AnswerPiece)
BULK: Topic[Bulk] = Topic(
    pattern="kvbus/{site}/bulk/{receiver}/{sender}", message=Bulk, max_bytes=258 * KIBI, connection="bulk"
)
ACKS: Topic[Ack] = Topic(pattern="kvbus/{site}/acks/{sender}/{receiver}", message=Ack, qos=0)
PROBES: Topic[Probe] = Topic(
    pattern="kvbus/{site}/probes/{agent}", message=Probe, max_bytes=1026 * KIBI, connection="bulk"
)
PROBE_SINK: Topic[Probe] = Topic(
    pattern="kvbus/{site}/probes/{agent}/sink", message=Probe, max_bytes=1026 * KIBI, connection="bulk"
)
REQUESTS: Topic[CoordinatorRequest] = Topic(
    pattern="kvbus/{site}/coordinator/requests", message=CoordinatorRequest, max_bytes=1100 * KIBI
)
COORDINATOR: Topic[CoordinatorPresence] = Topic(
    pattern="kvbus/{site}/coordinator/presence", message=CoordinatorPresence, retain=True
)
EVENTS: Topic[RoundEvent] = Topic(
    pattern="kvbus/{site}/clients/{client}/events", message=RoundEvent, max_bytes=1024 * KIBI
)
REPLIES: Topic[ContextReply] = Topic(
    pattern="kvbus/{site}/clients/{client}/replies", message=ContextReply, max_bytes=1024 * KIBI
)

TOPICS: tuple[Topic[Any], ...] = (
    PRESENCE,
    TELEMETRY,
    ORDERS,
    OUTCOMES,
    ANSWERS,
    BULK,
    ACKS,
    PROBES,
    PROBE_SINK,
    REQUESTS,
    COORDINATOR,
    EVENTS,
    REPLIES,
)
