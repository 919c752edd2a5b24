"""An agent's engine in virtual time: its own turns and learned speed; what would be computed is waited for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Self

import msgspec

from broker_config.messages import Speed
from coordinator.latency import decode_s, encode_s, prefill_s
from edge_agent.speed import SpeedMeter
from edge_agent.turns import Turns

PREFILL_CHUNK_TOKENS = 128
"""As agents have it by default."""
COPYING = 8.0
"""Entries are copied and rotated so many times as fast as the plainest coding decodes: 15 ms for 512 tokens on x86."""


@dataclass(frozen=True)
class Entries:
    """In the place of a cache: how many tokens it has entries of."""

    entries: int
    elements: int

    def between(self, start: int, stop: int) -> Entries:
        """Of these tokens alone."""
        return Entries(stop - start, self.elements * (stop - start) // max(1, self.entries))

    def moved(self, by: int) -> Self:  # noqa: ARG002  wherever they stand, they are as many
        return self

    def check(self) -> None:
        """They are always good."""


@dataclass
class Live:
    """In the place of a live context: how many tokens it has read behind the prefix."""

    next_position: int = 0


class VirtualEngine:
    """What edge_agent.engine.Engine is to an agent's rooms.

    speed: what the device really does; noise: how far each piece of work differs from it, as a standard deviation of
    its logarithm.
    """

    def __init__(self, speed: Speed, *, elements_per_token: int, noise: float, dice: random.Random) -> None:
        self.turns = Turns()
        self.meter = SpeedMeter()
        self.model = SimpleNamespace(prefill_chunk=PREFILL_CHUNK_TOKENS)
        self.elements_per_token = elements_per_token
        self._speed, self._noise, self._dice = speed, noise, dice
        self._thread = asyncio.Lock()
        plainest = max((each.decode_elements_per_s for each in speed.codecs), default=speed.decode_elements_per_s)
        self._copies_per_s = COPYING * plainest
        self.meter.begin(self._measured())

    def after_prefix(self, *, room: int = 0) -> Live:  # noqa: ARG002  there is always room
        return Live()

    async def compute(self, live: Live, ids: Sequence[int], *, keys: bool) -> float:  # noqa: ARG002
        """Read at most a chunk of ids; seconds of it. The caller holds the turn."""
        seconds = await self._work(prefill_s(self._speed, len(ids), live.next_position))
        live.next_position += len(ids)
        return seconds

    async def read(self, live: Live, tokens: int, asker: str) -> AsyncIterator[tuple[int, float]]:
        """Read so many tokens chunk by chunk, one turn each: (read so far, seconds of the chunk)."""
        for start in range(0, tokens, PREFILL_CHUNK_TOKENS):
            chunk = range(start, min(tokens, start + PREFILL_CHUNK_TOKENS))
            async with self.turns.turn(asker):
                seconds = await self.compute(live, chunk, keys=True)
            yield chunk.stop, seconds

    async def prefill_context(self, tokens: int, asker: str) -> tuple[Entries, float]:
        """The cache of a context, and the seconds of computing it took."""
        seconds = 0.0
        async for _, chunk_s in self.read(Live(), tokens, asker):
            seconds += chunk_s
        self.meter.prefill(tokens, seconds)
        return self.entries(tokens), seconds

    async def append(self, live: Live, cache: Entries, tokens: int) -> None:
        """Put a cache of so many tokens after what was read."""
        await self._copy(cache.elements)
        live.next_position += tokens

    async def extract(self, live: Live, start: int, stop: int) -> Entries:  # noqa: ARG002
        """What was read at positions [start, stop)."""
        entries = self.entries(stop - start)
        await self._copy(entries.elements)
        return entries

    async def join(self, contexts: Sequence[tuple[Entries, int]]) -> Live:
        """Caches of contexts of so many tokens, in turn behind the prefix."""
        live = Live()
        for cache, tokens in contexts:
            await self.append(live, cache, tokens)
        return live

    async def first_token(self, live: Live, tokens: int) -> float:
        """Read a question of so many tokens; seconds of it. The caller holds the turn."""
        behind = live.next_position
        seconds = await self._work(prefill_s(self._speed, tokens, behind))
        self.meter.prefill(tokens, seconds, behind=behind)
        live.next_position += tokens
        return seconds

    async def generate(self, tokens: int) -> None:
        """So many tokens behind the first one. The caller holds the turn."""
        if tokens > 0 and self._speed.decode_tps > 0:
            seconds = await self._work(tokens / self._speed.decode_tps)
            self.meter.decode(seconds / tokens)

    async def encode(self, entries: Entries, rung: str, kept: str | None = None) -> float:
        """Code entries at a rung out of what is kept at another (None: floats), beside the model; seconds of it."""
        return await self._beside(encode_s(self._speed, entries.elements, rung, kept))

    async def decode(self, entries: Entries, rung: str) -> float:
        """Decode entries of a rung, beside the model; seconds of it."""
        return await self._beside(decode_s(self._speed, entries.elements, rung))

    def entries(self, tokens: int) -> Entries:
        """Those of so many tokens."""
        return Entries(tokens, tokens * self.elements_per_token)

    def _measured(self) -> Speed:
        """As it is measured when an agent starts."""
        return msgspec.structs.replace(
            self._speed,
            prefill_tps=self._speed.prefill_tps * self._factor(),
            decode_tps=self._speed.decode_tps * self._factor(),
        )

    async def _copy(self, elements: int) -> None:
        await self._work(elements / self._copies_per_s)

    async def _work(self, seconds: float) -> float:
        """Of the model's thread, in which one thing is done after another."""
        async with self._thread:
            return await self._beside(seconds)

    async def _beside(self, seconds: float) -> float:
        if seconds <= 0:
            return 0.0
        seconds *= self._factor()
        await asyncio.sleep(seconds)
        return seconds

    def _factor(self) -> float:
        return self._dice.lognormvariate(0.0, self._noise)
