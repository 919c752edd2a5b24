"""Answering in virtual time, as edge_agent.answering and .parts do it; what arrives and what is computed meet by the
agent's own rule (edge_agent.meeting).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from broker_config import topics
from broker_config.bus import Bus
from broker_config.errors import BusError, TransferError
from broker_config.messages import (
    FROM_IDS,
    AnswerOrder,
    AnswerPiece,
    SendOrder,
    new_id,
)
from edge_agent.answer import Answer, to_its_end
from edge_agent.errors import AgentError, ContextTooLong, PartFailed
from edge_agent.flow import Flow as Seen
from edge_agent.link_quality import LinkMeter
from edge_agent.meeting import Bid, Meeting
from edge_agent.memory.shelf import EXACT
from edge_agent.parts import Progress
from edge_agent.precedence import Precedence, Seat
from edge_agent.tasks import gather_or_cancel
from scripts.replay.virtual.engine import Entries, Live, VirtualEngine
from scripts.replay.virtual.fleet import Neighbours
from scripts.replay.virtual.store import VirtualStore
from scripts.replay.virtual.transfer import FAILURES, Header, Slice

Fetched = list[tuple[Entries, int]]
"""Entries and tokens, one piece after the other."""


class VirtualAnswering:
    """Carries out AnswerOrders. Each ends in exactly one AnswerOutcome.

    question_tokens: how many a question has; answer_tokens: how many its answer.
    """

    def __init__(
        self,
        *,
        agent: str,
        engine: VirtualEngine,
        store: VirtualStore,
        control: Bus,
        link: LinkMeter,
        neighbours: Neighbours,
        question_tokens: Callable[[str], int],
        answer_tokens: int,
    ) -> None:
        self._agent, self._engine, self._store = agent, engine, store
        self._control, self._link, self._neighbours = control, link, neighbours
        self._question_tokens, self._answer_tokens = question_tokens, answer_tokens

    async def carry_out(self, order: AnswerOrder) -> None:
        """Answer and report how it ended."""
        answer = Answer(order, asyncio.get_running_loop().time)
        await to_its_end(answer, self._answer(answer), self._report)

    async def _answer(self, answer: Answer) -> None:
        order, clock = answer.order, asyncio.get_running_loop().time
        tokens = self._question_tokens(order.question)
        room = self._neighbours.model.window_tokens - tokens - order.max_new_tokens
        answer.context_tokens = sum(part.tokens for part in order.parts)
        if answer.context_tokens > room:
            raise ContextTooLong(answer.context_tokens, room)
        answer.progress = [Progress(part) for part in order.parts]
        precedence = Precedence()
        seats = [precedence.seat() for _ in order.parts]
        fetched = await gather_or_cancel(
            [self._fetch(order, *pair) for pair in zip(answer.progress, seats, strict=True)]
        )
        live = fetched[0] if isinstance(fetched[0], Live) else None
        if live is None:
            live = await self._engine.join([piece for each in fetched if not isinstance(each, Live) for piece in each])
        waiting_s = clock()
        async with self._engine.turns.turn(order.asker):
            answer.queued_s = clock() - waiting_s
            answer.question_s = await self._engine.first_token(live, tokens)
            new_tokens = min(order.max_new_tokens, self._answer_tokens)
            answer.said("…", new_tokens)
            await self._say(order, 0, "…")
            if new_tokens > 1:
                await self._engine.generate(new_tokens - 1)
                await self._say(order, 1, "…")

    async def _fetch(self, order: AnswerOrder, progress: Progress, seat: Seat) -> Fetched | Live:
        """One part; progress is filled on the way. Raises PartFailed with all that was tried."""
        part = progress.part
        try:
            if part.sender == self._agent:
                return await self._own(order, progress)
            return await self._receive(order, progress, part.transfer, part.sender, seat)
        except (AgentError, BusError) as error:
            progress.failed(error)
        for holder in part.text_holders:
            transfer = new_id()
            again = SendOrder(
                request=order.request,
                transfer=transfer,
                context_id=part.context_id,
                receiver=self._agent,
                own_tokens=part.tokens,
                rung=part.rung,
                expires_s=order.part_timeout_s,
            )
            await self._control.publish(topics.ORDERS, again, agent=holder)
            try:
                fetched = await self._receive(order, progress, transfer, holder, seat)
            except (AgentError, BusError) as error:
                progress.failures.append(f"{holder}: {error}")
            else:
                progress.fallback = holder
                return fetched
        tried = "; ".join(progress.failures)
        raise PartFailed(f"context {part.context_id} of {part.sender} could not be had: {tried}")

    async def _own(self, order: AnswerOrder, progress: Progress) -> Fetched:
        """A context that this agent holds itself, computed anew if what is kept of it is worse than the part's rung."""
        held = self._store.get(progress.part.context_id)
        with self._store.pinned(held.context_id):
            kept = self._store.rung(held.context_id)
            if kept is not None and self._store.shelf.keeps(kept, progress.part.rung):
                self._store.used(held.context_id)
                entries = self._engine.entries(held.tokens)
                if kept != EXACT:
                    progress.decode_s = await self._engine.decode(entries, kept)
                return [(entries, held.tokens)]
        entries, progress.prefill_s = await self._engine.prefill_context(held.tokens, order.asker)
        progress.own_tokens = held.tokens
        return [(entries, held.tokens)]

    async def _receive(
        self, order: AnswerOrder, progress: Progress, transfer: str, sender: str, seat: Seat
    ) -> Fetched | Live:
        """A transfer, completed from its ids if it ends before all is there."""
        reception = VirtualReception(
            transfer,
            self._agent,
            sender,
            seat.news,
            engine=self._engine,
            neighbours=self._neighbours,
            link=self._link,
            timeout_s=order.part_timeout_s,
        )
        try:
            return await self._meet(order, progress, reception, seat)
        finally:
            await reception.close()
            progress.payload_bytes, progress.receive_s = reception.payload_bytes, reception.receive_s
            progress.decode_s = reception.decode_s
            self._measured(reception)

    async def _meet(
        self, order: AnswerOrder, progress: Progress, reception: VirtualReception, seat: Seat
    ) -> Fetched | Live:
        header = await reception.header()
        part = progress.part
        meet = part.meet and header.own_tokens < header.tokens
        own_tokens = max(header.own_tokens, part.own_tokens) if meet else header.own_tokens
        due_s = reception.began_s + part.due_s if part.due_s else None
        engine: Any = self._engine
        source: Any = reception
        bid = Bid(range(header.tokens), own_tokens, meet, due_s)
        meeting = Meeting(engine, source, seat, bid, asker=order.asker)
        try:
            await meeting.run()
        finally:
            progress.prefill_s, progress.waited_s = meeting.prefill_s, meeting.waited_s
            progress.own_tokens = meeting.computed_tokens
        if meet:
            reception.has_enough()
        await reception.end()
        if reception.failure is not None:
            progress.failed(reception.failure)
            progress.fallback = FROM_IDS if meeting.given_up else ""
        found: Any = await meeting.live() if seat.alone else await meeting.pieces()
        return found if isinstance(found, Live) else list(found)

    def _measured(self, reception: VirtualReception) -> None:
        """What the transfer says of this machine and its link."""
        if reception.decoded_elements:
            self._engine.meter.decode_payload(reception.decoded_elements, reception.decode_s, reception.rung)
        transfer = reception.transfer
        if (transfer.complete or transfer.enough) and transfer.first_s is not None and transfer.last_s is not None:
            after_first = max(0, transfer.received_bytes - reception.first_bytes)
            self._link.received(after_first, transfer.last_s - transfer.first_s)

    async def _say(self, order: AnswerOrder, index: int, text: str) -> None:
        piece = AnswerPiece(request=order.request, agent=self._agent, index=index, text=text)
        await self._control.publish(topics.ANSWERS, piece, agent=self._agent, request=order.request)

    async def _report(self, answer: Answer) -> None:
        await self._control.publish(topics.OUTCOMES, answer.outcome(self._agent), agent=self._agent)


