"""The recorder: a bus through which the coordinator hears and tells, and which keeps all of it in a file.

What is kept is what planning depends on, and what came of it: presence, telemetry, questions, orders, outcomes, pieces
of answers, plans and ends. Chunks of caches are none of the coordinator's and pass it by. A file that can't be written
any more is one warning; the session goes on without it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import structlog

from broker_config.bus import Bus, Handler, Subscription
from broker_config.topics import Topic
from coordinator.errors import RecordingUnwritable
from coordinator.learning import Learned
from coordinator.recording import Event, Recording, Session, Way
from coordinator.settings import CoordinatorSettings

log = structlog.get_logger()

M = TypeVar("M")


class Keeps(Protocol):
    """What takes messages down: a Recording."""

    def add(self, event: Event) -> None:
        """Raises RecordingUnwritable."""

    def close(self) -> None:
        """Raises RecordingUnwritable."""


class RecordedBus:
    """A bus whose messages are recorded: what comes before its handler sees it, what goes before it is sent."""

    def __init__(self, bus: Bus, recording: Keeps) -> None:
        self._bus = bus
        self._recording: Keeps | None = recording

    @classmethod
    def begin(cls, bus: Bus, path: Path, settings: CoordinatorSettings, learned: Learned) -> Self:
        """Record a session to a file, or in a folder to one of its own. Raises RecordingUnwritable."""
        session = Session(
            site=settings.site,
            began_s=time.time(),
            clock_s=asyncio.get_running_loop().time(),
            planning=settings.planning,
            channels=settings.channels,
            learned=learned,
        )
        return cls(bus, Recording.named(path, session))

    @property
    def site(self) -> str:
        """As the bus has it."""
        return self._bus.site

    async def publish(self, topic: Topic[M], message: M, **parameters: str) -> None:
        """Raises what the bus raises."""
        self._keep("told", topic, parameters, message)
        await self._bus.publish(topic, message, **parameters)

    async def subscribe(self, topic: Topic[M], handler: Handler[M], **parameters: str) -> Subscription:
        """Raises what the bus raises."""

        def heard(message: M, at: Mapping[str, str]) -> None:
            self._keep("heard", topic, at, message)
            handler(message, at)

        return await self._bus.subscribe(topic, heard, **parameters)

    def close(self) -> None:
        """No more is recorded. Never raises."""
        recording, self._recording = self._recording, None
        if recording is not None:
            try:
                recording.close()
            except RecordingUnwritable as error:
                log.warning("the recording is not whole", error=str(error))

    def _keep(self, way: Way, topic: Topic[Any], parameters: Mapping[str, str], message: object) -> None:
        if self._recording is None:
            return
        try:
            self._recording.add(Event(asyncio.get_running_loop().time(), way, topic, parameters, message))
        except RecordingUnwritable as error:
            log.warning("nothing is recorded from here on", error=str(error))
            self._recording = None
