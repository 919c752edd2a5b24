"""The link of one agent: a listening port in front of the broker whose rate and delay can be changed while it runs."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import struct
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

from scripts.link.bucket import Bucket
from scripts.link.errors import ListenRefused
from scripts.link.pump import Pump, shape_socket

_CONNECT_TIMEOUT_S = 10.0
_ACCEPT_PAUSE_S = 0.1
_BACKLOG = 64
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class EmulatedLink:
    """A TCP proxy between an agent and the broker that gives each direction a rate and a delay.

    All connections of the agent share the two buckets. A bucket may be given to several links, which then share its
    rate as one channel; uplink and downlink may even be the same bucket (one radio cell). Use as an async context
    manager; agents connect to `host` and `port`.
    """

    def __init__(
        self,
        *,
        broker_host: str,
        broker_port: int,
        uplink: Bucket,
        downlink: Bucket,
        uplink_delay_s: float = 0.0,
        downlink_delay_s: float = 0.0,
        host: str = "127.0.0.1",
        port: int = 0,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """port 0 takes a free one. log gets one line for every event a person may want to know of.

        Raises ValueError if a delay is negative or not finite.
        """
        self.host, self.port = host, port
        self.uplink, self.downlink = uplink, downlink
        self.uplink_bytes = self.downlink_bytes = 0
        self._broker = (broker_host, broker_port)
        self._log = log if log is not None else _silent
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.set_delay(uplink_delay_s, downlink_delay_s)

    async def __aenter__(self) -> Self:
        await self.restore()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cut()

    @property
    def connections(self) -> int:
        """How many connections of the agent are open."""
        return len(self._connections)

    @property
    def delay_s(self) -> tuple[float, float]:
        """One-way delay, uplink and downlink."""
        return self._uplink_delay_s, self._downlink_delay_s

    def set_rate(self, uplink_bps: float | None = None, downlink_bps: float | None = None) -> None:
        """Change the rates; None leaves one as it is, 0 is an outage. A shared bucket changes for all its links."""
        if uplink_bps is not None:
            self.uplink.set_rate(uplink_bps)
        if downlink_bps is not None:
            self.downlink.set_rate(downlink_bps)

    def set_delay(self, uplink_delay_s: float, downlink_delay_s: float | None = None) -> None:
        """Change the one-way delays of what is sent from now on; one value is for both. Order is always kept."""
        if downlink_delay_s is None:
            downlink_delay_s = uplink_delay_s
        for delay_s in (uplink_delay_s, downlink_delay_s):
            if not math.isfinite(delay_s) or delay_s < 0:
                raise ValueError(f"a delay is a number of seconds, 0 or more, not {delay_s}")
        self._uplink_delay_s, self._downlink_delay_s = uplink_delay_s, downlink_delay_s

    async def cut(self) -> None:
        """Drop all connections, what is on its way is lost, and refuse new ones until `restore`."""
        tasks = {*self._connections}
        if self._accepting is not None:
            tasks.add(self._accepting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._accepting = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def restore(self) -> None:
        """Listen, on the same port as before. Does nothing if it listens. Raises ListenRefused."""
        if self._listener is not None:
            return
        self._listener = self._listen()
        self.port = int(self._listener.getsockname()[1])
        self._accepting = asyncio.create_task(self._accept(self._listener), name=f"link-accept-{self.port}")

    def _listen(self) -> socket.socket:
        address = f"{self.host}:{self.port}"
        try:
            family, _, _, _, place = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise ListenRefused(address, _reason(error)) from error
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            shape_socket(listener)
            listener.bind(place)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise ListenRefused(address, _reason(error)) from error
        return listener

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                agent, _ = await loop.sock_accept(listener)
            except OSError as error:
                self._log(f"a connection could not be accepted: {_reason(error)}")
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            task = asyncio.create_task(self._serve(agent), name=f"link-connection-{self.port}")
            self._connections.add(task)
            task.add_done_callback(partial(self._ended, agent))

    def _ended(self, agent: socket.socket, task: asyncio.Task[None]) -> None:
        agent.close()
        self._connections.discard(task)

    async def _serve(self, agent: socket.socket) -> None:
        """One connection from beginning to end."""
        _reset_at_close(agent)
        broker = await self._reach_broker()
        if broker is None:
            return
        with broker:
            _reset_at_close(broker)
            if await self._carry(agent, broker):
                _finish_at_close(agent)
                _finish_at_close(broker)

    async def _carry(self, agent: socket.socket, broker: socket.socket) -> bool:
        """Both directions until both have ended. False if a side broke off."""
        up = Pump(agent, broker, bucket=self.uplink, delay_s=lambda: self._uplink_delay_s, passed=self._passed_up)
        down = Pump(
            broker, agent, bucket=self.downlink, delay_s=lambda: self._downlink_delay_s, passed=self._passed_down
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(up.run(), name="link-uplink")
                tasks.create_task(down.run(), name="link-downlink")
        except* OSError as errors:
            self._log(f"a connection was broken off: {_reason(_first(errors))}")
            broken = True
        else:
            broken = False
        return not broken

    async def _reach_broker(self) -> socket.socket | None:
        host, port = self._broker
        loop = asyncio.get_running_loop()
        error: OSError = ConnectionError("no address")
        try:
            places = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as failure:
            places, error = [], failure
        for family, _, _, _, place in places:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                shape_socket(sock)
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    await loop.sock_connect(sock, place)
            except OSError as failure:
                sock.close()
                error = failure
            except asyncio.CancelledError:
                sock.close()
                raise
            else:
                return sock
        self._log(f"the broker at {host}:{port} can't be reached: {_reason(error)}; connection closed")
        return None

    def _passed_up(self, count: int) -> None:
        self.uplink_bytes += count

    def _passed_down(self, count: int) -> None:
        self.downlink_bytes += count


def _reset_at_close(sock: socket.socket) -> None:
    """So that a cut is noticed at once at both ends, and nothing the kernel holds is still delivered after it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)


def _finish_at_close(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _reason(error: BaseException) -> str:
    """One phrase; asyncio's own texts repeat the address."""
    if isinstance(error, socket.gaierror) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error) or ("timed out" if isinstance(error, TimeoutError) else type(error).__name__)


def _silent(_line: str) -> None:
    """Without a log nothing is said."""
