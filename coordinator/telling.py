"""Telling askers what becomes of their questions: events in order, and an end until it is told."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import structlog

from broker_config import topics
from broker_config.bus import Bus
from broker_config.errors import BusError, MessageRejected
from broker_config.messages import Ended, Piece, Planned, Refused

log = structlog.get_logger()

M = TypeVar("M")

UNTOLD_S = 600.0
"""An end that can't be told, since the broker is away, is tried again for so long; no asker waits longer."""
AGAIN_S = 0.5


class Teller:
    """Publishes to askers, one event at a time: first come, first served."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._turn = asyncio.Lock()
        self._closing = False

    def close(self) -> None:
        """From now on an end is tried once."""
        self._closing = True

    async def tell(self, client: str, event: Planned | Piece) -> None:
        """Tell what the end makes up for, should it get lost."""
        async with self._turn:
            await publish_or_log(self._bus, topics.EVENTS, event, client=client)

    async def tell_end(self, client: str, event: Ended | Refused) -> bool:
        """Tell an end, again and again while the broker is away. Whether there is nothing left to tell."""
        clock = asyncio.get_running_loop().time
        give_up_s = clock() + UNTOLD_S
        while True:
            try:
                async with self._turn:
                    await self._bus.publish(topics.EVENTS, event, client=client)
            except MessageRejected as error:  # nor will it ever be told
                log.error("an end can't be told", client=client, error=str(error))
            except BusError as error:
                log.warning("an end was not told yet", client=client, error=str(error))
                if self._closing or clock() > give_up_s:
                    return False
                await asyncio.sleep(AGAIN_S)
                continue
            return True


async def publish_or_log(bus: Bus, topic: topics.Topic[M], message: M, **parameters: str) -> None:
    """Publish; a failure is logged, since there is nobody else to tell."""
    try:
        await bus.publish(topic, message, **parameters)
    except BusError as error:
        log.warning("not published", topic=topic.pattern, error=str(error))
