"""A recorded session's plans, computed again by the same coordinator from what it had heard.

The coordinator runs in virtual time on a bus that brings it every message at the moment at which it had come. What it
tells goes nowhere; its plans are held against the recorded ones. Ids of transfers are new in every run: those that are
in the recording are exchanged, by their places in the orders, before the coordinator hears of them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import msgspec

from broker_config import topics
from broker_config.bus import Handler, Subscription
from broker_config.messages import AnswerOrder, LinkReport, Planned, RoundReport
from broker_config.topics import Topic
from coordinator.journal import Journal
from coordinator.recording import Event, Recorded
from coordinator.service import Coordinator
from coordinator.settings import CoordinatorSettings
from scripts.replay.clock import run_virtual

M = TypeVar("M")

SAME_SHARE = 1e-3
SAME_S = 5e-3
"""What is measured of a round differs between runs by what a program takes between two looks at the clock."""
TURNS = 12
"""Of the event loop, in which a coordinator has done all that a message makes it do."""


@dataclass(frozen=True)
class Compared:
    """One question's plan as it was recorded and as it came out again; None: there was, or is, none."""

    request: str
    recorded: RoundReport | None
    again: RoundReport | None

    @property
    def difference(self) -> str:
        """The first thing that differs, or ""."""
        if self.recorded is None or self.again is None:
            return "" if self.recorded is self.again else "only one of them has a plan"
        if self.recorded.policy != self.again.policy:
            return f"policy {self.recorded.policy}, again {self.again.policy}"
        if len(self.recorded.links) != len(self.again.links):
            return f"{len(self.recorded.links)} links, again {len(self.again.links)}"
        for one, other in zip(self.recorded.links, self.again.links, strict=True):
            if found := _link_difference(one, other):
                return f"{one.sender}:{one.context}: {found}"
        before_s, after_s = self.recorded.predicted_e2e_s, self.again.predicted_e2e_s
        if not math.isclose(before_s, after_s, rel_tol=SAME_SHARE, abs_tol=SAME_S):
            return f"predicted E2E {before_s:.4f} s, again {after_s:.4f} s"
        return ""


def _link_difference(one: LinkReport, other: LinkReport) -> str:
    for name in ("sender", "context_id", "medium", "rung", "own_tokens", "tokens", "planned_bytes"):
        if getattr(one, name) != getattr(other, name):
            return f"{name} {getattr(one, name)}, again {getattr(other, name)}"
    if not math.isclose(one.share_bps, other.share_bps, rel_tol=SAME_SHARE):
        return f"share {one.share_bps:.0f} bit/s, again {other.share_bps:.0f}"
    return ""


def plans_again(recorded: Recorded, hear: Callable[[float], None] = lambda _: None) -> tuple[Compared, ...]:
    """Every question of a session, in the order in which they were planned. hear: seconds of the session so far.

    Raises RecordingInvalid.
    """
    with TemporaryDirectory() as folder:
        return run_virtual(_again(recorded, Path(folder), hear), limit_s=None)


async def _again(recorded: Recorded, folder: Path, hear: Callable[[float], None]) -> tuple[Compared, ...]:
    session, clock = recorded.session, asyncio.get_running_loop().time
    settings = CoordinatorSettings(site=session.site, planning=session.planning, channels=session.channels)
    coordinator, bus = Coordinator(settings), _Stage(session.site)
    journal = Journal(folder / "rounds.jsonl")
    try:
        await coordinator.join(bus, journal, learned=session.learned)
        serving = asyncio.create_task(coordinator.serve())
        try:
            for event in recorded:
                since_s = event.at_s - session.clock_s
                await asyncio.sleep(since_s - clock())
                bus.bring(event)
                for _ in range(TURNS):
                    await asyncio.sleep(0)
                hear(since_s)
        finally:
            serving.cancel()
            await asyncio.wait({serving})
    finally:
        journal.close()
    return tuple(
        Compared(request, bus.recorded.plans.get(request), bus.again.plans.get(request))
        for request in dict.fromkeys((*bus.recorded.plans, *bus.again.plans))
    )


@dataclass(frozen=True)
class _Told:
    """What a coordinator told, by request: plans, and the transfers of each in the order of its parts."""

    plans: dict[str, RoundReport] = field(default_factory=dict)
    transfers: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def note(self, message: object) -> None:
        """If it is of either."""
        if isinstance(message, AnswerOrder):
            self.transfers[message.request] = tuple(part.transfer for part in message.parts)
        elif isinstance(message, Planned):
            self.plans[message.report.request] = message.report


class _Stage:
    """The coordinator's bus: brings what was recorded, keeps what it tells."""

    def __init__(self, site: str) -> None:
        self._site = site
        self._handlers: list[tuple[Topic[Any], Handler[Any]]] = []
        self._now: dict[str, str] = {}
        self.recorded, self.again = _Told(), _Told()

    @property
    def site(self) -> str:
        return self._site

    async def publish(self, topic: Topic[M], message: M, **parameters: str) -> None:  # noqa: ARG002
        """Always at once, and always well."""
        self._tell(self.again, message)

    async def subscribe(self, topic: Topic[M], handler: Handler[M], **parameters: str) -> Subscription:  # noqa: ARG002
        """The coordinator listens to all agents and all clients."""
        self._handlers.append((topic, handler))
        return _Listening()

    def bring(self, event: Event) -> None:
        """What was heard, to whom it may concern; of what was told, what there is to compare."""
        if event.way == "told":
            self._tell(self.recorded, event.message)
            return
        message = self._translated(event.topic, event.message)
        for topic, handler in self._handlers:
            if topic is event.topic:
                handler(message, event.parameters)

    def _tell(self, told: _Told, message: object) -> None:
        told.note(message)
        if isinstance(message, AnswerOrder):
            old, new = (each.transfers.get(message.request, ()) for each in (self.recorded, self.again))
            self._now.update(zip(old, new, strict=False))

    def _translated(self, topic: Topic[Any], message: Any) -> Any:
        if topic not in {topics.OUTCOMES, topics.TELEMETRY} or not self._now:
            return message
        content = msgspec.to_builtins(message, builtin_types=(bytes,))
        return msgspec.convert(_exchanged(content, self._now), topic.message, builtin_types=(bytes,))


class _Listening:
    async def close(self) -> None:
        """Nobody stops listening here."""


def _exchanged(content: Any, ids: Mapping[str, str]) -> Any:
    """The same with these strings in place of those."""
    if isinstance(content, dict):
        return {name: _exchanged(value, ids) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_exchanged(value, ids) for value in content]
    return ids.get(content, content) if isinstance(content, str) else content
