"""A payload on its way in virtual time: pieces in chunks through a window, at the pace of its share, over a flow."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from broker_config.errors import TransferCancelled, TransferError, TransferExpired, TransferRefused
from broker_config.messages import EndState, RateStep
from broker_config.transfer import Sent
from edge_agent.flow import Flow as Seen
from scripts.replay.network import Flow, Network
from scripts.replay.virtual.broker import Access, after_last

ENVELOPE_BYTES = 140
"""Topic, ids, checksum and headers of one chunk."""
LEAST_IN_WINDOW = 2
"""Chunks that may always be under way."""
REMEMBERED = 4_096
"""Transfers, far more than are under way at once."""
LONGEST_HOP_S = 1.0
"""What one chunk takes by itself on the faster link is counted up to here: an outage holds the flow itself."""

FAILURES: dict[EndState, type[TransferError]] = {
    "refused": TransferRefused,
    "cancelled": TransferCancelled,
    "expired": TransferExpired,
}


@dataclass(frozen=True)
class Header:
    """What goes first: of a context of so many tokens, the first own_tokens of which are to be computed."""

    context_id: str
    tokens: int
    own_tokens: int
    rung: str
    meet: bool


@dataclass(frozen=True)
class Slice:
    """Entries of the tokens [start, stop) of a context."""

    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """A part of a payload that goes at once. content: what its receiver has with its last byte."""

    nbytes: int
    content: Header | Slice


@dataclass(eq=False)
class Transfer:
    """One transfer as both ends know it. Each end's word reaches the other after the way between them."""

    transfer: str
    news: Callable[[], None] = lambda: None
    """Called at the receiver with every change."""
    wake_sender: Callable[[], None] = lambda: None
    arrived: deque[Piece] = field(default_factory=deque)
    received_bytes: int = 0
    first_s: float | None = None
    last_s: float | None = None
    complete: bool = False
    failed: EndState | None = None
    """How its sender ended it before that, or how its receiver did."""
    reason: str = ""
    enough: bool = False
    """Whether its receiver has no use for what has not come."""
    told: bool = False
    """Whether its sender has heard of either."""

    def arrive(self, nbytes: int, piece: Piece | None, *, last: bool, now_s: float) -> None:
        """A chunk is there; piece: which it completes."""
        if self.failed or self.enough:
            return
        self.received_bytes += nbytes
        self.first_s = now_s if self.first_s is None else self.first_s
        self.last_s = now_s
        if piece is not None:
            self.arrived.append(piece)
        self.complete = self.complete or last
        self.news()

    def fail(self, state: EndState, reason: str) -> None:
        """Ended by either end otherwise than delivered."""
        if not (self.failed or self.complete or self.enough):
            self.failed, self.reason = state, reason
            self.news()

    def tell_sender(self) -> None:
        """What its receiver has made of it has come back."""
        self.told = self.told or self.enough or self.failed is not None
        self.wake_sender()


