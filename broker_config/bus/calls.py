"""Request and reply over topics: MQTT 3.1.1 has neither reply topic nor correlation, so they are fields of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol, TypeVar

from broker_config.bus.contract import Bus
from broker_config.errors import RequestTimeout
from broker_config.topics import Topic

M = TypeVar("M")


class Correlated(Protocol):
    """A message that carries the id of the exchange it belongs to."""

    @property
    def correlation(self) -> str:
        """The id, the same in request and reply."""


R = TypeVar("R", bound=Correlated)


async def request(
    bus: Bus,
    topic: Topic[M],
    message: M,
    reply_topic: Topic[R],
    *,
    correlation: str,
    to: Mapping[str, str],
    reply_to: Mapping[str, str],
    timeout_s: float,
) -> R:
    """Publish a request and wait for the reply with the same correlation.

    to, reply_to: the parameters of either topic, without site; the message names who asks, so that the other side
    knows where to reply. Raises RequestTimeout after timeout_s without a reply, and what publish raises.
    """
    answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()

    def take(reply: R, _parameters: Mapping[str, str]) -> None:
        if reply.correlation == correlation and not answer.done():
            answer.set_result(reply)

    subscription = await bus.subscribe(reply_topic, take, **reply_to)
    try:
        async with asyncio.timeout(timeout_s):
            await bus.publish(topic, message, **to)
            return await answer
    except TimeoutError:
        raise RequestTimeout(topic.at(site=bus.site, **to), timeout_s) from None
    finally:
        await subscription.close()
