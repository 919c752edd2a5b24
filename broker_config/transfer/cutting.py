"""Pieces of any size, cut and merged into chunks of one size, while the payload is still being made."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing


async def cut(
    pieces: AsyncIterator[bytes] | Iterable[bytes], chunk_bytes: int, total_bytes: int | None
) -> AsyncGenerator[tuple[bytes, bool], None]:
    """Chunks of at most chunk_bytes, and whether each is the last; exactly one is, and only it may be empty.

    A full chunk is given out as soon as it is full; an empty piece says that what there is must not wait for more.
    Without total_bytes nobody can know that a chunk was the last, so a payload that ends with a full one is closed by
    an empty chunk. Raises ValueError if the pieces are not total_bytes long.
    """
    held, seen, given = bytearray(), 0, 0
    async with aclosing(_each(pieces)) as each:
        async for piece in each:
            held += piece
            seen += len(piece)
            if total_bytes is not None and seen > total_bytes:
                raise ValueError(f"the payload is longer than the {total_bytes} bytes announced")
            offset = 0
            while len(held) - offset >= chunk_bytes:
                given += chunk_bytes
                yield bytes(memoryview(held)[offset : offset + chunk_bytes]), given == total_bytes
                offset += chunk_bytes
            if offset:
                held = held[offset:]
            if held and not piece and seen != total_bytes:
                given += len(held)
                yield bytes(held), False
                held = bytearray()
    if total_bytes is not None and seen != total_bytes:
        raise ValueError(f"the payload ended after {seen} of {total_bytes} bytes announced")
    if held or given == 0 or given != total_bytes:
        yield bytes(held), True


async def _each(pieces: AsyncIterator[bytes] | Iterable[bytes]) -> AsyncGenerator[bytes, None]:
    if isinstance(pieces, AsyncIterator):
        async for piece in pieces:
            yield piece
    else:
        for piece in pieces:
            yield piece
