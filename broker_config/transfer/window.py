"""What a sender knows of its chunks: which are on their way, which arrived, which to send again. Pure, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

FIRST_TIMEOUT_S = 3.0  # until a round trip was measured; TCP's own first one is 1 s, and here are two hops and queues
MIN_TIMEOUT_S = 1.0
MAX_TIMEOUT_S = 30.0
ROUND_TRIPS = 4.0  # acknowledgements queue behind other traffic; an early repeat costs a whole chunk of airtime
SMOOTHING = 0.125  # RFC 6298
MAX_HELD = 1_024  # a receiver takes only so many ahead of a gap, however small they are
# Chunks that were overtaken arrive within this; asking for them again before would double the traffic.
REORDERING_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A delivered transfer. wire_bytes counts every publish with its envelope, repeats too.

    payload_bytes, chunks: what was sent of it, which is all of it unless the receiver had enough before. transfer_s:
    from handing over the first chunk to the receiver's word that it needs no more.
    """

    payload_bytes: int
    wire_bytes: int
    transfer_s: float
    chunks: int
    resent: int


@dataclass(kw_only=True)
class Held:
    """A chunk that is not acknowledged yet."""

    data: bytes
    last: bool
    sent_s: float | None = None
    publishing: bool = False
    counted: bool = False
    repeats: int = 0


@dataclass(kw_only=True)
class Window:
    """The chunks of one transfer between being made and being acknowledged by the receiver.

    The last chunk is held until the end, to have something to send when the receiver's last word was lost.
    """

    window_bytes: int
    rate_bps: float | None = None
    held: dict[int, Held] = field(default_factory=dict)
    count: int = 0
    sent_chunks: int = 0
    sent_bytes: int = 0
    next_index: int = 0
    complete: bool = False
    resent: int = 0
    acknowledged_bytes: int = 0
    _held_bytes: int = 0
    _waiting: set[int] = field(default_factory=set)
    _round_trip_s: float | None = None
    _progress_s: float = 0.0
    _timeouts: int = 0

    def room(self) -> bool:
        """Whether another chunk may be taken in; two always may, or a large chunk would stop and wait."""
        few = len(self.held) < MAX_HELD and self._held_bytes < self.window_bytes
        return not self.complete and (len(self.held) < 2 or few)

    def add(self, data: bytes, *, last: bool, now_s: float) -> None:
        """Take in the next chunk; it waits to be sent."""
        if self.idle():
            self._progress_s = now_s
        self.held[self.count] = Held(data=data, last=last)
        self._waiting.add(self.count)
        self.count += 1
        self._held_bytes += len(data)
        self.complete = last

    def idle(self) -> bool:
        """Whether nothing is on its way, so that no answer can be missed."""
        return not self.held

    def pop_waiting(self) -> int | None:
        """The next chunk to publish: the lowest, so repeats first, since the receiver can't go on without them."""
        while self._waiting:
            index = min(self._waiting)
            self._waiting.remove(index)
            if index in self.held and not self.held[index].publishing:
                return index
        return None

    def started(self, index: int, now_s: float) -> None:
        """The chunk is being handed to the broker."""
        chunk = self.held[index]
        if chunk.sent_s is not None:
            chunk.repeats += 1
            self.resent += 1
        if not chunk.counted:
            self.sent_chunks += 1
            self.sent_bytes += len(chunk.data)
        chunk.sent_s, chunk.publishing, chunk.counted = now_s, True, True

    def published(self, index: int, *, failed: bool) -> None:
        """The broker took it, or (failed) it did not leave us and waits again."""
        chunk = self.held.get(index)
        if chunk is not None:
            chunk.publishing = False
            if failed:
                chunk.sent_s = None
                self._waiting.add(index)

    def acknowledged(self, next_index: int, missing: Iterable[int], now_s: float) -> bool:
        """Take in an acknowledgement, old ones too. Returns whether it brought the transfer forward."""
        progress = self.next_index < next_index <= self.count
        if progress:
            self._measure(next_index - 1, now_s)
            for index in range(self.next_index, next_index):
                self.acknowledged_bytes += len(self.held[index].data)
                if not self.held[index].last:
                    self._held_bytes -= len(self.held.pop(index).data)
            self.next_index, self._progress_s, self._timeouts = next_index, now_s, 0
        for index in missing:
            if index >= self.next_index:
                self._repeat(index, now_s)
        return progress

    def deadline_s(self) -> float | None:
        """When to give up waiting for progress; None while nothing is on its way."""
        return None if self.idle() else self._progress_s + self.timeout_s()

    def timeout_s(self) -> float:
        """Adaptive: some round trips, and the time that what is on its way takes at the rate; doubled each time."""
        measured_s = FIRST_TIMEOUT_S if self._round_trip_s is None else ROUND_TRIPS * self._round_trip_s
        paced_s = self._held_bytes * 8 / self.rate_bps if self.rate_bps else 0.0
        return max(MIN_TIMEOUT_S, paced_s, min(MAX_TIMEOUT_S, max(MIN_TIMEOUT_S, measured_s) * 2.0**self._timeouts))

    def timed_out(self, now_s: float) -> None:
        """No progress: send the lowest unacknowledged chunk again, unless it has not even left us."""
        self._progress_s, self._timeouts = now_s, min(self._timeouts + 1, 16)
        lowest = min(self.held, default=None)
        if lowest is not None and not self.held[lowest].publishing:
            self._waiting.add(lowest)

    def _repeat(self, index: int, now_s: float) -> None:
        chunk = self.held.get(index)
        if chunk is None or chunk.publishing or chunk.sent_s is None:
            return
        if now_s - chunk.sent_s >= max(REORDERING_S, 1.25 * (self._round_trip_s or 0.0)):
            self._waiting.add(index)

    def _measure(self, index: int, now_s: float) -> None:
        """A round trip, from a chunk that was sent once only (Karn): of others one can't know which was answered."""
        chunk = self.held[index]
        if chunk.sent_s is None or chunk.repeats:
            return
        sample_s = now_s - chunk.sent_s
        if self._round_trip_s is None:
            self._round_trip_s = sample_s
        else:
            self._round_trip_s += SMOOTHING * (sample_s - self._round_trip_s)
