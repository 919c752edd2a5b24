"""Sending: an order becomes a payload, coded slice by slice while the slices before are on their way."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from typing import Literal

from broker_config import topics
from broker_config.bus import Bus
from broker_config.errors import BusError, TransferError
from broker_config.messages import Abort, EndState, SendOrder, SendOutcome
from broker_config.transfer import Sent, send
from edge_agent.context_facts import ContextFacts
from edge_agent.engine import Engine
from edge_agent.errors import AgentError, RecipeInvalid
from edge_agent.flow import Flow
from edge_agent.kv.cache import Cache
from edge_agent.kv.payload import pieces
from edge_agent.kv.recipe import Recipe, recipe
from edge_agent.link_quality import LinkMeter
from edge_agent.memory import ContextStore, Form, Held
from edge_agent.tasks import last_words

log = logging.getLogger(__name__)

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

    async def carry_out(self, order: SendOrder) -> None:
        """Send what the order asks for and report how it ended."""
        job = _Job(order)
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
            await last_words(self._cancelled(job))
            raise
        await self._report(job, state, reason, sent)

    async def _send(self, job: _Job) -> Sent:
        order = job.order
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + order.expires_s
        rung = recipe(order.rung)
        held = self._store.get(order.context_id)
        if order.own_tokens > len(held.ids):
            raise RecipeInvalid(f"{order.own_tokens} leading tokens of a context of {len(held.ids)}")
        flow = Flow(order.transfer, pace_bps=order.rate_bps)
        with self._store.pinned(held.context_id), self._link.sending(flow):
            async with asyncio.timeout_at(deadline_s):
                as_text = order.own_tokens == len(held.ids)
                form = None if as_text else await self._form(job, held, rung)
                facts = () if as_text else await self._facts.of(held, order.facts_tokens, patience_s=FACTS_PATIENCE_S)
            begin = time.perf_counter()
            header, bodies = await asyncio.to_thread(
                self._store.shelf.to_send,
                form,
                rung,
                held.context_id,
                held.ids,
                own_tokens=order.own_tokens,
                facts=facts,
            )
            job.encode_s += time.perf_counter() - begin
            sent = await send(
                bulk=self._bulk,
                control=self._control,
                sender=self._agent,
                receiver=order.receiver,
                transfer=order.transfer,
                request=order.request,
                pieces=self._pieces(job, pieces(header, bodies), flow),
                total_bytes=header.payload_bytes(),
                chunk_bytes=order.chunk_bytes,
                rate_bps=order.rate_bps,
                expires_s=max(0.0, round(deadline_s - clock(), 3)),
                on_progress=flow.moved,
            )
        if isinstance(form, Cache):  # what is sent as it is kept says nothing of coding
            self._engine.meter.encode(header.decoded_bytes() // 4, job.encode_s, rung.name)
        self._link.sent(sent.wire_bytes, sent.transfer_s)
        return sent

    async def _form(self, job: _Job, held: Held, rung: Recipe) -> Form:
        """The cache as it is kept; if that can't be sent at the rung, one computed anew, which is then to be kept."""
        kept, shelf = self._store.rung(held.context_id), self._store.shelf
        if kept is not None and shelf.serves(kept, rung.name):
            form = await self._store.fetch(held.context_id)
            if form is not None and shelf.fits(form, rung, own_tokens=job.order.own_tokens):
                return form
        cache, job.prefill_s = await self._engine.prefill_context(list(held.ids), job.order.request, mass=True)
        self._store.keep(held, cache)
        return cache

    async def _pieces(self, job: _Job, pieces: Iterator[bytes], flow: Flow) -> AsyncIterator[bytes]:
        """Each piece coded in a thread, timed, when the transfer asks for it."""

        def timed() -> tuple[bytes | None, float]:
            start = time.perf_counter()
            return next(pieces, None), time.perf_counter() - start

        while True:
            piece, seconds = await asyncio.to_thread(timed)
            job.encode_s += seconds
            if piece is None:
                flow.made(job.payload_bytes, all_of_it=True)
                return
            job.payload_bytes += len(piece)
            flow.made(job.payload_bytes)
            yield piece

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
            payload_bytes=job.payload_bytes,
            wire_bytes=sent.wire_bytes if sent else 0,
            prefill_s=job.prefill_s,
            encode_s=job.encode_s,
            transfer_s=sent.transfer_s if sent else 0.0,
            reason=reason[:1024],
        )
        log.info("send %s to %s: %s %s", job.order.transfer, job.order.receiver, state, reason)
        try:
            await self._control.publish(topics.OUTCOMES, outcome, agent=self._agent)
        except BusError as error:
            log.error("outcome of %s could not be reported: %s", job.order.transfer, error)


class _Job:
    """What is known of one order while it is carried out."""

    def __init__(self, order: SendOrder) -> None:
        self.order = order
        self.payload_bytes = 0
        self.prefill_s = 0.0
        self.encode_s = 0.0
