"""Sending in virtual time, as edge_agent.outgoing does it: header first, slices as they are coded or computed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from broker_config import topics
from broker_config.bus import Bus
from broker_config.errors import TransferError
from broker_config.messages import SLICE_TOKENS, EndState, PaceOrder, SendOrder, SendOutcome
from broker_config.transfer import DEFAULT_WINDOW_BYTES, Sent
from coordinator.latency import HEADER_BYTES
from edge_agent.errors import AgentError, RecipeInvalid
from edge_agent.flow import Flow as Seen
from edge_agent.kv.recipe import WHOLE, recipe
from edge_agent.link_quality import LinkMeter
from edge_agent.memory.shelf import EXACT
from edge_agent.outgoing import MEET_WINDOW_CHUNKS, WINDOW_S
from edge_agent.tasks import last_words
from scripts.replay.virtual.engine import Live, VirtualEngine
from scripts.replay.virtual.fleet import Neighbours
from scripts.replay.virtual.store import Context, VirtualStore
from scripts.replay.virtual.transfer import Header, Outward, Piece, Slice, Transfer

Pieces = AsyncIterator[tuple[Piece, bool]]


class VirtualSending:
    """Carries out SendOrders. Every order ends in exactly one SendOutcome."""

    def __init__(
        self,
        *,
        agent: str,
        engine: VirtualEngine,
        store: VirtualStore,
        control: Bus,
        link: LinkMeter,
        neighbours: Neighbours,
    ) -> None:
        self._agent, self._engine, self._store = agent, engine, store
        self._control, self._link, self._neighbours = control, link, neighbours
        self._jobs: dict[str, _Job] = {}

    async def carry_out(self, order: SendOrder) -> None:
        """Send what the order asks for and report how it ended."""
        job = self._jobs[order.transfer] = _Job(order)
        state: EndState = "refused"
        reason, sent = "", None
        try:
            async with asyncio.timeout(order.expires_s):
                sent = await self._send(job)
            state = "delivered"
        except TransferError as error:
            state, reason = error.state, error.reason
        except AgentError as error:
            reason = str(error)
            self._abort(job, "cancelled", reason)
        except TimeoutError:
            state, reason = "expired", f"not sent within {order.expires_s:g} s"
            self._abort(job, "expired", reason)
        except asyncio.CancelledError:
            self._abort(job, "cancelled", "cancelled by order")
            await last_words(self._report(job, "cancelled", "cancelled by order", None))
            raise
        finally:
            del self._jobs[order.transfer]
        await self._report(job, state, reason, sent)
        if job.computing is not None:
            await asyncio.wait({job.computing})

    def pace(self, order: PaceOrder) -> None:
        """Other rates for a transfer that is under way."""
        job = self._jobs.get(order.transfer)
        if job is not None and job.outward is not None:
            job.outward.pace(order.rate_bps, order.later_rates, asyncio.get_running_loop().time())
            job.seen.repaced()

    async def _send(self, job: _Job) -> Sent:
        order = job.order
        job.transfer = self._neighbours.transfers.of(order.transfer)
        held = self._store.get(order.context_id)
        if order.own_tokens > held.tokens:
            raise RecipeInvalid(f"{order.own_tokens} leading tokens of a context of {held.tokens}")
        as_text = order.own_tokens == held.tokens
        rung = recipe(order.rung)
        if not as_text and (rung.needs_mass or rung.eviction is not None):
            raise RecipeInvalid(f"{rung.name} chooses by a cache's attention; in virtual time there is none")
        job.meet = order.meet and not as_text and rung.meets
        loop = asyncio.get_running_loop()
        job.seen = Seen(order.transfer, chunk_bytes=order.chunk_bytes, pace=job.pace_bps, clock=loop.time)
        with self._store.pinned(held.context_id), self._link.sending(job.seen):
            job.outward = Outward(
                job.transfer,
                sender=self._neighbours.access(self._agent),
                receiver=self._neighbours.access(order.receiver),
                chunk_bytes=order.chunk_bytes,
                window_bytes=self._window_bytes(job),
                rate_bps=order.rate_bps,
                later_rates=order.later_rates,
                began_s=job.began_s,
                seen=job.seen,
            )
            async with aclosing(self._pieces(job, held)) as pieces:
                sent = await job.outward.send(pieces)
        if job.coded_elements:
            self._engine.meter.encode(job.coded_elements, job.encode_s, order.rung)
        self._link.sent(sent.wire_bytes, sent.transfer_s)
        return sent

    def _window_bytes(self, job: _Job) -> int:
        if job.meet:
            return MEET_WINDOW_CHUNKS * job.order.chunk_bytes
        uplink_bps = self._link.quality.uplink_bps
        return DEFAULT_WINDOW_BYTES if uplink_bps is None else min(DEFAULT_WINDOW_BYTES, int(uplink_bps * WINDOW_S / 8))

    async def _pieces(self, job: _Job, held: Context) -> Any:
        """Header, then slices; each with whether it is the last."""
        order, kept = job.order, self._store.rung(held.context_id)
        own = 0 if job.meet else order.own_tokens
        header = Header(held.context_id, held.tokens, own, order.rung, job.meet)
        slices = self._starts(job, held, own, kept)
        head = Piece(HEADER_BYTES + held.tokens * self._neighbours.model.bytes_per_token_id, header)
        job.seen.made(head.nbytes, all_of_it=not slices)
        yield head, not slices
        ready = kept is not None and self._store.shelf.serves(kept, order.rung)
        if slices and ready:
            self._store.used(held.context_id)
        left = len(slices)
        made = head.nbytes
        async with aclosing(self._coded(job, slices, kept) if ready else self._streamed(job, held, slices)) as coded:
            async for each in coded:
                left -= 1
                piece = Piece(self._neighbours.slice_bytes(held, each, order.rung), each)
                made += piece.nbytes
                job.seen.made(made, all_of_it=not left)
                yield piece, not left

    def _starts(self, job: _Job, held: Context, own: int, kept: str | None) -> list[Slice]:
        """In the order in which they go."""
        rung = recipe(job.order.rung)
        size = rung.slice_tokens
        if job.meet and size != WHOLE and not (kept == rung.name != EXACT):
            size = SLICE_TOKENS
        begin = held.tokens if own == held.tokens else own // size * size
        found = [Slice(start, min(start + size, held.tokens)) for start in range(begin, held.tokens, size)]
        return found[::-1] if job.meet else found

    async def _coded(self, job: _Job, slices: list[Slice], kept: str | None) -> Any:
        for each in slices:
            entries = self._engine.entries(each.stop - each.start)
            job.encode_s += await self._engine.encode(entries, job.order.rung, kept)
            if kept == EXACT:
                job.coded_elements += entries.elements
            yield each

    async def _streamed(self, job: _Job, held: Context, slices: list[Slice]) -> Any:
        """As edge_agent.streaming: of what is computed already the next in order, above own_tokens before the end."""
        news = asyncio.Event()
        job.computing = asyncio.create_task(self._compute(job, held, news), name=f"stream of {held.name}")
        unsent = list(slices)
        while unsent:
            news.clear()
            whole = job.read_tokens >= held.tokens
            ready = [
                each
                for each in unsent
                if whole or (each.stop <= job.read_tokens and each.start >= job.order.own_tokens)
            ]
            if not ready:
                await news.wait()
                continue
            unsent.remove(ready[0])
            async with aclosing(self._coded(job, [ready[0]], EXACT)) as coded:
                async for each in coded:
                    yield each

    async def _compute(self, job: _Job, held: Context, news: asyncio.Event) -> None:
        async for read, seconds in self._engine.read(Live(), held.tokens, job.order.request):
            job.prefill_s += seconds
            job.read_tokens = read
            news.set()
        self._engine.meter.prefill(held.tokens, job.prefill_s)
        await self._store.put(held.context_id)

    def _abort(self, job: _Job, state: EndState, reason: str) -> None:
        """The receiver is told, after the way to it."""
        if job.computing is not None and state == "cancelled":
            job.computing.cancel()
        if job.transfer is not None:
            after_s = self._neighbours.after(self._agent, job.order.receiver)
            asyncio.get_running_loop().call_later(after_s, job.transfer.fail, state, reason)

    async def _report(self, job: _Job, state: EndState, reason: str, sent: Sent | None) -> None:
        outcome = SendOutcome(
            request=job.order.request,
            transfer=job.order.transfer,
            agent=self._agent,
            state=state,
            payload_bytes=job.outward.payload_bytes if job.outward is not None else 0,
            wire_bytes=sent.wire_bytes if sent else 0,
            prefill_s=job.prefill_s,
            encode_s=job.encode_s,
            transfer_s=sent.transfer_s if sent else 0.0,
            reason=reason[:1024],
        )
        await self._control.publish(topics.OUTCOMES, outcome, agent=self._agent)


class _Job:
    """What is known of one order while it is carried out."""

    def __init__(self, order: SendOrder) -> None:
        self.order, self.began_s = order, asyncio.get_running_loop().time()
        self.transfer: Transfer | None = None
        self.outward: Outward | None = None
        self.seen = Seen(order.transfer, pace=self.pace_bps)
        self.meet = False
        self.read_tokens = self.coded_elements = 0
        self.prefill_s = self.encode_s = 0.0
        self.computing: asyncio.Task[None] | None = None

    def pace_bps(self) -> float | None:
        """Its share now; None: unpaced."""
        return self.outward.pace_bps if self.outward is not None else None
