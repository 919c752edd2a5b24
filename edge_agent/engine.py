"""The model, step by step in a thread of its own, shared fairly, measuring its own speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import TypeVar

import numpy as np

from broker_config.messages import CodecSpeed, Speed, codec_family
from edge_agent.errors import CacheInvalid, ContextTooLong
from edge_agent.kv.cache import Cache, Float32
from edge_agent.kv.payload import encode
from edge_agent.kv.reader import Expectation, decode
from edge_agent.kv.recipe import recipe
from edge_agent.model.attention import among_the_last
from edge_agent.model.exchange import expectation, to_send
from edge_agent.model.session import LiveContext, Model
from edge_agent.model.text import AnswerText, Text
from edge_agent.speed import SpeedMeter
from edge_agent.turns import Turns

T = TypeVar("T")

RESERVED_TOKENS = 256
"""Room kept in the window for question and answer when a context is taken in."""

MEASURE_SHORT_TOKENS, MEASURE_DECODE_TOKENS = 16, 6
MEASURE_REPEATS = 2
"""The best of so many counts: at start other work disturbs."""
MEASURE_LONG_TOKENS, MEASURE_BEHIND_TOKENS = 48, 1_024
"""So many are read behind so many that need not be computed: what attention adds."""
MEASURED_RUNG, PLAIN_RUNGS = "klt5", ("q8", "fp16", "float32")
"""Coding is measured at the first, if the bundle has its transform, and at the others; each stands for its family."""


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
        return await self._step(self._measure)

    def after_prefix(self, *, room: int = 0) -> LiveContext:
        """A live context that has read the prompt's prefix, with room for so many tokens more."""
        if self._prefix is None:
            raise RuntimeError("the engine has not been started")
        return self._prefix.fork(room=room)

    def expectation(self, limit_bytes: int) -> Expectation:
        """What payloads this engine can use; limit_bytes bounds their decoded size."""
        return expectation(self.model.manifest, limit_bytes, self.model.transform)

    def check_fits(self, tokens: int) -> None:
        """Raise ContextTooLong if a context of so many tokens leaves no room for a question and its answer."""
        manifest = self.model.manifest
        room = manifest.window_tokens - len(manifest.prompt.prefix_ids) - RESERVED_TOKENS
        if tokens > room:
            raise ContextTooLong(tokens + manifest.window_tokens - room, manifest.window_tokens)

    async def prefill_context(self, ids: list[int], asker: str, *, mass: bool = False) -> tuple[Cache, float]:
        """The cache of a context that starts with ids, and the seconds of computing it took. One turn per chunk.

        mass: with the attention that its last tokens pay to each entry, by which layers are chosen.
        Raises ContextEmpty, ContextTooLong, ModelFailed, and CacheInvalid if the model computed a NaN.
        """
        live = self.after_prefix(room=len(ids))
        start, seconds = live.next_position, 0.0
        async with aclosing(self.read(live, ids, asker, mass=mass)) as chunks:
            async for _, chunk_s in chunks:
                seconds += chunk_s
        self.meter.prefill(len(ids), seconds)
        cache = await self.extract(live, start, live.next_position, mass=mass)
        cache.check()
        return cache, seconds

    async def read(
        self, live: LiveContext, ids: Sequence[int], asker: str, *, mass: bool = False
    ) -> AsyncGenerator[tuple[int, float], None]:
        """Read ids chunk by chunk, one turn each: (ids read so far, seconds of the chunk). Raises like prefill."""
        for last_of, chunk in live.chunks(ids):
            queries = mass and among_the_last(len(ids) - last_of)
            step = partial(live.step, chunk, logits=None, keys=True, queries=queries)
            async with self.turns.turn(asker):
                _, seconds = await self._timed(step)
            yield last_of, seconds

    async def compute(self, live: LiveContext, ids: Sequence[int], *, keys: bool) -> float:
        """Read at most a chunk of ids; seconds of it. keys: for an exact `extract`. The caller holds the turn."""
        step = partial(live.step, np.asarray(ids, dtype=np.int32), logits=None, keys=keys)
        return (await self._timed(step))[1]

    async def extract(self, live: LiveContext, start: int, stop: int, *, mass: bool = False) -> Cache:
        """What was read at positions [start, stop), as LiveContext.extract."""
        return await self._step(partial(live.extract, start, stop, mass=mass))

    async def append(self, live: LiveContext, cache: Cache, tokens: int) -> None:
        """Put a cache of so many tokens after what was read, as LiveContext.append."""
        await self._step(partial(live.append, cache, tokens=tokens))

    async def join(self, contexts: Sequence[tuple[Cache, int]]) -> LiveContext:
        """Caches of contexts of so many tokens, in turn behind the prefix, keys rotated to where they land."""
        live = self.after_prefix(room=sum(tokens for _, tokens in contexts) + RESERVED_TOKENS)
        for cache, tokens in contexts:
            await self.append(live, cache, tokens)
        return live

    async def first_token(self, live: LiveContext, question_ids: list[int]) -> tuple[Float32, float]:
        """Logits after the question, and the seconds it took. The caller holds the turn.

        Raises CacheInvalid if they are no numbers: then something of what was read was none.
        """
        behind = live.next_position - len(self.model.manifest.prompt.prefix_ids)
        logits, seconds = await self._timed(lambda: live.prefill(question_ids))
        if not np.isfinite(logits).all():
            raise CacheInvalid("the model computed a NaN or an infinity from what it had read")
        self.meter.prefill(len(question_ids), seconds, behind=behind)
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

    def _measure(self) -> Speed:
        """Read the prompt's prefix and, with that and a few tokens more, measure this machine."""
        manifest = self.model.manifest
        prefix_ids = list(manifest.prompt.prefix_ids)
        few = prefix_ids[:MEASURE_SHORT_TOKENS]
        seconds = {"few": float("inf"), "prefix": float("inf")}
        self._timed_read(few)  # the first run pays for what later ones reuse
        for _ in range(MEASURE_REPEATS):
            seconds["few"] = min(seconds["few"], self._timed_read(few)[1])
            prefix, took = self._timed_read(prefix_ids)
            seconds["prefix"] = min(seconds["prefix"], took)
        self._prefix = prefix
        per_token = max(1e-6, seconds["prefix"] - seconds["few"]) / max(1, len(prefix_ids) - len(few))
        fixed_s = max(0.0, seconds["few"] - len(few) * per_token)
        cache = prefix.extract(0, len(prefix_ids))
        codecs = tuple(self._timed_codec(cache, rung) for rung in self._rungs_measured())
        return self.meter.begin(
            Speed(
                prefill_fixed_s=fixed_s,
                prefill_tps=1 / per_token,
                prefill_s_per_token2=self._timed_behind(prefix_ids, cache, fixed_s, per_token),
                decode_tps=1 / self._timed_decode(prefix_ids),
                encode_elements_per_s=min(codec.encode_elements_per_s for codec in codecs),
                decode_elements_per_s=min(codec.decode_elements_per_s for codec in codecs),
                codecs=codecs,
            )
        )

    def _rungs_measured(self) -> tuple[str, ...]:
        return (MEASURED_RUNG, *PLAIN_RUNGS) if self.model.transform is not None else PLAIN_RUNGS

    def _timed_read(self, ids: list[int]) -> tuple[LiveContext, float]:
        """A new context that has read ids, and the seconds of it."""
        live, start = self.model.new_context(), time.perf_counter()
        live.prefill(ids)
        return live, time.perf_counter() - start

    def _timed_decode(self, ids: list[int]) -> float:
        """Seconds of decoding one token."""
        live, start = self.after_prefix(room=MEASURE_DECODE_TOKENS), time.perf_counter()
        for token in ids[:MEASURE_DECODE_TOKENS]:
            live.step(np.array([token], dtype=np.int32), logits="last")
        return (time.perf_counter() - start) / min(len(ids), MEASURE_DECODE_TOKENS)

    def _timed_behind(self, ids: list[int], cache: Cache, fixed_s: float, per_token_s: float) -> float:
        """Seconds per token squared, from a read behind copies of a cache. 0 if it took no longer than in front."""
        ids, best_s, behind = ids[:MEASURE_LONG_TOKENS], float("inf"), 0
        most = min(MEASURE_BEHIND_TOKENS, self.model.manifest.window_tokens // 2)
        live = self.after_prefix(room=most + len(ids) * MEASURE_REPEATS)
        while behind + cache.entries <= most:
            live.append(cache, tokens=cache.entries)
            behind += cache.entries
        for _ in range(MEASURE_REPEATS):
            start = time.perf_counter()
            live.prefill(ids)
            best_s = min(best_s, time.perf_counter() - start)
        attended = len(ids) * (len(ids) + 2 * behind)
        return max(0.0, best_s - fixed_s - len(ids) * per_token_s) / attended

    def _timed_codec(self, cache: Cache, name: str) -> CodecSpeed:
        """How fast a cache is encoded and decoded at a rung."""
        manifest, transform, rung = self.model.manifest, self.model.transform, recipe(name)
        taken = []
        for _ in range(MEASURE_REPEATS):
            start = time.perf_counter()
            header, sent = to_send(manifest, "0" * 32, [0] * cache.entries, cache, own_tokens=0, rung=rung)
            data = b"".join(encode(header, sent, transform))
            encoded = time.perf_counter()
            decode(data, self.expectation(1 << 40))
            taken.append((encoded - start, time.perf_counter() - encoded))
        return CodecSpeed(
            codec=codec_family(name),
            encode_elements_per_s=cache.elements / min(each[0] for each in taken),
            decode_elements_per_s=cache.elements / min(each[1] for each in taken),
        )
