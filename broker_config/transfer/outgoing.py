"""The sending end of a transfer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import aclosing, suppress
from typing import Any, Literal

from broker_config.bus.contract import Bus
from broker_config.errors import (
    BrokerUnreachable,
    BusError,
    PublishTimeout,
    TransferCancelled,
    TransferError,
    TransferExpired,
    TransferRefused,
)
from broker_config.messages import MAX_CHUNK_BYTES, Abort, Ack, Bulk, Chunk, Open
from broker_config.topics import ACKS, BULK
from broker_config.transfer.assembly import checksum
from broker_config.transfer.cutting import cut
from broker_config.transfer.pacing import Pacer
from broker_config.transfer.window import REORDERING_S, Sent, Window
from broker_config.wire import pack

logger = logging.getLogger(__name__)

MIN_CHUNK_BYTES = 1_024
DEFAULT_CHUNK_BYTES = 65_536
DEFAULT_WINDOW_BYTES = 1 << 20

ABORT_S = 1.0  # a goodbye may not hold up whoever cancels
MAX_PUBLISHING = 16  # below the bus's own limit: other transfers and probes share the connection
FORGOTTEN_ROUNDS = 3  # timeouts in a row that the receiver answers with "start again": a late answer does not do that
RETRY_S = 0.25  # a bus that is closed, say, fails at once each time
FIXED_HEADER_BYTES = 9  # MQTT's header with packet id and the topic's length

ENDINGS: dict[str, type[TransferError]] = {
    "refused": TransferRefused,
    "cancelled": TransferCancelled,
    "expired": TransferExpired,
}


async def send(
    *,
    bulk: Bus,
    control: Bus,
    sender: str,
    receiver: str,
    transfer: str,
    request: str,
    pieces: AsyncIterator[bytes] | Iterable[bytes],
    total_bytes: int | None,
    expires_s: float,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    rate_bps: float | None = None,
    pacer: Pacer | None = None,
    window_bytes: int = DEFAULT_WINDOW_BYTES,
    on_progress: Callable[[int], None] | None = None,
) -> Sent:
    """Send a payload and wait until the receiver has all of it, or says that it has enough.

    pieces: of any size; they may still be being made; an empty one says that what there is must not wait for more to
    fill a chunk. total_bytes: their sum if it is known. chunk_bytes: 1,024 to
    262,144. rate_bps: bits per second at most, envelopes and repeats counted (None: unpaced). pacer: instead, where the
    rate is to change. window_bytes: so much may be unacknowledged at once, but two chunks always may. expires_s: from
    now on.

    on_progress is told how many bytes of the payload were acknowledged in all, whenever that grows.

    Chunks go over bulk, acknowledgements come over control. A lost connection is waited out until the transfer
    expires. Raises TransferRefused, TransferCancelled or TransferExpired, as the receiver or the clock says; what the
    pieces raise; ValueError if they are not total_bytes long. If it is cancelled or fails, the receiver is told.
    """
    if not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES:
        raise ValueError(f"chunk_bytes must be {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES}, not {chunk_bytes}")
    opening = Open(
        transfer=transfer,
        request=request,
        sender=sender,
        chunk_bytes=chunk_bytes,
        expires_s=expires_s,
        total_bytes=total_bytes,
    )
    window = Window(window_bytes=window_bytes)
    outgoing = _Outgoing(bulk, opening, receiver, window, pacer or Pacer(rate_bps, chunk_bytes))
    outgoing.on_progress = on_progress
    acks = await control.subscribe(ACKS, outgoing.take, sender=sender, receiver=receiver)
    try:
        async with asyncio.timeout(expires_s) as clock:
            return await outgoing.run(pieces)
    except TransferError:
        raise  # the receiver's word: it knows
    except asyncio.CancelledError:
        await outgoing.abort("cancelled", "the sender cancelled it")
        raise
    except TimeoutError:
        if not clock.expired():  # one of the pieces' own
            await outgoing.abort("cancelled", "the sender could not make the payload")
            raise
        reason = f"not delivered within {expires_s:g} s, {window.next_index} chunks arrived"
        await outgoing.abort("expired", reason)
        raise TransferExpired(transfer, reason) from None
    except Exception as error:  # whatever the pieces raise goes on to the caller, once the receiver knows
        await outgoing.abort("cancelled", f"the sender could not make the payload: {type(error).__name__}")
        raise
    finally:
        await outgoing.stop()
        await acks.close()


class _Outgoing:
    """One transfer under way. One task makes chunks, one (run) decides what goes next, one per chunk publishes it."""

    def __init__(self, bulk: Bus, opening: Open, receiver: str, window: Window, pacer: Pacer) -> None:
        self._bulk, self._opening, self._receiver, self._window = bulk, opening, receiver, window
        self._made: asyncio.Queue[tuple[bytes, bool]] = asyncio.Queue(maxsize=2)
        self._pacer = pacer
        empty = pack(Chunk(transfer=opening.transfer, index=2**24, crc32=2**32 - 1, data=b"", last=False))
        address = BULK.at(site=bulk.site, receiver=receiver, sender=opening.sender)
        self._envelope_bytes = len(empty) + len(address) + FIXED_HEADER_BYTES
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._ended = asyncio.Event()
        self._end: Ack | None = None
        self._failure: BaseException | None = None
        self._must_open, self._opens = True, False
        self._opened_s: float | None = None
        self._heard = False
        self._start_again = False
        self._forgotten_rounds = 0
        self._wire_bytes = 0
        self._first_s: float | None = None
        self.on_progress: Callable[[int], None] | None = None

    async def run(self, pieces: AsyncIterator[bytes] | Iterable[bytes]) -> Sent:
        """Drive the transfer to its end."""
        clock = asyncio.get_running_loop().time
        self._spawn(self._make(pieces), "make chunks")
        while self._end is None:
            if self._failure is not None:
                raise self._failure
            self._news.clear()
            while self._window.room() and not self._made.empty():
                data, last = self._made.get_nowait()
                self._window.add(data, last=last, now_s=clock())
            if not await self._send_next():
                await self._wait_for_news()
        if self._end.state != "delivered":
            raise ENDINGS[str(self._end.state)](self._opening.transfer, self._end.reason or "no reason given")
        return Sent(
            payload_bytes=self._window.sent_bytes,
            wire_bytes=self._wire_bytes,
            transfer_s=clock() - (self._first_s if self._first_s is not None else clock()),
            chunks=self._window.sent_chunks,
            resent=self._window.resent,
        )

    def take(self, ack: Ack, parameters: Mapping[str, str]) -> None:
        """The handler of acknowledgements."""
        if ack.transfer != self._opening.transfer or ack.receiver != parameters["receiver"] or self._end is not None:
            return
        self._heard = True
        if ack.state is not None:
            if ack.state != "delivered" or ack.enough or self._window.complete:
                self._finish(ack)
        else:
            now_s = asyncio.get_running_loop().time()
            if self._window.acknowledged(ack.next_index, ack.missing, now_s):
                self._forgotten_rounds, self._start_again = 0, False
                if self.on_progress is not None:
                    self.on_progress(self._window.acknowledged_bytes)
            elif ack.next_index == 0 and 0 in ack.missing:
                if self._window.next_index == 0:
                    self._must_open = True  # it has chunks but knows nothing of the transfer
                else:
                    self._start_again = True
        self._news.set()

    async def abort(self, state: Literal["cancelled", "expired"], reason: str) -> None:
        """Tell the receiver that it is over, if that can be done quickly."""
        await self.stop()
        with suppress(BusError, TimeoutError):
            async with asyncio.timeout(ABORT_S):
                await self._publish(Abort(transfer=self._opening.transfer, state=state, reason=reason))

    async def stop(self) -> None:
        """End all tasks."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _make(self, pieces: AsyncIterator[bytes] | Iterable[bytes]) -> None:
        opening = self._opening
        try:
            async with aclosing(cut(pieces, opening.chunk_bytes, opening.total_bytes)) as chunks:
                async for chunk in chunks:
                    await self._made.put(chunk)
                    self._news.set()
        finally:
            if isinstance(pieces, AsyncGenerator):
                await pieces.aclose()
            self._news.set()

    async def _send_next(self) -> bool:
        """Start to publish one message, if one may go. Returns whether it did."""
        if self._must_open and not self._opens:
            self._must_open, self._opens = False, True
            self._spawn(self._open(), "open")
            return True
        if len(self._tasks) > MAX_PUBLISHING:
            return False
        index = self._window.pop_waiting()
        if index is None:
            return False
        size_bytes = len(self._window.held[index].data) + self._envelope_bytes
        await self._hold_back(self._pacer.delay_s(size_bytes))
        chunk = self._window.held.get(index)
        if chunk is not None and self._end is None:
            now_s = asyncio.get_running_loop().time()
            self._first_s = now_s if self._first_s is None else self._first_s
            self._wire_bytes += size_bytes
            self._window.started(index, now_s)
            self._spawn(self._publish_chunk(index, chunk.data, last=chunk.last), f"chunk {index}")
        return True

    async def _hold_back(self, delay_s: float) -> None:
        """Pacing, cut short when the receiver ends the transfer, begun anew when the rate changes."""
        while delay_s > 0 and self._end is None:
            self._pacer.changed.clear()
            waiting = [asyncio.ensure_future(event.wait()) for event in (self._ended, self._pacer.changed)]
            try:
                done, _ = await asyncio.wait(waiting, timeout=delay_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in waiting:
                    each.cancel()
            delay_s = self._pacer.wait_s() if done else 0.0

    async def _wait_for_news(self) -> None:
        """Until something has happened, or nothing has for too long."""
        now_s = asyncio.get_running_loop().time()
        self._window.rate_bps = self._pacer.rate_bps()
        deadline_s = self._window.deadline_s()
        try:
            async with asyncio.timeout(None if deadline_s is None else max(0.0, deadline_s - now_s)):
                await self._news.wait()
        except TimeoutError:
            self._window.timed_out(asyncio.get_running_loop().time())
            self._must_open = not self._heard
            self._forgotten_rounds = self._forgotten_rounds + 1 if self._start_again else 0
            self._start_again = False
            if self._forgotten_rounds >= FORGOTTEN_ROUNDS:
                reason = "the receiver has lost the beginning of it (was it restarted?)"
                self._finish(self._own_refusal(reason))

    def _own_refusal(self, reason: str) -> Ack:
        transfer, receiver = self._opening.transfer, self._receiver
        return Ack(transfer=transfer, receiver=receiver, next_index=0, state="refused", reason=reason)

    def _finish(self, ack: Ack) -> None:
        self._end = ack
        self._ended.set()

    async def _open(self) -> None:
        """Announce it, anew not at once: each announcement is answered, and while chunk 0 is missing each answer asks
        for one, a round trip apart.
        """
        clock = asyncio.get_running_loop().time
        if self._opened_s is not None:
            await asyncio.sleep(self._opened_s + REORDERING_S - clock())
        self._opened_s, self._must_open = clock(), False
        try:
            await self._publish(self._opening)
        except PublishTimeout:
            pass  # if it did not arrive, the receiver or the clock will say so
        except BrokerUnreachable as error:
            logger.info("transfer %s waits: %s", self._opening.transfer, error)
            await asyncio.sleep(RETRY_S)
            self._must_open = True
        self._opens = False
        self._news.set()

    async def _publish_chunk(self, index: int, data: bytes, *, last: bool) -> None:
        transfer = self._opening.transfer
        crc32 = checksum(transfer, index, data, last=last)
        chunk = Chunk(transfer=transfer, index=index, crc32=crc32, data=data, last=last)
        failed = False
        try:
            await self._publish(chunk)
        except PublishTimeout:
            pass  # it may be on its way still; acknowledgements tell
        except BrokerUnreachable:
            failed = True
            self._wire_bytes -= len(data) + self._envelope_bytes
            await asyncio.sleep(RETRY_S)
        self._window.published(index, failed=failed)
        self._news.set()

    async def _publish(self, message: Bulk) -> None:
        await self._bulk.publish(BULK, message, receiver=self._receiver, sender=self._opening.sender)

    def _spawn(self, work: Coroutine[Any, Any, None], what: str) -> None:
        task = asyncio.create_task(work, name=f"kvbus transfer {self._opening.transfer}: {what}")
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()
            self._news.set()
