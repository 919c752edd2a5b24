"""Sending: an order becomes a payload, coded slice by slice while the slices before are on their way.

Its header goes before anything is computed, fetched or coded, so that the receiver can begin. A cache that is ready is
sent last slice first where both ends go on until they meet; one that is not, as it is computed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from functools import partial
from typing import Literal, TypeVar

from broker_config import topics
from broker_config.bus import Bus
from broker_config.errors import BusError, TransferError
from broker_config.messages import Abort, EndState, PaceOrder, SendOrder, SendOutcome
from broker_config.transfer import DEFAULT_WINDOW_BYTES, Pacer, Sent, send
from edge_agent.context_facts import ContextFacts
from edge_agent.engine import Engine
from edge_agent.errors import AgentError, RecipeInvalid
from edge_agent.flow import Flow
from edge_agent.kv.cache import Cache
from edge_agent.kv.header import Header
from edge_agent.kv.payload import PayloadWriter, slice_entries
from edge_agent.kv.recipe import Recipe, recipe
from edge_agent.link_quality import LinkMeter
from edge_agent.memory import ContextStore, Form, Held
from edge_agent.streaming import Stream
from edge_agent.tasks import last_words

log = logging.getLogger(__name__)

T = TypeVar("T")
Slices = AsyncGenerator[bytes, None]
"""Bodies of slices."""

AT_ONCE = b""
"""What was made goes, whether it fills a chunk or not."""
WINDOW_S = 2.0
MEET_WINDOW_CHUNKS = 4
"""So many are on their way at once to a receiver that may have enough any moment: those go for nothing then."""
FACTS_PATIENCE_S = 1.0
"""What a transfer waits for facts at most: without them a cache still serves, and its receiver waits few seconds."""


class Outgoing:
    """Carries out SendOrders. Every order ends in exactly one SendOutcome."""

    def __init__(
        self,
        *,
        agent: str,
        engine: Engine,
        store: ContextStore,
        facts: ContextFacts,
        control: Bus,
        bulk: Bus,
        link: LinkMeter,
    ) -> None:
        self._agent, self._engine, self._store = agent, engine, store
        self._facts = facts
        self._control, self._bulk, self._link = control, bulk, link
        self._jobs: dict[str, _Job] = {}
        """Of the transfers under way."""

    async def carry_out(self, order: SendOrder) -> None:
        """Send what the order asks for and report how it ended."""
        job = _Job(order, asyncio.get_running_loop().time())
        self._jobs[order.transfer] = job
        state: EndState = "refused"
        reason, sent = "", None
        try:
            sent = await self._send(job)
            state = "delivered"
        except TransferError as error:
            state, reason = error.state, error.reason
        except (AgentError, BusError) as error:
            reason = str(error)
            await self._abort(order, "cancelled", reason)
        except TimeoutError:
            state, reason = "expired", f"not sent within {order.expires_s:g} s"
            await self._abort(order, "expired", reason)
        except asyncio.CancelledError:
            await job.close()
            await last_words(self._cancelled(job))
            raise
        finally:
            del self._jobs[order.transfer]
        await self._report(job, state, reason, sent)
        await job.finish()

    def pace(self, order: PaceOrder) -> None:
        """Other rates for a transfer that is under way."""
        job = self._jobs.get(order.transfer)
        if job is None:
            log.info("transfer %s is not under way: its pace is nobody's", order.transfer)
            return
        job.pacer.change(order.rate_bps or None, order.later_rates)
        job.flow.repaced()

    async def _send(self, job: _Job) -> Sent:
        order = job.order
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + order.expires_s
        rung = recipe(order.rung)
        held = self._store.get(order.context_id)
        if order.own_tokens > len(held.ids):
            raise RecipeInvalid(f"{order.own_tokens} leading tokens of a context of {len(held.ids)}")
        flow = job.flow
        with self._store.pinned(held.context_id), self._link.sending(flow):
            async with asyncio.timeout_at(deadline_s):
                header, slices = await self._prepared(job, held, rung)
            sent = await send(
                bulk=self._bulk,
                control=self._control,
                sender=self._agent,
                receiver=order.receiver,
                transfer=order.transfer,
                request=order.request,
                pieces=self._pieces(job, header, slices, flow),
                total_bytes=header.payload_bytes(),
                chunk_bytes=order.chunk_bytes,
                pacer=job.pacer,
                window_bytes=self._window_bytes(job),
                expires_s=max(0.0, round(deadline_s - clock(), 3)),
                on_progress=flow.moved,
            )
        if job.coded_entries:
            elements = header.decoded_bytes() // 4 * job.coded_entries // header.entries
            self._engine.meter.encode(elements, job.encode_s, rung.name)
        self._link.sent(sent.wire_bytes, sent.transfer_s)
        return sent

    def _window_bytes(self, job: _Job) -> int:
        """So much may be under way: on a slow link what it carries in WINDOW_S, or a cancelled transfer clogs it."""
        if job.meet:
            return MEET_WINDOW_CHUNKS * job.order.chunk_bytes
        uplink_bps = self._link.quality.uplink_bps
        return DEFAULT_WINDOW_BYTES if uplink_bps is None else min(DEFAULT_WINDOW_BYTES, int(uplink_bps * WINDOW_S / 8))

    async def _prepared(self, job: _Job, held: Held, rung: Recipe) -> tuple[Header, Slices]:
        """The header, and where its slices come from.

        A rung that chooses by a cache's attention needs the cache for its header; for any other the header is there
        at once.
        """
        order, shelf = job.order, self._store.shelf
        as_text = order.own_tokens == len(held.ids)
        facts = () if as_text else await self._facts.of(held, order.facts_tokens, patience_s=FACTS_PATIENCE_S)
        if rung.needs_mass and not as_text:
            form = await self._kept(held, rung, order.own_tokens)
            if form is None:
                form, job.prefill_s = await self._engine.prefill_context(list(held.ids), order.request, mass=True)
                self._store.keep(held, form)
            begin = time.perf_counter()
            header, bodies = await asyncio.to_thread(
                shelf.to_send, form, rung, held.context_id, held.ids, own_tokens=order.own_tokens, facts=facts
            )
            job.encode_s += time.perf_counter() - begin
            return header, self._coded(job, form, bodies)
        meet = job.meet = order.meet and not as_text and rung.meets
        header = shelf.header(
            rung,
            held.context_id,
            held.ids,
            own_tokens=0 if meet else order.own_tokens,
            facts=facts,
            slice_tokens=shelf.slice_tokens(self._store.rung(held.context_id), rung, meet=meet),
        )
        return header, self._slices(job, held, rung, header) if header.entries else _nothing()

    async def _slices(self, job: _Job, held: Held, rung: Recipe, header: Header) -> Slices:
        """Out of the cache as it is kept; if that can't be sent at the rung, out of one that is computed anew."""
        order, shelf = job.order, self._store.shelf
        form = await self._kept(held, rung, header.own_tokens)
        if form is not None:
            async with aclosing(self._coded(job, form, shelf.bodies(header, form, last_first=job.meet))) as bodies:
                async for body in bodies:
                    yield body
            return
        job.stream = Stream(
            self._engine,
            held.ids,
            order.request,
            header,
            own_tokens=order.own_tokens,
            last_first=job.meet,
            on_whole=partial(self._store.keep, held),
        )
        while (ready := await job.stream.next()) is not None:
            yield await job.timed(partial(shelf.body, header, *ready))

    async def _coded(self, job: _Job, form: Form, bodies: Iterator[bytes]) -> Slices:
        """Each slice coded in a thread, timed, when the transfer asks for it."""
        while (body := await job.timed(lambda: next(bodies, None))) is not None:
            if isinstance(form, Cache):  # what is sent as it is kept says nothing of coding
                job.coded_entries += slice_entries(body)
            yield body

    async def _kept(self, held: Held, rung: Recipe, own_tokens: int) -> Form | None:
        """The cache as it is kept, if it can be sent at the rung."""
        kept, shelf = self._store.rung(held.context_id), self._store.shelf
        if kept is None or not shelf.serves(kept, rung.name):
            return None
        form = await self._store.fetch(held.context_id)
        return form if form is not None and shelf.fits(form, rung, own_tokens=own_tokens) else None

    async def _pieces(self, job: _Job, header: Header, slices: Slices, flow: Flow) -> AsyncIterator[bytes]:
        """The payload piece by piece, its header before anything is done for its slices; none waits for the next."""
        writer = PayloadWriter(header)
        yield job.made(writer.first)
        yield AT_ONCE
        async with aclosing(slices) as bodies:
            async for body in bodies:
                piece = job.made(await job.timed(partial(writer.slice, body)))
                flow.made(job.payload_bytes)
                yield piece
                yield AT_ONCE
        last = job.made(writer.trailer())
        flow.made(job.payload_bytes, all_of_it=True)
        yield last

    async def _cancelled(self, job: _Job) -> None:
        reason = "cancelled by order"
        await asyncio.gather(self._abort(job.order, "cancelled", reason), self._report(job, "cancelled", reason, None))

    async def _abort(self, order: SendOrder, state: Literal["cancelled", "expired"], reason: str) -> None:
        """Tell the receiver, so that it need not wait for the time-out."""
        abort = Abort(transfer=order.transfer, reason=reason[:1024], state=state)
        try:
            await self._bulk.publish(topics.BULK, abort, receiver=order.receiver, sender=self._agent)
        except BusError as error:
            log.warning("%s", error)

    async def _report(self, job: _Job, state: EndState, reason: str, sent: Sent | None) -> None:
        outcome = SendOutcome(
            request=job.order.request,
            transfer=job.order.transfer,
            agent=self._agent,
            state=state,
            payload_bytes=sent.payload_bytes if sent else job.payload_bytes,
            wire_bytes=sent.wire_bytes if sent else 0,
            prefill_s=job.prefill_s + (job.stream.prefill_s if job.stream else 0.0),
            encode_s=job.encode_s,
            transfer_s=sent.transfer_s if sent else 0.0,
            reason=reason[:1024],
        )
        log.info("send %s to %s: %s %s", job.order.transfer, job.order.receiver, state, reason)
        try:
            await self._control.publish(topics.OUTCOMES, outcome, agent=self._agent)
        except BusError as error:
            log.error("outcome of %s could not be reported: %s", job.order.transfer, error)


