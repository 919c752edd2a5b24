"""What came of replays: a Result for each run, as values and as files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from broker_config.messages import Telemetry
from coordinator.recording import Event
from scripts.replay.asks import Asked, Taken
from scripts.replay.errors import ResultInvalid

VERSION = 1
LARGEST_FILE_BYTES = 512 * 2**20
EXACT = "float32"

Mode = Literal["virtual", "live", "recorded"]
Medium = Literal["tokens", "cache", "split"]


class LinkResult(Struct, frozen=True, kw_only=True):
    """One link of a question."""

    sender: str
    tokens: int
    own_tokens: int
    medium: Medium
    rung: str
    kl: float
    sent_bytes: int


class QuestionResult(Struct, frozen=True, kw_only=True):
    """One question. number: of the schedule; at_s: when it was asked first.

    refused, waited_s: how often it was refused before it was taken, and for how long; state "refused": it never was
    taken. taken_e2e_s: E2E from when it was taken on. kl: the largest loss of its links' rungs, in nats.
    """

    number: int
    at_s: float
    receiver: str
    tokens: int
    sources: int
    state: str
    deadline_s: float | None
    waited_s: float = 0.0
    taken_e2e_s: float | None = None
    predicted_s: float | None = None
    total_s: float | None = None
    links: tuple[LinkResult, ...] = ()
    kl: float = 0.0
    fallbacks: int = 0
    revisions: int = 0
    refused: int = 0
    reason: str = ""

    @property
    def e2e_s(self) -> float | None:
        """E2E from when it was asked first."""
        return None if self.taken_e2e_s is None else self.waited_s + self.taken_e2e_s

    @property
    def sent_bytes(self) -> int:
        """Of all links."""
        return sum(link.sent_bytes for link in self.links)

    @property
    def missed(self) -> bool:
        """Whether it had a deadline that it did not meet."""
        return self.deadline_s is not None and (self.e2e_s is None or self.e2e_s > self.deadline_s)


class AgentSeconds(Struct, kw_only=True):
    """What an agent told of itself, report by report, and what its link really did. caches: how many are kept as they
    were computed, coded, not at all.
    """

    agent: str
    time_s: list[float] = msgspec.field(default_factory=list)
    link_mbps: list[float | None] = msgspec.field(default_factory=list)
    uplink_mbps: list[float | None] = msgspec.field(default_factory=list)
    pressure: list[float] = msgspec.field(default_factory=list)
    caches: list[tuple[int, int, int]] = msgspec.field(default_factory=list)


class Result(Struct, frozen=True, kw_only=True):
    """One run. error: why it ended before its time, or "". seconds: of it, on the clock of whoever ran it."""

    version: int = VERSION
    mode: Mode
    site: str
    trace: str
    device: str
    policy: str
    seed: int
    duration_s: float
    questions: tuple[QuestionResult, ...]
    agents: tuple[AgentSeconds, ...] = ()
    error: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """What runs that differ in their policy have in common."""
        return self.site, self.trace, self.device, self.seed, self.mode


def question_result(number: int, asked: Asked, taken: Taken, kls: dict[str, float]) -> QuestionResult:
    """kls: of the rungs."""
    report = taken.report
    links = tuple(
        LinkResult(
            sender=link.sender,
            tokens=link.tokens,
            own_tokens=link.own_tokens,
            medium=link.medium,
            rung=link.rung,
            kl=0.0 if link.medium == "tokens" else kls.get(link.rung, 0.0),
            sent_bytes=link.wire_bytes or link.payload_bytes or 0,
        )
        for link in report.links
    )
    return QuestionResult(
        number=number,
        at_s=asked.at_s,
        receiver=asked.receiver,
        tokens=sum(link.tokens for link in links),
        sources=len(asked.sources),
        state=report.state,
        deadline_s=asked.deadline_s,
        waited_s=taken.waited_s,
        taken_e2e_s=report.e2e_s if report.state == "answered" else None,
        predicted_s=report.predicted_e2e_s,
        total_s=report.total_s,
        links=links,
        kl=max((link.kl for link in links), default=0.0),
        fallbacks=report.fallbacks,
        revisions=report.revisions,
        refused=taken.refused,
        reason=report.reason,
    )


def refused_result(number: int, asked: Asked, refused: int, reason: str) -> QuestionResult:
    """Of a question that was never taken."""
    return QuestionResult(
        number=number,
        at_s=asked.at_s,
        receiver=asked.receiver,
        tokens=0,
        sources=len(asked.sources),
        state="refused",
        deadline_s=asked.deadline_s,
        refused=refused,
        reason=reason,
    )


class Seconds:
    """Takes down what agents tell; a keeper of a RecordedBus. true_mbps: of an agent's link at a time."""

    def __init__(self, true_mbps: Any = None) -> None:
        self._true_mbps = true_mbps
        self._agents: dict[str, AgentSeconds] = {}

    @property
    def agents(self) -> tuple[AgentSeconds, ...]:
        """By name."""
        return tuple(self._agents[name] for name in sorted(self._agents))

    def add(self, event: Event, at_s: float | None = None) -> None:
        """Of what is heard, the reports. at_s: another time for it."""
        if event.way != "heard" or not isinstance(event.message, Telemetry):
            return
        message, at_s = event.message, event.at_s if at_s is None else at_s
        kept = self._agents.setdefault(message.agent, AgentSeconds(agent=message.agent))
        known = [context.rung for context in message.contexts]
        up_bps = message.link.uplink_bps
        kept.time_s.append(round(at_s, 3))
        kept.link_mbps.append(self._true_mbps(message.agent, at_s) if self._true_mbps else None)
        kept.uplink_mbps.append(None if up_bps is None else round(up_bps / 1e6, 4))
        kept.pressure.append(round(message.memory.pressure, 4))
        coded = sum(rung not in {None, EXACT} for rung in known)
        kept.caches.append((known.count(EXACT), coded, known.count(None)))

    def close(self) -> None:
        """Nothing is open."""


def write_results(path: Path, results: Iterable[Result]) -> None:
    """One JSON object a line; the whole file or none. Raises OSError."""
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("wb") as file:
            for result in results:
                file.write(msgspec.json.encode(result) + b"\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_results(path: Path) -> tuple[Result, ...]:
    """Raises ResultInvalid, which names the line."""
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise ResultInvalid(f"{path} has more than {LARGEST_FILE_BYTES} bytes")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ResultInvalid(f"{path} can't be read: {error.strerror}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            result = msgspec.json.decode(line, type=Result)
        except (ValueError, RecursionError) as error:
            raise ResultInvalid(f"{path}, line {number}: {error}") from None
        if result.version > VERSION:
            raise ResultInvalid(f"{path}, line {number}: version {result.version}; this program knows {VERSION}")
        found.append(result)
    if not found:
        raise ResultInvalid(f"{path} holds no result")
    return tuple(found)