class VirtualReception:
    """One transfer on its way in, decoded slice by slice beside the model; a Source for edge_agent.meeting."""

    def __init__(
        self,
        transfer: str,
        agent: str,
        sender: str,
        news: asyncio.Event,
        *,
        engine: VirtualEngine,
        neighbours: Neighbours,
        link: LinkMeter,
        timeout_s: float,
    ) -> None:
        self._engine, self._neighbours, self._link, self._news = engine, neighbours, link, news
        self._agent, self._sender = agent, sender
        self._clock = asyncio.get_running_loop().time
        self.transfer = neighbours.transfers.of(transfer)
        self.began_s = self._clock()
        self.seen = Seen(transfer, clock=self._clock)
        self.over = False
        self.failure: TransferError | None = None
        self.payload_bytes = self.first_bytes = self.decoded_elements = 0
        self.decode_s = self.receive_s = 0.0
        self.rung = ""
        self._passed = 0
        self._slices: list[tuple[int, Entries]] = []
        self._changed = asyncio.Event()
        self._accepted: asyncio.Future[Header] = asyncio.get_running_loop().create_future()
        self.transfer.news = self._came
        self._task = asyncio.create_task(self._run(timeout_s), name=f"reception of {self.transfer.transfer}")

    async def header(self) -> Header:
        """Once it is there. Raises what ended the transfer before."""
        return await asyncio.shield(self._accepted)

    def take(self) -> list[tuple[int, Entries]]:
        """(first token, entries) of the slices that have come since."""
        taken, self._slices = self._slices, []
        return taken

    def passed(self, token: int) -> None:
        """Slices that end at or before this token need not be decoded any more."""
        self._passed = token

    def has_enough(self) -> None:
        """What has not come is of no use any more."""
        if not self.transfer.complete:
            self.transfer.enough = True
            self._changed.set()
            self._tell_sender()

    async def end(self) -> None:
        """Wait for the end of it."""
        await asyncio.wait({self._task})
        self._task.result()

    async def close(self) -> None:
        """Read no further."""
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._accepted.done():
            self._accepted.cancel()
        self.transfer.fail("cancelled", "its receiver has no use for it")
        self._tell_sender()

    async def _run(self, timeout_s: float) -> None:
        try:
            with self._link.receiving(self.seen):
                async with asyncio.timeout(timeout_s):
                    await self._read()
        except TimeoutError:
            self.transfer.fail("expired", f"not complete within {timeout_s:g} s")
            self._tell_sender()
        finally:
            self.over, self.receive_s = True, self._clock() - self.began_s
            if self.transfer.failed is not None and not self.transfer.complete:
                self.failure = FAILURES[self.transfer.failed](self.transfer.transfer, self.transfer.reason)
                if not self._accepted.done():
                    self._accepted.set_exception(self.failure)
                    self._accepted.exception()  # whoever waits for it is told; nobody may be
            self._news.set()

    async def _read(self) -> None:
        transfer = self.transfer
        while True:
            while transfer.arrived and not transfer.enough:
                piece = transfer.arrived.popleft()
                self.payload_bytes += piece.nbytes
                if isinstance(piece.content, Header):
                    self.first_bytes, self.rung = piece.nbytes, piece.content.rung
                    self._accepted.set_result(piece.content)
                else:
                    await self._decode(piece.content)
                self._news.set()
            if transfer.complete or transfer.enough or transfer.failed is not None:
                return
            self._changed.clear()
            await self._changed.wait()

    async def _decode(self, part: Slice) -> None:
        if part.stop <= self._passed:
            return
        entries = self._engine.entries(part.stop - part.start)
        self.decode_s += await self._engine.decode(entries, self.rung)
        self.decoded_elements += entries.elements
        self._slices.append((part.start, entries))

    def _came(self) -> None:
        self.seen.moved(self.transfer.received_bytes)
        self._changed.set()

    def _tell_sender(self) -> None:
        after_s = self._neighbours.after(self._sender, self._agent)
        asyncio.get_running_loop().call_later(after_s, self.transfer.tell_sender)
