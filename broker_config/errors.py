"""The errors of the bus, one tree.

BusError
├── ConfigurationError     a field of a TOML file is wrong; names the file and the field
├── MessageRejected        bytes from the bus are not a valid message; names the topic and the field
├── BrokerUnreachable      no connection to the broker (with its address and the reason)
├── PublishTimeout         the broker did not acknowledge in time; the message may arrive all the same
├── RequestTimeout         nobody answered a request
├── BrokerRefusedToStart   the embedded broker may not or cannot listen; says why
└── TransferError          a transfer ended otherwise than delivered
    ├── TransferRefused
    ├── TransferCancelled
    └── TransferExpired
"""

from __future__ import annotations

from typing import ClassVar

from broker_config.messages import EndState


class BusError(Exception):
    """Root of all errors of this package. str() is one line, fit for a person."""


class ConfigurationError(BusError):
    """A configuration file can't be used."""


class MessageRejected(BusError):
    """Bytes that arrived on a topic are not a valid message of its type."""

    def __init__(self, topic: str, why: str) -> None:
        super().__init__(f"message on {topic} rejected: {why}")
        self.topic, self.why = topic, why


class BrokerUnreachable(BusError):
    """No connection to the broker."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(f"no MQTT broker at {address}: {why}")
        self.address, self.why = address, why


class PublishTimeout(BusError):
    """The broker did not acknowledge a message in time."""

    def __init__(self, topic: str, timeout_s: float) -> None:
        super().__init__(f"the broker did not acknowledge a message on {topic} within {timeout_s:g} s")
        self.topic, self.timeout_s = topic, timeout_s


class RequestTimeout(BusError):
    """A request had no answer in time."""

    def __init__(self, topic: str, timeout_s: float) -> None:
        super().__init__(f"no answer to a request on {topic} within {timeout_s:g} s")
        self.topic, self.timeout_s = topic, timeout_s


class BrokerRefusedToStart(BusError):
    """The embedded broker may not or cannot listen."""


class TransferError(BusError):
    """A transfer ended otherwise than delivered. `state` is its end state, `reason` the line that says why."""

    state: ClassVar[EndState] = "refused"

    def __init__(self, transfer: str, reason: str) -> None:
        super().__init__(f"transfer {transfer} {self.state}: {reason}")
        self.transfer, self.reason = transfer, reason


class TransferRefused(TransferError):
    """The receiver refused it."""


class TransferCancelled(TransferError):
    """One side gave it up."""

    state: ClassVar[EndState] = "cancelled"


class TransferExpired(TransferError):
    """It was not complete in time."""

    state: ClassVar[EndState] = "expired"
