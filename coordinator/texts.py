"""Texts that were given through the coordinator, kept for receivers whose cache does not arrive."""

from __future__ import annotations

from collections import OrderedDict

from coordinator.fleet import Fleet

DEFAULT_LIMIT_BYTES = 64_000_000


class Texts:
    """By agent and context name, least recently kept or looked for out first when limit_bytes is reached."""

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._texts: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._bytes = 0

    def keep(self, agent: str, name: str, text: str) -> None:
        """Keep the text that an agent holds under a name."""
        self._bytes -= len(self._texts.pop((agent, name), "").encode())
        self._texts[agent, name] = text
        self._bytes += len(text.encode())
        while self._bytes > self._limit_bytes:
            _, out = self._texts.popitem(last=False)
            self._bytes -= len(out.encode())

    def find(self, fleet: Fleet, context_id: str) -> str | None:
        """The text of a context, by the name under which some agent says to hold it. The receiver checks its ids."""
        for agent in dict.fromkeys(agent for agent, _ in self._texts):
            state = fleet.agents.get(agent)
            for context in state.telemetry.contexts if state and state.telemetry else ():
                key = (agent, context.name)
                if context.context_id == context_id and key in self._texts:
                    self._texts.move_to_end(key)
                    return self._texts[key]
        return None