async def _nothing() -> Slices:
    nobody: tuple[bytes, ...] = ()
    for body in nobody:
        yield body


class _Job:
    """What is known of one order while it is carried out."""

    def __init__(self, order: SendOrder, began_s: float) -> None:
        self.order = order
        self.pacer = Pacer(order.rate_bps or None, order.chunk_bytes, order.later_rates, began_s=began_s)
        self.flow = Flow(order.transfer, chunk_bytes=order.chunk_bytes, pace=self.pacer.rate_bps)
        self.meet = False
        """Whether its receiver goes on computing while slices come, which then come last first."""
        self.payload_bytes = 0
        self.coded_entries = 0
        self.prefill_s = 0.0
        self.encode_s = 0.0
        self.stream: Stream | None = None

    def made(self, piece: bytes) -> bytes:
        """Count a piece of the payload."""
        self.payload_bytes += len(piece)
        return piece

    async def timed(self, work: Callable[[], T]) -> T:
        """Do it in a thread; its seconds count as coding."""

        def run() -> tuple[T, float]:
            start = time.perf_counter()
            return work(), time.perf_counter() - start

        result, seconds = await asyncio.to_thread(run)
        self.encode_s += seconds
        return result

    async def finish(self) -> None:
        """What was begun to be computed is computed to its end, which the next order has use for."""
        try:
            if self.stream is not None:
                await self.stream.finish()
        finally:
            await self.close()

    async def close(self) -> None:
        """Compute no further."""
        if self.stream is not None:
            await self.stream.close()
