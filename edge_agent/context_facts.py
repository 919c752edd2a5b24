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
    """Facts by context id, of the contexts asked for last."""

    def __init__(self, text: Text, extractor: Extractor) -> None:
        self._text, self._extractor = text, extractor
        self._kept: OrderedDict[str, tuple[Fact, ...]] = OrderedDict()

    async def of(self, held: Held, budget_tokens: int) -> tuple[Fact, ...]:
        """The best facts of a context that take at most so many tokens in the prompt; none for a budget of 0."""
        if not budget_tokens:
            return ()
        facts = self._kept.get(held.context_id)
        if facts is None:
            try:
                facts = await asyncio.to_thread(self._extract, held)
            except Exception:  # whatever a library raises costs the facts, not the transfer
                log.exception("no facts of %s", held.name)
                facts = ()
        self._kept[held.context_id] = facts
        self._kept.move_to_end(held.context_id)
        while len(self._kept) > KEPT_CONTEXTS:
            self._kept.popitem(last=False)
        return await asyncio.to_thread(within, facts, budget_tokens, self._tokens)

    def _extract(self, held: Held) -> tuple[Fact, ...]:
        return self._extractor.extract(self._text.context_text(list(held.ids)))

    def _tokens(self, line: str) -> int:
        return len(self._text.facts_ids(line))
