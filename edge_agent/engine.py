"""The model, step by step in a thread of its own, shared fairly, measuring its own speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from broker_config.messages import Speed
from edge_agent.errors import ContextTooLong
from edge_agent.kv.cache import Cache, Float32
from edge_agent.kv.payload import encode
from edge_agent.kv.reader import decode
from edge_agent.kv.recipe import recipe
from edge_agent.model.exchange import expectation, payload_header
from edge_agent.model.session import LiveContext, Model
from edge_agent.model.text import AnswerText, Text
from edge_agent.speed import SpeedMeter
from edge_agent.turns import Turns

T = TypeVar("T")

RESERVED_TOKENS = 256
"""Room kept in the window for question and answer when a context is taken in."""

MEASURE_SHORT_TOKENS, MEASURE_LONG_TOKENS, MEASURE_DECODE_TOKENS = 16, 144, 6
MEASURE_REPEATS = 2
"""The best of so many counts: at start other work disturbs."""


class Engine:
    """One model for all of an agent's work. The model runs in one thread; each run is one step of somebody's turn."""

    def __init__(self, model: Model, text: Text) -> None:
        self.model, self.text = model, text
        self.turns = Turns()
        self.meter = SpeedMeter()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._prefix: LiveContext | None = None

    def close(self) -> None:
        """Let the running step finish and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def start(self) -> Speed:
        """Prefill the prompt's prefix and measure this machine's speed."""
        self._prefix = self.model.new_context()
        prefix_ids = self.model.manifest.prompt.prefix_ids
        await self._step(lambda: self._read_prefix(list(prefix_ids)))
        return await self._step(self._measure)

    def after_prefix(self) -> LiveContext:
        """A live context that has read the prompt's prefix."""
        if self._prefix is None:
            raise RuntimeError("the engine has not been started")
        return self._prefix.fork()

    def check_fits(self, tokens: int) -> None:
        """Raise ContextTooLong if a context of so many tokens leaves no room for a question and its answer."""
        manifest = self.model.manifest
        room = manifest.window_tokens - len(manifest.prompt.prefix_ids) - RESERVED_TOKENS
        if tokens > room:
            raise ContextTooLong(tokens + manifest.window_tokens - room, manifest.window_tokens)

    async def prefill_context(self, ids: list[int], asker: str) -> tuple[Cache, float]:
        """The cache of a context that starts with ids, and the seconds of computing it took. One turn per chunk.

        Raises ContextEmpty, ContextTooLong, ModelFailed, and CacheInvalid if the model computed a NaN.
        """
        live = self.after_prefix()
        start, seconds = live.entries, 0.0
        for _, chunk in live.chunks(ids):
            async with self.turns.turn(asker):
                seconds += (await self._timed(lambda chunk=chunk: live.step(chunk, logits=None)))[1]  # type: ignore[misc]
        self.meter.prefill(len(ids), seconds)
        cache = await self._step(lambda: live.extract(start, live.entries))
        cache.check()
        return cache, seconds

    async def join(self, caches: list[Cache]) -> LiveContext:
        """Caches one after another behind the prefix, keys rotated to where they land."""
        live = self.after_prefix()
        for cache in caches:
            await self._step(lambda cache=cache: live.append(cache))  # type: ignore[misc]
        return live

    async def first_token(self, live: LiveContext, question_ids: list[int]) -> tuple[Float32, float]:
        """Logits after the question, and the seconds it took. The caller holds the turn."""
        logits, seconds = await self._timed(lambda: live.prefill(question_ids))
        self.meter.prefill(len(question_ids), seconds)
        return logits, seconds

    async def generate(
        self, live: LiveContext, logits: Float32, *, max_new_tokens: int
    ) -> AsyncIterator[tuple[int, str, AnswerText]]:
        """Greedy tokens: (id, new text, answer so far), until a stop, the end of sequence, or max_new_tokens.

        The caller holds the turn.
        """
        answer = AnswerText(self.text, self.model.manifest)
        for index in range(max_new_tokens):
            token = int(np.argmax(logits))
            yield token, answer.take(token), answer
            if answer.finished or index + 1 == max_new_tokens:
                return
            logits, seconds = await self._timed(
                lambda token=token: live.step(np.array([token], dtype=np.int32), logits="last")  # type: ignore[misc]
            )
            self.meter.decode(seconds)

    async def _timed(self, work: Callable[[], T]) -> tuple[T, float]:
        def run() -> tuple[T, float]:
            start = time.perf_counter()
            return work(), time.perf_counter() - start

        return await self._step(run)

    async def _step(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _read_prefix(self, ids: list[int]) -> None:
        if self._prefix is not None:
            self._prefix.prefill(ids)

    def _measure(self) -> Speed:
        """Prefill of two lengths, a few decodes, and the codec, on arbitrary token ids."""
        rng = np.random.default_rng(0)
        manifest = self.model.manifest
        ids = [int(i) for i in rng.integers(0, manifest.vocabulary, MEASURE_LONG_TOKENS)]
        seconds: dict[int, float] = {}
        live = self.after_prefix()
        live.fork().prefill(ids[:MEASURE_SHORT_TOKENS])  # the first run pays for what later ones reuse
        for count in (MEASURE_SHORT_TOKENS, MEASURE_LONG_TOKENS) * MEASURE_REPEATS:
            probe, start = live.fork(), time.perf_counter()
            probe.prefill(ids[:count])
            seconds[count] = min(seconds.get(count, float("inf")), time.perf_counter() - start)
        per_token = max(1e-6, seconds[MEASURE_LONG_TOKENS] - seconds[MEASURE_SHORT_TOKENS]) / (
            MEASURE_LONG_TOKENS - MEASURE_SHORT_TOKENS
        )
        fixed = max(0.0, seconds[MEASURE_SHORT_TOKENS] - MEASURE_SHORT_TOKENS * per_token)
        start = time.perf_counter()
        for token in ids[:MEASURE_DECODE_TOKENS]:
            probe.prefill([token])
        decode_s = (time.perf_counter() - start) / MEASURE_DECODE_TOKENS
        cache = probe.extract(live.entries, live.entries + MEASURE_LONG_TOKENS)
        header = payload_header(manifest, "0" * 32, ids, own_tokens=0, rung=recipe("q8"))
        start = time.perf_counter()
        data = b"".join(encode(header, cache, recipe("q8")))
        encode_s = time.perf_counter() - start
        start = time.perf_counter()
        decode(data, expectation(manifest, 1 << 40))
        decode_payload_s = time.perf_counter() - start
        return self.meter.begin(
            Speed(
                prefill_fixed_s=fixed,
                prefill_tps=1 / per_token,
                decode_tps=1 / decode_s,
                encode_elements_per_s=cache.elements / encode_s,
                decode_elements_per_s=cache.elements / decode_payload_s,
            )
        )
