"""Facts of the contexts that an agent holds: extracted when first wanted, in a thread, and kept for the next order."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict

from edge_agent.facts import Extractor, Fact, within
from edge_agent.memory import Held
from edge_agent.model.text import Text

log = logging.getLogger(__name__)

KEPT_CONTEXTS = 64


class ContextFacts:
    """Facts by context id, of the contexts asked for last: each a task, that several orders may wait for."""

    def __init__(self, text: Text, extractor: Extractor) -> None:
        self._text, self._extractor = text, extractor
        self._kept: OrderedDict[str, asyncio.Task[tuple[Fact, ...]]] = OrderedDict()

    async def of(self, held: Held, budget_tokens: int, *, patience_s: float | None = None) -> tuple[Fact, ...]:
        """The best facts of a context that take at most so many tokens in the prompt; none for a budget of 0.

        None either if they are not there after patience_s: the first extraction loads its libraries, which takes
        seconds on a small device, and goes on for the next order.
        """
        if not budget_tokens:
            return ()
        work = self._kept.get(held.context_id)
        if work is None:
            work = asyncio.create_task(self._extracted(held), name=f"facts of {held.name}")
        self._kept[held.context_id] = work
        self._kept.move_to_end(held.context_id)
        while len(self._kept) > KEPT_CONTEXTS:
            self._kept.popitem(last=False)[1].cancel()
        if not (await asyncio.wait({work}, timeout=patience_s))[0]:
            log.warning("facts of %s are not ready after %g s: its cache is sent without", held.name, patience_s)
            return ()
        return () if work.cancelled() else await asyncio.to_thread(within, work.result(), budget_tokens, self._tokens)

    async def _extracted(self, held: Held) -> tuple[Fact, ...]:
        try:
            return await asyncio.to_thread(self._extract, held)
        except Exception:  # whatever a library raises costs the facts, not the transfer
            log.exception("no facts of %s", held.name)
            return ()

    def _extract(self, held: Held) -> tuple[Fact, ...]:
        return self._extractor.extract(self._text.context_text(list(held.ids)))

    def _tokens(self, line: str) -> int:
        return len(self._text.facts_ids(line))
