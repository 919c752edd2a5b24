"""One connection of aiomqtt: enter it, call over it while it lasts, learn why it ended, leave it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import aiomqtt
from paho.mqtt.reasoncodes import ReasonCode

from broker_config.bus.routes import Routes

T = TypeVar("T")

_BAD_CREDENTIALS = frozenset({134, 135})  # CONNACK 4 and 5 of MQTT 3.1.1, as paho translates them


class ConnectionLost(Exception):
    """The connection ended before a call over it did. Never leaves this package."""


class Inbound(asyncio.Queue[aiomqtt.Message]):
    """Stands where aiomqtt has a queue, and hands every message on at once: a queue drops what does not fit."""

    def __init__(self, routes: Routes) -> None:
        super().__init__()
        self._routes = routes

    def put_nowait(self, item: aiomqtt.Message) -> None:
        """Dispatch; called by paho for every message it has read."""
        self._routes.dispatch(item.topic.value, item.payload)


@dataclass(frozen=True)
class Link:
    """One connection; `lost` ends with the reason when the connection does."""

    client: aiomqtt.Client
    lost: asyncio.Task[str]

    async def unless_lost(self, call: Coroutine[Any, Any, T], name: str) -> T:
        """Await a call to the broker. Raises ConnectionLost when the connection ends first."""
        task = asyncio.create_task(call, name=name)
        try:
            await asyncio.wait({task, self.lost}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ConnectionLost
            failure = task.exception()
            if isinstance(failure, aiomqtt.MqttCodeError):  # paho knows of the end before aiomqtt does
                await asyncio.wait({self.lost})
                raise ConnectionLost
            return task.result()
        finally:
            task.cancel()


def guard_writer(client: aiomqtt.Client) -> None:
    """Keep aiomqtt from watching a closed socket.

    It asks for a writable socket by file descriptor, one turn of the loop later; if the connection ends in that turn,
    the descriptor is closed, or already another connection's.
    """
    paho, loop = client._client, asyncio.get_running_loop()

    def write() -> None:
        with suppress(OSError, ValueError):  # the reading side notices, and says so
            paho.loop_write()

    def watch(sock: Any) -> None:
        if paho.socket() is sock:
            loop.add_writer(cast("Any", sock), write)

    def register(_client: object, _userdata: object, sock: Any) -> None:
        loop.call_soon_threadsafe(watch, sock)

    paho.on_socket_register_write = register


async def until_lost(client: aiomqtt.Client) -> str:
    """Wait for the end of a connection; returns the reason."""
    try:
        async for _ in client.messages:
            pass
    except aiomqtt.MqttError as error:
        cause = error.__cause__
        # paho knows only that the socket failed: the broker went, threw us out for another client of our id, or the
        # network did it
        unknown = not isinstance(cause, aiomqtt.MqttCodeError) or cause.rc is None or why(cause) == "unspecified error"
        return "the connection was cut" if unknown else f"the connection was lost: {why(cast('Exception', cause))}"
    return "the connection was closed"


async def enter(client: aiomqtt.Client) -> None:
    """Connect. A thread does it, which can't be stopped: when cancelled, wait for it and close what it opened.

    aiomqtt forgets an end that comes in the same turn of the loop as the broker's welcome, and would wait forever.
    """
    ended = client._disconnected
    entering = asyncio.create_task(client.__aenter__(), name="kvbus connect")
    try:
        await asyncio.shield(entering)
    except aiomqtt.MqttError:
        await leave(client)
        raise
    except asyncio.CancelledError:
        with suppress(aiomqtt.MqttError):
            await entering
        await leave(client)
        raise
    if ended.done():
        await leave(client)
        raise aiomqtt.MqttError("the connection was cut") from ended.exception()


async def leave(client: aiomqtt.Client) -> None:
    """Say goodbye if there is someone to say it to, and close the socket: aiomqtt leaves it open after a failure."""
    paho = client._client
    if paho.is_connected():
        with suppress(aiomqtt.MqttError):
            await client.__aexit__(None, None, None)
    paho._sock_close()
    await asyncio.sleep(0)  # its callbacks end aiomqtt's own task


def why(error: BaseException) -> str:
    """What aiomqtt says of a failure, in a line for people."""
    if isinstance(error, aiomqtt.MqttCodeError) and isinstance(error.rc, ReasonCode):
        hint = "; check username and password_file" if error.rc.value in _BAD_CREDENTIALS else ""
        return f"{str(error.rc).lower()}{hint}"
    if str(error) == "Operation timed out":
        return "it accepted the connection but did not answer"
    text = re.sub(r"^\[Errno -?\d+\] ", "", " ".join(str(error).split()))
    return text[:1].lower() + text[1:] or type(error).__name__
