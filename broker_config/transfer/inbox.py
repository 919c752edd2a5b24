"""Where the transfers to one agent arrive."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from typing import Self

from broker_config.bus.contract import Bus, Subscription
from broker_config.errors import BusError
from broker_config.messages import Abort, Ack, Bulk, Chunk, Open
from broker_config.topics import ACKS, BULK
from broker_config.transfer.incoming import Incoming

logger = logging.getLogger(__name__)

DEFAULT_LIMIT_BYTES = 256 << 20
REMEMBERED = 1_024  # ended transfers whose end is told again when a late duplicate asks
GOODBYE_S = 1.0  # leaving may not take longer, connection or not
ACK_S = 0.02  # acknowledgements wait so long for company
ACK_CHUNKS = 2  # but not longer than for so many chunks


class Inbox:
    """All transfers to one agent, as an async context manager. One per agent.

    Chunks come over bulk, acknowledgements go over control. limit_bytes bounds what is buffered or announced, over
    all transfers; limit_transfers how many run at once. A transfer that nobody has called `expect` for is held for
    unexpected_s at most, since the order that names it may come later than its first chunk.
    """

    def __init__(
        self,
        *,
        bulk: Bus,
        control: Bus,
        agent: str,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
        limit_transfers: int = 64,
        unexpected_s: float = 120.0,
    ) -> None:
        self._bulk, self._control, self._agent = bulk, control, agent
        self._limit_bytes, self._limit_transfers, self._unexpected_s = limit_bytes, limit_transfers, unexpected_s
        self._live: dict[str, Incoming] = {}
        self._ended: OrderedDict[str, Ack] = OrderedDict()
        self._due: dict[str, str] = {}
        self._fresh: dict[str, int] = {}
        self._ack_now = asyncio.Event()
        self._ack_timer: asyncio.TimerHandle | None = None
        self._unexpected: dict[str, asyncio.TimerHandle] = {}
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def buffered_bytes(self) -> int:
        """Bytes buffered, or announced and still to come."""
        return sum(incoming.claimed_bytes for incoming in self._live.values())

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._acknowledge(), name=f"kvbus acknowledgements of {self._agent}")
        self._subscription = await self._bulk.subscribe(BULK, self._take, receiver=self._agent)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._subscription is not None:
            await self._subscription.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await asyncio.gather(*(each.cancel("the receiver is going offline") for each in self._live.values()))
        for incoming in self._live.values():
            incoming.close()
        for timer in (self._ack_timer, *self._unexpected.values()):
            if timer is not None:
                timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def expect(self, transfer: str) -> Incoming:
        """The transfer of this id, whether it has begun or not. The caller reads it, or closes it."""
        incoming = self._live.get(transfer)
        if incoming is None:
            incoming = Incoming(transfer, self._agent, self._tell)
            past = self._ended.get(transfer)
            if past is not None:
                gone = past.state in (None, "delivered")
                incoming.end("expired" if gone else past.state or "expired", "it is gone" if gone else past.reason)
                return incoming
            self._live[transfer] = incoming
        incoming.expected = True
        timer = self._unexpected.pop(transfer, None)
        if timer is not None:
            timer.cancel()
        return incoming

    def _take(self, message: Bulk, parameters: Mapping[str, str]) -> None:
        """The handler of everything on BULK."""
        sender = parameters["sender"]
        incoming = self._live.get(message.transfer)
        if incoming is not None and incoming.sender not in (None, sender):
            logger.warning("%s interferes with transfer %s of %s", sender, message.transfer, incoming.sender)
            return
        match message:
            case Open():
                self._opened(message, sender, incoming)
            case Chunk():
                self._arrived(message, sender, incoming)
            case Abort():
                self._aborted(message, incoming)
        self._sweep()

    def _opened(self, opening: Open, sender: str, incoming: Incoming | None) -> None:
        if opening.sender != sender:
            logger.warning("%s announces a transfer in the name of %s", sender, opening.sender)
            return
        known = opening.transfer in self._ended or (incoming is not None and (incoming.opened or incoming.state))
        if not known:
            refusal = self._refusal(opening)
            if incoming is None:
                incoming = self._live[opening.transfer] = Incoming(opening.transfer, self._agent, self._tell)
            incoming.open(opening, self._expired)
            if refusal:
                incoming.end("refused", refusal)
            elif not incoming.expected:
                self._unexpected[opening.transfer] = asyncio.get_running_loop().call_later(
                    self._unexpected_s, self._nobody_came, incoming
                )
        self._answer(opening.transfer, sender, at_once=True)

    def _refusal(self, opening: Open) -> str:
        """Why a transfer can't be taken, or nothing. Asked before anything is set aside for it."""
        running = sum(incoming.opened and not incoming.released for incoming in self._live.values())
        if running >= self._limit_transfers:
            return f"{running} transfers are under way, more are not taken"
        announced = opening.total_bytes or 0
        if announced > self._limit_bytes:
            return f"{announced} bytes are announced, the limit is {self._limit_bytes}"
        if announced + self.buffered_bytes > self._limit_bytes:
            return f"no room for {announced} bytes beside {self.buffered_bytes} of others"
        return ""

    def _arrived(self, chunk: Chunk, sender: str, incoming: Incoming | None) -> None:
        if incoming is None or not incoming.opened or incoming.state is not None:
            self._answer(chunk.transfer, sender, at_once=True)
            return
        if incoming.total_bytes is None and len(chunk.data) + self.buffered_bytes > self._limit_bytes:
            incoming.end("refused", f"it is longer than the {self._limit_bytes} bytes there is room for")
        at_once = incoming.add(chunk)
        self._fresh[chunk.transfer] = self._fresh.get(chunk.transfer, 0) + 1
        self._answer(chunk.transfer, sender, at_once=at_once or self._fresh[chunk.transfer] >= ACK_CHUNKS)

    def _aborted(self, abort: Abort, incoming: Incoming | None) -> None:
        if incoming is not None:
            incoming.end(abort.state, abort.reason or "the sender gave it up")
        elif abort.transfer not in self._ended:
            self._remember(
                Ack(
                    transfer=abort.transfer,
                    receiver=self._agent,
                    next_index=0,
                    state=abort.state,
                    reason=abort.reason or "the sender gave it up",
                )
            )

    def _expired(self, incoming: Incoming) -> None:
        incoming.end("expired", "it was not complete in time")
        if incoming.sender is not None:
            self._answer(incoming.transfer, incoming.sender, at_once=True)
        self._sweep()

    def _nobody_came(self, incoming: Incoming) -> None:
        self._unexpected.pop(incoming.transfer, None)
        incoming.end("refused", "nobody here waits for it")
        incoming.close()
        if incoming.sender is not None:
            self._answer(incoming.transfer, incoming.sender, at_once=True)
        self._sweep()

    def _sweep(self) -> None:
        """Forget the bytes and keep the ends of transfers that are over."""
        for transfer, incoming in tuple(self._live.items()):
            if incoming.state is not None and incoming.released:
                del self._live[transfer]
                timer = self._unexpected.pop(transfer, None)
                if timer is not None:
                    timer.cancel()
                self._remember(incoming.acknowledgement())

    def _remember(self, ack: Ack) -> None:
        self._ended[ack.transfer] = ack
        while len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)

    def _answer(self, transfer: str, sender: str, *, at_once: bool) -> None:
        """Let the sender know where it stands; several answers to one transfer become one."""
        self._due[transfer] = sender
        if at_once:
            self._ack_now.set()
        elif self._ack_timer is None:
            self._ack_timer = asyncio.get_running_loop().call_later(ACK_S, self._ack_now.set)

    async def _acknowledge(self) -> None:
        """The task that publishes acknowledgements."""
        while True:
            await self._ack_now.wait()
            self._ack_now.clear()
            if self._ack_timer is not None:
                self._ack_timer.cancel()
                self._ack_timer = None
            due, self._due = self._due, {}
            self._fresh.clear()
            for transfer, sender in due.items():
                await self._publish(self._standing(transfer), sender)

    def _standing(self, transfer: str) -> Ack:
        incoming = self._live.get(transfer)
        if incoming is not None:
            return incoming.acknowledgement()
        unknown = Ack(transfer=transfer, receiver=self._agent, next_index=0, missing=(0,))
        return self._ended.get(transfer, unknown)

    async def _tell(self, incoming: Incoming) -> None:
        """Of an end that came from this side."""
        ack, sender = incoming.acknowledgement(), incoming.sender
        self._sweep()
        if sender is not None:
            await self._publish(ack, sender)

    async def _publish(self, ack: Ack, sender: str) -> None:
        try:
            await self._control.publish(ACKS, ack, sender=sender, receiver=self._agent)
        except BusError as error:  # the sender asks again, by repeating a chunk
            logger.debug("acknowledgement of %s not sent: %s", ack.transfer, error)
