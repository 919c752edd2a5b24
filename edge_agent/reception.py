"""One transfer on its way in: its header, and its slices as they come, up to its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from broker_config.errors import BusError, TransferExpired
from broker_config.transfer import Incoming
from edge_agent.errors import AgentError, PayloadRejected
from edge_agent.flow import Flow
from edge_agent.kv.cache import Cache
from edge_agent.kv.header import Header
from edge_agent.kv.reader import PayloadReader
from edge_agent.link_quality import LinkMeter


class Reception:
    """Reads a transfer in a task of its own, decoding while it arrives, until it ends or the time is over.

    check: raises PayloadRejected for a header that was not ordered. news is set at every change. failure: why it ended
    otherwise than delivered; what came before stays good, each slice by its own digest. Slices of all layers and all
    entries are given out as they come (`take`); others are kept for `whole`.
    """

    def __init__(
        self,
        incoming: Incoming,
        reader: PayloadReader,
        check: Callable[[Header], None],
        news: asyncio.Event,
        *,
        link: LinkMeter,
        timeout_s: float,
    ) -> None:
        self.incoming, self._reader, self._check, self._news = incoming, reader, check, news
        self._link = link
        self.failure: AgentError | BusError | None = None
        self.over = False
        self.payload_bytes = self.first_bytes = self.decoded_elements = 0
        self.decode_s = self.receive_s = 0.0
        self._start = time.perf_counter()
        self.began_s = asyncio.get_running_loop().time()
        self._slices: list[tuple[int, Cache]] = []
        self._accepted: asyncio.Future[Header] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(timeout_s), name=f"reception of {incoming.transfer}")

    async def header(self) -> Header:
        """The header, once it is there and found good. Raises what ended the transfer before."""
        either: set[asyncio.Future[Any]] = {self._accepted, self._task}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._accepted.done():
            self._task.result()
        return self._accepted.result()

    @property
    def rung(self) -> str:
        """At which the entries came; "" before the header."""
        return self._reader.header.rung if self._reader.header is not None else ""

    def take(self) -> list[tuple[int, Cache]]:
        """(first token, entries) of the slices that have come since."""
        taken, self._slices = self._slices, []
        return taken

    def passed(self, token: int) -> None:
        """Slices that end at or before this token need not be decoded any more."""
        header = self._reader.header
        self._reader.passed = max(0, token - header.own_tokens) if header is not None else 0

    async def end(self) -> None:
        """Wait for the end of it."""
        await asyncio.wait({self._task})
        self._task.result()

    def whole(self) -> Cache | None:
        """All entries that came, of a payload whose slices are of no use one by one. Raises PayloadRejected."""
        return self._reader.finish()

    async def close(self) -> None:
        """Read no further, let go of everything."""
        self._task.cancel()
        await asyncio.wait({self._task})
        self.incoming.close()
        if not self._accepted.done():
            self._accepted.cancel()

    async def _run(self, timeout_s: float) -> None:
        try:
            with self._link.receiving(Flow(self.incoming.transfer)) as flow:
                async with asyncio.timeout(timeout_s):
                    await self._read(flow)
        except TimeoutError:
            reason = f"not complete within {timeout_s:g} s"
            await self.incoming.expire(reason)
            self.failure = TransferExpired(self.incoming.transfer, reason)
        except (AgentError, BusError) as error:
            if isinstance(error, AgentError):
                await self.incoming.refuse(str(error))
            self.failure = error
        finally:
            self.over = True
            self.receive_s = time.perf_counter() - self._start
            if self.failure is not None and not self._accepted.done():
                self._accepted.set_exception(self.failure)
                self._accepted.exception()  # whoever waits for it is told; nobody may be
            self._news.set()

    async def _read(self, flow: Flow) -> None:
        async for piece in self.incoming.pieces():
            flow.moved(self.incoming.received_bytes)
            begin = time.perf_counter()
            self.first_bytes = self.first_bytes or len(piece)
            self.payload_bytes += len(piece)
            try:
                await asyncio.to_thread(self._reader.feed, piece)
            finally:
                self.decode_s += time.perf_counter() - begin
            self._look()
        if not self.incoming.enough:
            self._finish()

    def _look(self) -> None:
        """Take what the reader has found."""
        header = self._reader.header
        if header is None:
            return
        if not self._accepted.done():
            self._check(header)
            self._accepted.set_result(header)
        if usable_by_slices(header):
            found = self._reader.take()
            self.decoded_elements += sum(cache.elements for _, cache in found)
            self._slices += [(header.own_tokens + start, cache) for start, cache in found]
        self._news.set()

    def _finish(self) -> None:
        """All bytes are there."""
        if not self._reader.complete:
            self._reader.finish()  # says what is missing
        if self._reader.header is None:
            raise PayloadRejected("header", "missing")


def usable_by_slices(header: Header) -> bool:
    """Whether each slice is of use as soon as it is there: it has all entries of its tokens, of every layer."""
    return header.kept is None and len(header.shape.sent_layers) in {header.shape.layers, 0}
