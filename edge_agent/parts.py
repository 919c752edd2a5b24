"""Getting one context of a question into a cache: by its transfer, or, if that fails, by its text."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field

from broker_config import topics
from broker_config.bus import Bus
from broker_config.errors import BusError, TransferError, TransferExpired
from broker_config.messages import AnswerOrder, EndState, Part, PartOutcome, SendOrder, TextReply, TextRequest, new_id
from broker_config.messages.base import COORDINATOR
from broker_config.transfer import Inbox, Incoming
from edge_agent.engine import Engine
from edge_agent.errors import AgentError, ContextUnknown, PartFailed, PayloadRejected
from edge_agent.facts import Fact
from edge_agent.kv.cache import Cache, concatenate
from edge_agent.kv.payload import Header
from edge_agent.kv.reader import PayloadReader
from edge_agent.link_quality import LinkMeter
from edge_agent.memory import ContextStore, rung_of

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """What is known of one part while it is on its way."""

    part: Part
    payload_bytes: int = 0
    receive_s: float = 0.0
    decode_s: float = 0.0
    prefill_s: float = 0.0
    state: EndState = "delivered"
    fallback: str = ""
    failures: list[str] = field(default_factory=list)

    def outcome(self) -> PartOutcome:
        return PartOutcome(
            transfer=self.part.transfer,
            sender=self.part.sender,
            state=self.state,
            payload_bytes=self.payload_bytes,
            receive_s=self.receive_s,
            decode_s=self.decode_s,
            prefill_s=self.prefill_s,
            fallback=self.fallback,
            reason="; ".join(self.failures)[:1024],
        )


@dataclass(frozen=True)
class Fetched:
    """A context of so many tokens at its receiver. facts: what its sender said of it beside a cache."""

    cache: Cache
    tokens: int
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

    async def fetch(self, order: AnswerOrder, progress: Progress) -> Fetched:
        """One part as a cache; progress is filled on the way. Raises PartFailed with all that was tried."""
        part = progress.part
        try:
            if part.sender == self._agent:
                return _whole(await self._own(order, progress))
            return await self._receive(order, progress, part.transfer)
        except (AgentError, BusError) as error:
            progress.state = error.state if isinstance(error, TransferError) else "refused"
            progress.failures.append(str(error))
        for holder in part.text_holders:
            log.warning("%s: %s; asking %s for the text", order.request, progress.failures[-1], holder)
            try:
                fetched = await self._fall_back(order, progress, holder)
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
        cache, progress.prefill_s = await self._engine.prefill_context(list(held.ids), order.asker)
        return cache

    async def _fall_back(self, order: AnswerOrder, progress: Progress, holder: str) -> Fetched:
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
        return await self._receive(order, progress, transfer)

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

    async def _receive(self, order: AnswerOrder, progress: Progress, transfer: str) -> Fetched:
        incoming = self._inbox.expect(transfer)
        reader = PayloadReader(self._engine.expectation(self._limit_bytes))
        try:
            with self._link.transferring():
                await self._read(incoming, reader, progress, order.part_timeout_s)
            received = reader.finish()
        except PayloadRejected as error:
            await incoming.refuse(str(error))
            raise
        finally:
            incoming.close()
        header = _ordered(reader.header, received, progress.part)
        if received is None:
            return _whole(await self._prefill(order, progress, header.ids()))
        self._engine.meter.decode_payload(received.elements, progress.decode_s)
        if not header.own_tokens:
            return Fetched(received, header.tokens, header.facts)
        own, progress.prefill_s = await self._engine.prefill_context(header.ids()[: header.own_tokens], order.asker)
        return Fetched(concatenate([own, received]), header.tokens, header.facts)

    async def _read(self, incoming: Incoming, reader: PayloadReader, progress: Progress, timeout_s: float) -> None:
        """Decode the payload while it arrives. Raises TransferError, and PayloadRejected at the first wrong byte."""
        start = time.perf_counter()
        progress.payload_bytes, progress.decode_s = 0, 0.0
        first_bytes = 0
        try:
            async with asyncio.timeout(timeout_s):
                async for piece in incoming.pieces():
                    begin = time.perf_counter()
                    await asyncio.to_thread(reader.feed, piece)
                    progress.decode_s += time.perf_counter() - begin
                    first_bytes = first_bytes or len(piece)
                    progress.payload_bytes += len(piece)
        except TimeoutError:
            reason = f"not complete within {timeout_s:g} s"
            await incoming.expire(reason)
            raise TransferExpired(incoming.transfer, reason) from None
        progress.receive_s = time.perf_counter() - start
        if incoming.first_chunk_s is not None and incoming.last_chunk_s is not None:
            after_first = max(0, progress.payload_bytes - first_bytes)  # the first chunk's own time is not known
            self._link.received(after_first, incoming.last_chunk_s - incoming.first_chunk_s)

    async def _prefill(self, order: AnswerOrder, progress: Progress, ids: list[int]) -> Cache:
        """A whole context from its text, which must be the one that was ordered."""
        if self._engine.text.context_id(ids) != progress.part.context_id:
            raise PayloadRejected("token_ids", "are not the tokens of the context that was ordered")
        cache, progress.prefill_s = await self._engine.prefill_context(ids, order.asker)
        return cache


def _whole(cache: Cache) -> Fetched:
    """A context whose cache was computed here, every entry of it."""
    return Fetched(cache, cache.entries)


def _ordered(header: Header | None, received: Cache | None, part: Part) -> Header:
    """The header of a payload that is the context that was ordered, and all of it. Raises PayloadRejected."""
    if header is None or header.context_id != part.context_id:
        raise PayloadRejected("context_id", "is of another context than was ordered")
    if header.tokens != part.tokens:
        raise PayloadRejected("tokens", f"{header.tokens} of a context of {part.tokens}")
    if received is not None and received.entries != header.entries:
        raise PayloadRejected("sent_layers", f"carry {received.entries} of {header.entries} entries")
    return header
