"""Getting one context of a question: by its transfer, and what that lacks from the ids that came with it; or, if not
even these came, by its text.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from broker_config import topics
from broker_config.bus import Bus
from broker_config.errors import BusError, TransferError
from broker_config.messages import (
    FROM_IDS,
    AnswerOrder,
    EndState,
    Part,
    PartOutcome,
    SendOrder,
    TextReply,
    TextRequest,
    new_id,
)
from broker_config.messages.base import COORDINATOR
from broker_config.transfer import Inbox
from edge_agent.engine import Engine
from edge_agent.errors import AgentError, ContextUnknown, PartFailed, PayloadRejected
from edge_agent.facts import Fact
from edge_agent.kv.cache import Cache
from edge_agent.kv.header import Header
from edge_agent.kv.reader import PayloadReader
from edge_agent.link_quality import LinkMeter
from edge_agent.meeting import Bid, Meeting
from edge_agent.memory import ContextStore, rung_of
from edge_agent.model.session import LiveContext
from edge_agent.precedence import Seat
from edge_agent.reception import Reception, usable_by_slices

log = logging.getLogger(__name__)

OTHER_TEXT = "are not the tokens of the context that was ordered"


@dataclass
class Progress:
    """What is known of one part while it is on its way."""

    part: Part
    payload_bytes: int = 0
    receive_s: float = 0.0
    decode_s: float = 0.0
    prefill_s: float = 0.0
    waited_s: float = 0.0
    own_tokens: int = 0
    state: EndState = "delivered"
    fallback: str = ""
    failures: list[str] = field(default_factory=list)

    def failed(self, error: AgentError | BusError) -> None:
        """The transfer did not end as delivered."""
        self.state = error.state if isinstance(error, TransferError) else "refused"
        self.failures.append(str(error))

    def outcome(self) -> PartOutcome:
        return PartOutcome(
            transfer=self.part.transfer,
            sender=self.part.sender,
            state=self.state,
            payload_bytes=self.payload_bytes,
            receive_s=self.receive_s,
            decode_s=self.decode_s,
            prefill_s=self.prefill_s,
            own_tokens=self.own_tokens,
            waited_s=self.waited_s,
            fallback=self.fallback,
            reason="; ".join(self.failures)[:1024],
        )


@dataclass(frozen=True)
class Fetched:
    """A context of so many tokens at its receiver. pieces: entries and tokens, one piece after the other; or live: the
    context in which the question's only part was read. facts: what its sender said of it beside a cache.
    """

    tokens: int
    pieces: Sequence[tuple[Cache, int]] = ()
    live: LiveContext | None = None
    facts: tuple[Fact, ...] = ()


class Parts:
    """Fetches parts. Several at once; each one's computing waits for its turn at the model."""

    def __init__(
        self,
        *,
        agent: str,
        engine: Engine,
        store: ContextStore,
        inbox: Inbox,
        control: Bus,
        link: LinkMeter,
        limit_bytes: int,
    ) -> None:
        self._agent, self._engine, self._store = agent, engine, store
        self._inbox, self._control, self._link = inbox, control, link
        self._limit_bytes = limit_bytes
        self._texts: dict[str, asyncio.Future[TextReply]] = {}

    async def fetch(self, order: AnswerOrder, progress: Progress, seat: Seat) -> Fetched:
        """One part; progress is filled on the way. Raises PartFailed with all that was tried."""
        part = progress.part
        try:
            if part.sender == self._agent:
                return _whole(await self._own(order, progress))
            return await self._receive(order, progress, part.transfer, seat)
        except (AgentError, BusError) as error:
            progress.failed(error)
        for holder in part.text_holders:
            log.warning("%s: %s; asking %s for the text", order.request, progress.failures[-1], holder)
            try:
                fetched = await self._fall_back(order, progress, holder, seat)
            except (AgentError, BusError) as error:
                progress.failures.append(f"{holder}: {error}")
            else:
                progress.fallback = holder
                return fetched
        tried = "; ".join(progress.failures)
        raise PartFailed(f"context {part.context_id} of {part.sender} could not be had: {tried}")

    def text_came(self, reply: TextReply) -> None:
        """The coordinator answered a TextRequest."""
        waiting = self._texts.get(reply.transfer)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    async def _own(self, order: AnswerOrder, progress: Progress) -> Cache:
        """A context that this agent holds itself, computed anew if what is kept of it is worse than the part's rung."""
        held = self._store.get(progress.part.context_id)
        with self._store.pinned(held.context_id):
            kept, shelf = self._store.rung(held.context_id), self._store.shelf
            good = kept is not None and shelf.keeps(kept, progress.part.rung)
            form = await self._store.fetch(held.context_id) if good else None
            if form is not None and shelf.keeps(rung_of(form), progress.part.rung):
                begin = time.perf_counter()
                cache = await asyncio.to_thread(shelf.take, form)
                progress.decode_s = time.perf_counter() - begin
                return cache
        return await self._computed(order, progress, list(held.ids))

    async def _fall_back(self, order: AnswerOrder, progress: Progress, holder: str, seat: Seat) -> Fetched:
        part = progress.part
        if holder == COORDINATOR:
            return _whole(await self._from_coordinator(order, progress))
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
        return await self._receive(order, progress, transfer, seat)

    async def _from_coordinator(self, order: AnswerOrder, progress: Progress) -> Cache:
        part = progress.part
        request = TextRequest(
            request=order.request, transfer=part.transfer, context_id=part.context_id, agent=self._agent
        )
        waiting: asyncio.Future[TextReply] = asyncio.get_running_loop().create_future()
        self._texts[part.transfer] = waiting
        try:
            await self._control.publish(topics.OUTCOMES, request, agent=self._agent)
            async with asyncio.timeout(order.part_timeout_s):
                reply = await waiting
        except TimeoutError:
            raise ContextUnknown(f"no text within {order.part_timeout_s:g} s") from None
        finally:
            del self._texts[part.transfer]
        if reply.text is None:
            raise ContextUnknown("the coordinator was not given this text")
        ids = self._engine.text.context_ids(reply.text)
        return await self._prefill(order, progress, ids)

    async def _receive(self, order: AnswerOrder, progress: Progress, transfer: str, seat: Seat) -> Fetched:
        """A transfer, completed from its ids if it ends before all is there.

        Raises what ended it before its header came.
        """
        reader = PayloadReader(self._engine.expectation(self._limit_bytes))
        reception = Reception(
            self._inbox.expect(transfer),
            reader,
            lambda header: self._check(header, progress.part),
            seat.news,
            link=self._link,
            timeout_s=order.part_timeout_s,
        )
        try:
            header = await reception.header()
            if usable_by_slices(header):
                return await self._meet(order, progress, reception, header, seat)
            return await self._whole(order, progress, reception, header)
        finally:
            await reception.close()
            progress.payload_bytes, progress.receive_s = reception.payload_bytes, reception.receive_s
            progress.decode_s = reception.decode_s
            self._measured(reception)

    async def _meet(
        self, order: AnswerOrder, progress: Progress, reception: Reception, header: Header, seat: Seat
    ) -> Fetched:
        """Of slices and of what is computed here."""
        meet = progress.part.meet and header.entries > 0
        own_tokens = max(header.own_tokens, progress.part.own_tokens) if meet else header.own_tokens
        due_s = reception.began_s + progress.part.due_s if progress.part.due_s else None
        bid = Bid(header.ids(), own_tokens, meet, due_s)
        meeting = Meeting(self._engine, reception, seat, bid, asker=order.asker)
        try:
            await meeting.run()
        finally:
            progress.prefill_s, progress.waited_s = meeting.prefill_s, meeting.waited_s
            progress.own_tokens = meeting.computed_tokens
        if meet:
            await reception.incoming.has_enough()
        await reception.end()
        if reception.failure is not None:
            self._note(order, progress, reception.failure, gap=meeting.given_up)
        if seat.alone:
            return Fetched(header.tokens, live=await meeting.live(), facts=header.facts)
        return Fetched(header.tokens, await meeting.pieces(), facts=header.facts)

    async def _whole(self, order: AnswerOrder, progress: Progress, reception: Reception, header: Header) -> Fetched:
        """Of a payload that is of use only when all of it is there, and the tokens before, computed meanwhile."""
        ids, pieces = header.ids(), []
        if header.own_tokens:
            own = await self._computed(order, progress, ids[: header.own_tokens])
            pieces.append((own, header.own_tokens))
        begin = time.perf_counter()
        await reception.end()
        progress.waited_s = time.perf_counter() - begin
        if reception.failure is not None:
            self._note(order, progress, reception.failure, gap=True)
            return _whole(await self._computed(order, progress, ids), header.facts)
        received = reception.whole()
        if received is None:
            raise PayloadRejected("slice", "missing")
        reception.decoded_elements = received.elements
        pieces.append((received.moved(-header.own_tokens), header.tokens - header.own_tokens))
        return Fetched(header.tokens, pieces, facts=header.facts)

    def _note(self, order: AnswerOrder, progress: Progress, failure: AgentError | BusError, *, gap: bool) -> None:
        """A transfer did not end as delivered; gap: something was missing that was then computed."""
        log.warning("%s: %s%s", order.request, failure, "; the rest is computed from its ids" if gap else "")
        progress.failed(failure)
        progress.fallback = FROM_IDS if gap else ""

    def _measured(self, reception: Reception) -> None:
        """What the transfer says of this machine and its link."""
        if reception.decoded_elements:
            self._engine.meter.decode_payload(reception.decoded_elements, reception.decode_s, reception.rung)
        incoming = reception.incoming
        if incoming.state == "delivered" and incoming.first_chunk_s is not None and incoming.last_chunk_s is not None:
            after_first = max(0, reception.payload_bytes - reception.first_bytes)  # its own time is not known
            self._link.received(after_first, incoming.last_chunk_s - incoming.first_chunk_s)

    def _check(self, header: Header, part: Part) -> None:
        """Raise PayloadRejected for a header that is not of the context that was ordered, or not of all of it."""
        if header.context_id != part.context_id:
            raise PayloadRejected("context_id", "is of another context than was ordered")
        if header.tokens != part.tokens:
            raise PayloadRejected("tokens", f"{header.tokens} of a context of {part.tokens}")
        if header.entries and not header.shape.sent_layers:
            raise PayloadRejected("sent_layers", f"none carries the {header.entries} entries that are announced")
        if self._engine.text.context_id(header.ids()) != part.context_id:
            raise PayloadRejected("token_ids", OTHER_TEXT)

    async def _prefill(self, order: AnswerOrder, progress: Progress, ids: list[int]) -> Cache:
        """A whole context from its text, which must be the one that was ordered."""
        if self._engine.text.context_id(ids) != progress.part.context_id:
            raise PayloadRejected("token_ids", OTHER_TEXT)
        return await self._computed(order, progress, ids)

    async def _computed(self, order: AnswerOrder, progress: Progress, ids: list[int]) -> Cache:
        """The cache of leading tokens of the part."""
        cache, seconds = await self._engine.prefill_context(ids, order.asker)
        progress.prefill_s += seconds
        progress.own_tokens = len(ids)
        return cache


def _whole(cache: Cache, facts: tuple[Fact, ...] = ()) -> Fetched:
    """A context whose cache has an entry for every token of it."""
    return Fetched(cache.entries, [(cache, cache.entries)], facts=facts)
