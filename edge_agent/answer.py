"""One answer on its way: what is known of it, and that it ends in exactly one report."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from broker_config.errors import BusError
from broker_config.messages import AnswerOrder, AnswerOutcome
from edge_agent.errors import AgentError
from edge_agent.parts import Progress
from edge_agent.tasks import last_words


class Answer:
    """What is known of one question while it is answered. Seconds are the clock's."""

    def __init__(self, order: AnswerOrder, clock: Callable[[], float] = time.perf_counter) -> None:
        self.order, self._clock = order, clock
        self._began_s = clock()
        self.progress: list[Progress] = []
        self.state: Literal["answered", "failed", "cancelled", "expired"] = "failed"
        self.reason = ""
        self.text = ""
        self.tokens = 0
        self.context_tokens = 0
        self.queued_s = 0.0
        self.question_s = 0.0
        self._first_token_s: float | None = None

    def said(self, text: str, tokens: int) -> None:
        """All of it that is there by now."""
        if self._first_token_s is None:
            self._first_token_s = self._clock() - self._began_s
        self.text, self.tokens = text, tokens

    def outcome(self, agent: str) -> AnswerOutcome:
        """As it ended, now."""
        return AnswerOutcome(
            request=self.order.request,
            agent=agent,
            state=self.state,
            answer=self.text,
            answer_tokens=self.tokens,
            context_tokens=self.context_tokens,
            parts=tuple(progress.outcome() for progress in self.progress),
            queued_s=self.queued_s,
            question_s=self.question_s,
            first_token_s=self._first_token_s or 0.0,
            total_s=self._clock() - self._began_s,
            reason=self.reason[:1024],
        )


async def to_its_end(
    answer: Answer, work: Coroutine[Any, Any, None], report: Callable[[Answer], Coroutine[Any, Any, None]]
) -> None:
    """Do the work within the order's time and report how it ended; when cancelled, too."""
    expires_s = answer.order.expires_s
    try:
        async with asyncio.timeout(expires_s):
            await work
        answer.state = "answered"
    except (AgentError, BusError) as error:
        answer.state, answer.reason = "failed", str(error)
    except TimeoutError:
        answer.state, answer.reason = "expired", f"not answered within {expires_s:g} s"
    except asyncio.CancelledError:
        answer.state, answer.reason = "cancelled", "cancelled by order"
        await last_words(report(answer))
        raise
    await report(answer)