class Transfers:
    """Those under way, and the last that were, by id: the end that comes late learns what became of it."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Transfer] = OrderedDict()

    def of(self, transfer: str) -> Transfer:
        """For one of its two ends, whichever comes first."""
        known = self._known.setdefault(transfer, Transfer(transfer))
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return known


class Outward:
    """The sending end of a transfer."""

    def __init__(
        self,
        transfer: Transfer,
        *,
        sender: Access,
        receiver: Access,
        chunk_bytes: int,
        window_bytes: int,
        rate_bps: float | None,
        later_rates: Sequence[RateStep],
        began_s: float,
        seen: Seen,
    ) -> None:
        self._transfer, self._sender, self._receiver, self._seen = transfer, sender, receiver, seen
        self._chunk_bytes, self._window_bytes = chunk_bytes, window_bytes
        self._network: Network = sender.network
        self._flow: Flow = self._network.flow((*sender.up, *receiver.down))
        self._steps: list[asyncio.TimerHandle] = []
        self._queue: asyncio.Queue[tuple[float, int, Piece | None, bool]] = asyncio.Queue()
        self._news = asyncio.Event()
        self._given_bits = self._last_s = 0.0
        self._under_way = self._acked_bytes = 0
        self.payload_bytes = self._chunks = 0
        """Of what was given."""
        self._first_s: float | None = None
        self._done = False
        transfer.wake_sender = self._news.set
        self.pace(rate_bps, later_rates, began_s)
        transfer.told = transfer.told or transfer.enough or transfer.failed is not None  # its Open would be told so

    @property
    def pace_bps(self) -> float | None:
        """Now."""
        return None if self._flow.pace_bps == float("inf") else self._flow.pace_bps

    def pace(self, rate_bps: float | None, later: Sequence[RateStep], began_s: float) -> None:
        """From now on; later rates so long after began_s."""
        for step in self._steps:
            step.cancel()
        loop = asyncio.get_running_loop()
        self._flow.set_pace(rate_bps or float("inf"))
        self._steps = [loop.call_at(began_s + step.after_s, self._flow.set_pace, step.rate_bps) for step in later]

    async def send(self, pieces: AsyncIterator[tuple[Piece, bool]]) -> Sent:
        """All pieces, each with whether it is the last, until the receiver has them or says that it has enough.

        Raises TransferError as the receiver says, and what the pieces raise.
        """
        loop = asyncio.get_running_loop()
        mover = asyncio.create_task(self._move(), name=f"transfer {self._transfer.transfer}")
        giver = asyncio.create_task(self._give_all(pieces), name=f"pieces of {self._transfer.transfer}")
        giver.add_done_callback(lambda _: self._news.set())
        try:
            while not self._ended:
                if giver.done():
                    giver.result()
                await self._wait()
        finally:
            for task in (mover, giver):
                task.cancel()
            for step in self._steps:
                step.cancel()
            if self.pace_bps is None:
                self._flow.finish()  # what the connection has taken goes its way
            else:
                self._flow.end()  # it was held back for its turn
            await _all_done(mover, giver)
            if not giver.cancelled():
                giver.exception()  # of pieces that nobody waits for any more
        if self._transfer.told and self._transfer.failed:
            raise FAILURES[self._transfer.failed](self._transfer.transfer, self._transfer.reason)
        return Sent(
            payload_bytes=self.payload_bytes,
            wire_bytes=self.payload_bytes + ENVELOPE_BYTES * self._chunks,
            transfer_s=loop.time() - (self._first_s if self._first_s is not None else loop.time()),
            chunks=self._chunks,
            resent=0,
        )

    @property
    def _ended(self) -> bool:
        return self._done or self._transfer.told

    async def _give_all(self, pieces: AsyncIterator[tuple[Piece, bool]]) -> None:
        async for piece, last in pieces:
            await self._give(piece, last=last)
            if self._ended:
                break

    async def _give(self, piece: Piece, *, last: bool) -> None:
        for nbytes, whole in _cut(piece.nbytes, self._chunk_bytes):
            while not self._ended and not self._room(nbytes):
                await self._wait()
            if self._ended:
                return
            now_s = self._network.now_s
            self._first_s = now_s if self._first_s is None else self._first_s
            self._under_way += nbytes
            self.payload_bytes += nbytes
            self._chunks += 1
            self._given_bits += 8.0 * (nbytes + ENVELOPE_BYTES)
            self._queue.put_nowait((self._given_bits, nbytes, piece if whole else None, whole and last))
            self._flow.add(8.0 * (nbytes + ENVELOPE_BYTES))

    def _room(self, nbytes: int) -> bool:
        return self._under_way + nbytes <= self._window_bytes or self._under_way <= LEAST_IN_WINDOW * self._chunk_bytes

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()

    async def _move(self) -> None:
        """Each chunk arrives when its last bit has passed both links, and once more the faster of them by itself: the
        broker passes on what it has whole.
        """
        loop = self._network.loop
        while True:
            mark_bits, nbytes, piece, last = await self._queue.get()
            await self._flow.moved(mark_bits)
            hop_bps = max(self._alone_bps(self._sender.up), self._alone_bps(self._receiver.down))
            hop_s = min(8.0 * nbytes / hop_bps, LONGEST_HOP_S) if hop_bps > 0 else LONGEST_HOP_S
            there_s = loop.time() + hop_s + self._sender.delay_s() + self._receiver.delay_s()
            self._last_s = after_last(self._last_s, there_s)
            loop.call_at(self._last_s, self._arrived, nbytes, piece, last)

    def _alone_bps(self, passes: Sequence[str]) -> float:
        now_s = self._network.now_s
        return min(self._network.channels[name].bps(now_s) for name in passes)

    def _arrived(self, nbytes: int, piece: Piece | None, last: bool) -> None:
        loop = self._network.loop
        self._transfer.arrive(nbytes, piece, last=last, now_s=loop.time())
        loop.call_later(self._sender.delay_s() + self._receiver.delay_s(), self._acknowledged, nbytes, last)

    def _acknowledged(self, nbytes: int, last: bool) -> None:
        self._under_way -= nbytes
        self._acked_bytes += nbytes
        self._done = self._done or last
        self._seen.moved(self._acked_bytes)
        self._news.set()


async def _all_done(*tasks: asyncio.Task[None]) -> None:
    """Even if cancelled again meanwhile: who calls may then let go of what they use."""
    cancelled = False
    while not all(task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


def _cut(nbytes: int, chunk_bytes: int) -> Iterator[tuple[int, bool]]:
    """Sizes of the chunks of a piece, and which is its last."""
    left = nbytes
    while left > 0:
        size = min(left, chunk_bytes)
        left -= size
        yield size, left == 0
