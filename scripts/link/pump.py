"""One direction of one connection: read, wait for a turn in the bucket, wait for the delay, write."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable

from scripts.link.bucket import Bucket

RECEIVE_BUFFER_BYTES = 4_096
"""Small, so that a sender meets TCP's backpressure at once and can't take the kernel's memory for the link's speed."""

SEND_BUFFER_BYTES = 32_768

SEGMENT_BYTES = 1_448
"""As on a real network. With loopback's own 64 KiB segments the sender's kernel swallows megabytes at once."""

_LATE_BYTES = 32_768
_LATE_S = 0.02
"""A target that is so late with what it should have taken stops the sender, if more than that is held in all."""


def shape_socket(sock: socket.socket) -> None:
    """Bound what the kernel buffers on this socket and at its peer. To be called before connect or listen."""
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class DelayLine:
    """Holds bytes for the time a signal takes along the link, in order.

    It has room for whatever is on its way, at any rate that it was sent at; only what should have left it by now fills
    it. So it costs no throughput, and a receiver that does not read stops the sender all the same. One task puts, one
    takes.
    """

    def __init__(self, delay_s: Callable[[], float]) -> None:
        self._delay_s = delay_s
        self._line: deque[tuple[float, bytes]] = deque()
        self._held_bytes = 0
        self._arrived, self._left = asyncio.Event(), asyncio.Event()

    async def put(self, data: bytes) -> None:
        """Send bytes on their way; empty means the end. Waits while too much has not been taken in time."""
        due_s = asyncio.get_running_loop().time() + self._delay_s()
        while self._is_full():
            self._left.clear()
            await self._left.wait()
        self._line.append((due_s, data))
        self._held_bytes += len(data)
        self._arrived.set()

    async def take(self) -> bytes:
        """All that has reached the other end, at least one piece; empty at the end."""
        while not self._line:
            self._arrived.clear()
            await self._arrived.wait()
        loop = asyncio.get_running_loop()
        wait_s = self._line[0][0] - loop.time()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        pieces = [self._pop()]
        while pieces[-1] and self._line and self._line[0][1] and self._line[0][0] <= loop.time():
            pieces.append(self._pop())
        self._left.set()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _pop(self) -> bytes:
        _, data = self._line.popleft()
        self._held_bytes -= len(data)
        return data

    def _is_full(self) -> bool:
        if self._held_bytes <= _LATE_BYTES:
            return False
        return asyncio.get_running_loop().time() > self._line[0][0] + _LATE_S


class Pump:
    """Carries bytes from one socket to another through a bucket and a delay line, until the end or an error."""

    def __init__(
        self,
        source: socket.socket,
        target: socket.socket,
        *,
        bucket: Bucket,
        delay_s: Callable[[], float],
        passed: Callable[[int], None],
    ) -> None:
        """passed is told the number of bytes that were handed to the target."""
        self._source, self._target = source, target
        self._bucket, self._passed = bucket, passed
        self._line = DelayLine(delay_s)

    async def run(self) -> None:
        """Until the source has ended and all its bytes are delivered. Raises OSError if either side breaks."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read(), name="link-read")
            tasks.create_task(self._write(), name="link-write")

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(self._source, self._bucket.quantum_bytes):
            sent = 0
            while sent < len(data):
                granted = await self._bucket.take(len(data) - sent)
                await self._line.put(data[sent : sent + granted])
                sent += granted
        await self._line.put(b"")

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while data := await self._line.take():
            await loop.sock_sendall(self._target, data)
            self._passed(len(data))
        self._target.shutdown(socket.SHUT_WR)
