"""Chunks in any order, some twice, some broken, back to a payload. Pure, no I/O."""

from __future__ import annotations

import zlib
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Literal

from broker_config.messages import Chunk, Open

MAX_AHEAD = 4_096  # chunks above the first gap; a window of 1 MiB in the smallest chunks has 1,024
MAX_CORRUPT = 8  # a chunk that is broken more often than that is broken at its source
MAX_NAMED_GAPS = 256  # what an Ack holds


def checksum(transfer: str, index: int, data: bytes, *, last: bool) -> int:
    """What Chunk.crc32 holds: CRC-32 of the chunk's place and its data, so that neither can be taken for another's."""
    return zlib.crc32(data, zlib.crc32(f"{transfer} {index} {last:d} ".encode()))


class Contradiction(Exception):
    """A chunk can't belong to the transfer that was announced. str() says why."""


@dataclass(kw_only=True)
class Assembly:
    """The chunks of one transfer that have arrived. `ready` are in order and not read yet."""

    opening: Open
    next_index: int = 0
    last_index: int | None = None
    ready: deque[bytes] = field(default_factory=deque)
    received_bytes: int = 0
    _above: dict[int, Chunk] = field(default_factory=dict)
    _highest: int = -1
    _corrupt: Counter[int] = field(default_factory=Counter)

    @property
    def complete(self) -> bool:
        """Whether every chunk is there."""
        return self.last_index is not None and self.next_index > self.last_index

    def add(self, chunk: Chunk) -> Literal["new", "duplicate", "corrupt"]:
        """Take in a chunk. Raises Contradiction."""
        if checksum(chunk.transfer, chunk.index, chunk.data, last=chunk.last) != chunk.crc32:
            self._corrupt[chunk.index] += 1  # if the index is what broke, the sender has none such, and its timer helps
            if self._corrupt[chunk.index] > MAX_CORRUPT:
                raise Contradiction(f"chunk {chunk.index} arrived broken {MAX_CORRUPT + 1} times")
            return "corrupt"
        if chunk.index < self.next_index or chunk.index in self._above:
            return "duplicate"
        self._check_place(chunk)
        self._check_size(chunk)
        if chunk.last:
            self.last_index = chunk.index
        self._highest = max(self._highest, chunk.index)
        self._above[chunk.index] = chunk
        self.received_bytes += len(chunk.data)
        while self.next_index in self._above:
            self.ready.append(self._above.pop(self.next_index).data)
            self.next_index += 1
        if self.complete and self.opening.total_bytes not in {None, self.received_bytes}:
            raise Contradiction(f"{self.received_bytes} bytes came, {self.opening.total_bytes} were announced")
        return "new"

    def missing(self) -> tuple[int, ...]:
        """The gaps that are known of, lowest first, as many as an acknowledgement can name."""
        gaps = (index for index in range(self.next_index, self._highest + 1) if index not in self._above)
        broken = (index for index in sorted(self._corrupt) if index > self._highest)
        return tuple(islice(chain(gaps, broken), MAX_NAMED_GAPS))

    def clear(self) -> None:
        """Let go of all bytes."""
        self.ready.clear()
        self._above.clear()

    def _check_place(self, chunk: Chunk) -> None:
        if chunk.index > self.next_index + MAX_AHEAD:
            raise Contradiction(f"chunk {chunk.index} is too far ahead of {self.next_index}")
        if self.last_index is not None and (chunk.index > self.last_index or chunk.last):
            raise Contradiction(f"chunk {chunk.index} contradicts that {self.last_index} was the last")
        if chunk.last and chunk.index < self._highest:
            raise Contradiction(f"chunk {chunk.index} is said to be the last, but {self._highest} arrived")

    def _check_size(self, chunk: Chunk) -> None:
        size_bytes, total_bytes = len(chunk.data), self.opening.total_bytes
        if size_bytes > self.opening.chunk_bytes or not (size_bytes or chunk.last):
            raise Contradiction(
                f"chunk {chunk.index} has {size_bytes} bytes, chunks of {self.opening.chunk_bytes} were announced"
            )
        if total_bytes is not None and self.received_bytes + size_bytes > total_bytes:
            raise Contradiction(f"with chunk {chunk.index} there are more than the {total_bytes} bytes announced")
