"""The receiving end of one transfer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from broker_config.errors import TransferCancelled, TransferError, TransferExpired, TransferRefused
from broker_config.messages import Ack, Chunk, EndState, Open
from broker_config.transfer.assembly import Assembly, Contradiction

ENDINGS: dict[EndState, type[TransferError]] = {
    "refused": TransferRefused,
    "cancelled": TransferCancelled,
    "expired": TransferExpired,
}


class Incoming:
    """One transfer as its receiver sees it. Made by Inbox.expect; read either by payload or by pieces, once.

    Times are seconds of the loop's monotonic clock. An Incoming that is not read to its end must be closed, since
    its bytes count against the inbox's limit.
    """

    def __init__(self, transfer: str, agent: str, tell: Callable[[Incoming], Awaitable[None]]) -> None:
        self.transfer, self.agent = transfer, agent
        self.sender: str | None = None
        self.state: EndState | None = None
        self.reason = ""
        self.first_chunk_s: float | None = None
        self.last_chunk_s: float | None = None
        self.enough = False
        self.expected = False
        self.released = False
        self._tell = tell
        self._assembly: Assembly | None = None
        self._read_bytes = 0
        self._news = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def opened(self) -> bool:
        """Whether the sender has announced it."""
        return self._assembly is not None

    @property
    def received_bytes(self) -> int:
        """Payload bytes that arrived so far, without repeats."""
        return self._assembly.received_bytes if self._assembly else 0

    @property
    def total_bytes(self) -> int | None:
        """What the sender announced; None while it isn't known."""
        return self._assembly.opening.total_bytes if self._assembly else None

    @property
    def claimed_bytes(self) -> int:
        """Bytes of the inbox's limit that this transfer holds, or will when all that was announced is here."""
        if self._assembly is None or self.released:
            return 0
        if self.state is None and self.total_bytes is not None:
            return self.total_bytes - self._read_bytes
        return self.received_bytes - self._read_bytes

    async def payload(self, timeout_s: float) -> bytes:
        """The whole payload, waited for.

        Raises TransferExpired if it is not complete after timeout_s (the sender is told), TransferRefused,
        TransferCancelled or TransferExpired if it ended so.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return b"".join([piece async for piece in self.pieces()])
        except TimeoutError:
            await self.expire(f"not complete within {timeout_s:g} s")
            raise TransferExpired(self.transfer, self.reason) from None

    async def pieces(self) -> AsyncIterator[bytes]:
        """The payload chunk by chunk, in order, as far as it has arrived. Raises as payload does, without a timeout."""
        while True:
            self._news.clear()
            while self._assembly is not None and self._assembly.ready:
                piece = self._assembly.ready.popleft()
                self._read_bytes += len(piece)
                yield piece
            if self.state == "delivered":
                self.close()
                return
            if self.state is not None:
                raise ENDINGS[self.state](self.transfer, self.reason)
            await self._news.wait()

    async def has_enough(self) -> None:
        """End it as delivered although more was to come, and tell the sender. Nothing happens if it has ended."""
        if self.state is None:
            self.enough = True
            self.end("delivered", "")
            self.close()
            await self._tell(self)

    async def refuse(self, reason: str) -> None:
        """End it as refused, and tell the sender. Nothing happens if it has ended already."""
        await self._end_and_tell("refused", reason)

    async def cancel(self, reason: str) -> None:
        """End it as cancelled, and tell the sender. Nothing happens if it has ended already."""
        await self._end_and_tell("cancelled", reason)

    async def expire(self, reason: str) -> None:
        """End it as expired, and tell the sender. Nothing happens if it has ended already."""
        await self._end_and_tell("expired", reason)

    def close(self) -> None:
        """Let go of all bytes. A transfer that has not ended ends as cancelled."""
        self.end("cancelled", "the receiver does not want it any more")
        self.released = True
        if self._assembly is not None:
            self._assembly.clear()

    def open(self, opening: Open, on_expiry: Callable[[Incoming], None]) -> None:
        """The announcement arrived. The inbox has checked it against its limits."""
        self.sender = opening.sender
        self._assembly = Assembly(opening=opening)
        self._timer = asyncio.get_running_loop().call_later(opening.expires_s, on_expiry, self)

    def add(self, chunk: Chunk) -> bool:
        """A chunk arrived. Returns whether the sender should hear of it at once, not soon."""
        if self._assembly is None or self.state is not None:
            return True
        now_s = asyncio.get_running_loop().time()
        try:
            verdict = self._assembly.add(chunk)
        except Contradiction as error:
            self.end("refused", str(error))
            return True
        if verdict != "new":
            return True
        self.first_chunk_s = now_s if self.first_chunk_s is None else self.first_chunk_s
        self.last_chunk_s = now_s
        self._news.set()
        if self._assembly.complete:
            self.end("delivered", "")
            return True
        return bool(self._assembly.missing())

    def acknowledgement(self) -> Ack:
        """What the sender is to know now. Chunks of a transfer whose announcement was lost make chunk 0 a gap."""
        next_index = 0
        missing: tuple[int, ...] = (0,)
        if self._assembly is not None:
            next_index, missing = self._assembly.next_index, self._assembly.missing()
        return Ack(
            transfer=self.transfer,
            receiver=self.agent,
            next_index=next_index,
            missing=() if self.state else missing,
            state=self.state,
            enough=self.enough,
            reason=self.reason,
        )

    def end(self, state: EndState, reason: str) -> None:
        """Its one end; later ones change nothing. The caller tells the sender."""
        if self.state is not None:
            return
        self.state, self.reason = state, reason[:1_024]
        if self._timer is not None:
            self._timer.cancel()
        if state != "delivered":
            self.released = True
            if self._assembly is not None:
                self._assembly.clear()
        self._news.set()

    async def _end_and_tell(self, state: EndState, reason: str) -> None:
        if self.state is None:
            self.end(state, reason)
            await self._tell(self)
