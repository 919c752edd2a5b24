"""Answering: the parts of a question are fetched, joined in the order of the request, and the answer is generated."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from broker_config import topics
from broker_config.bus import Bus
from broker_config.errors import BusError
from broker_config.messages import AnswerOrder, AnswerPiece
from edge_agent.answer import Answer, to_its_end
from edge_agent.engine import Engine
from edge_agent.errors import ContextTooLong
from edge_agent.facts import merged, summary
from edge_agent.parts import Parts, Progress
from edge_agent.precedence import Precedence
from edge_agent.tasks import gather_or_cancel

log = logging.getLogger(__name__)


class Answering:
    """Carries out AnswerOrders. Each ends in exactly one AnswerOutcome; pieces of the answer stream before it."""

    def __init__(self, *, agent: str, engine: Engine, parts: Parts, control: Bus) -> None:
        self._agent, self._engine, self._parts, self._control = agent, engine, parts, control

    async def carry_out(self, order: AnswerOrder) -> None:
        """Answer and report how it ended."""
        answer = Answer(order)
        await to_its_end(answer, self._answer(answer), self._report)

    async def _answer(self, answer: Answer) -> None:
        order = answer.order
        question_ids = self._engine.text.question_ids(order.question)
        self._check_room(order, len(question_ids))
        answer.progress = [Progress(part) for part in order.parts]
        precedence = Precedence()
        seats = [precedence.seat() for _ in order.parts]
        fetched = await gather_or_cancel(
            [self._parts.fetch(order, *pair) for pair in zip(answer.progress, seats, strict=True)]
        )
        answer.context_tokens = sum(each.tokens for each in fetched)
        facts_ids = self._engine.text.facts_ids(summary(merged([each.facts for each in fetched])))
        with_facts = [*facts_ids, *question_ids]
        try:
            self._check_room(order, len(with_facts))
            question_ids = with_facts
        except ContextTooLong:
            log.warning("%s: %d tokens of facts do not fit and are left out", order.request, len(facts_ids))
        live = fetched[0].live or await self._engine.join([piece for each in fetched for piece in each.pieces])
        del fetched
        waiting = time.perf_counter()
        async with self._pieces(order) as pieces, self._engine.turns.turn(order.asker):
            begin = time.perf_counter()
            answer.queued_s = begin - waiting
            logits, answer.question_s = await self._engine.first_token(live, question_ids)
            async for token, text, so_far in self._engine.generate(live, logits, max_new_tokens=order.max_new_tokens):
                pieces.put_nowait((text, token))
                answer.said(so_far.answer, len(so_far.ids))

    def _check_room(self, order: AnswerOrder, question_tokens: int) -> None:
        manifest = self._engine.model.manifest
        tokens = len(manifest.prompt.prefix_ids) + sum(part.tokens for part in order.parts)
        tokens += question_tokens + order.max_new_tokens
        if tokens > manifest.window_tokens:
            raise ContextTooLong(tokens, manifest.window_tokens)

    @asynccontextmanager
    async def _pieces(self, order: AnswerOrder) -> AsyncIterator[asyncio.Queue[tuple[str, int] | None]]:
        """A queue whose entries are published in order beside the decoding, as many at once as have piled up."""
        queue: asyncio.Queue[tuple[str, int] | None] = asyncio.Queue()
        publisher = asyncio.create_task(self._publish(order, queue), name=f"pieces of {order.request}")
        try:
            yield queue
        finally:
            queue.put_nowait(None)
            await publisher

    async def _publish(self, order: AnswerOrder, queue: asyncio.Queue[tuple[str, int] | None]) -> None:
        index, ended = 0, False
        while not ended:
            batch = [await queue.get()]
            with contextlib.suppress(asyncio.QueueEmpty):
                while True:
                    batch.append(queue.get_nowait())
            ended = batch[-1] is None
            said = [entry for entry in batch if entry is not None]
            if not said:
                continue
            piece = AnswerPiece(
                request=order.request,
                agent=self._agent,
                index=index,
                text="".join(text for text, _ in said),
                token_ids=tuple(token for _, token in said),
            )
            index += 1
            try:
                await self._control.publish(topics.ANSWERS, piece, agent=self._agent, request=order.request)
            except BusError as error:
                log.warning("a piece of the answer to %s was not published: %s", order.request, error)

    async def _report(self, answer: Answer) -> None:
        outcome = answer.outcome(self._agent)
        log.info("answer %s: %s %s", outcome.request, outcome.state, outcome.reason or repr(outcome.answer))
        try:
            await self._control.publish(topics.OUTCOMES, outcome, agent=self._agent)
        except BusError as error:
            log.error("outcome of %s could not be reported: %s", outcome.request, error)
