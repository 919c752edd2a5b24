"""The pure parts of a transfer: cutting, window, assembly; and the pacer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.messages import Chunk, Open
from broker_config.transfer import Pacer
from broker_config.transfer.assembly import MAX_AHEAD, MAX_CORRUPT, Assembly, Contradiction, checksum
from broker_config.transfer.cutting import cut
from broker_config.transfer.window import FIRST_TIMEOUT_S, MIN_TIMEOUT_S, Window
from scripts.replay.clock import run_virtual

TRANSFER = "0123456789abcdef"
CHUNK_BYTES = 1_024


def _opening(total_bytes: int | None = None) -> Open:
    return Open(
        transfer=TRANSFER,
        request=TRANSFER,
        sender="pi-1",
        chunk_bytes=CHUNK_BYTES,
        expires_s=60,
        total_bytes=total_bytes,
    )


def _chunk(index: int, data: bytes, *, last: bool = False, crc32: int | None = None) -> Chunk:
    right = checksum(TRANSFER, index, data, last=last)
    return Chunk(transfer=TRANSFER, index=index, crc32=right if crc32 is None else crc32, data=data, last=last)


async def _cut(pieces: list[bytes], size: int, total: int | None) -> list[tuple[bytes, bool]]:
    async def stream() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    from_list = [chunk async for chunk in cut(pieces, size, total)]
    assert [chunk async for chunk in cut(stream(), size, total)] == from_list
    return from_list


@given(st.lists(st.binary(max_size=50), max_size=12), st.integers(1, 40), st.booleans())
def test_pieces_of_any_size_become_chunks_of_at_most_one_size(pieces: list[bytes], size: int, announced: bool) -> None:
    payload = b"".join(pieces)
    chunks = asyncio.run(_cut(pieces, size, len(payload) if announced else None))
    assert b"".join(data for data, _ in chunks) == payload
    assert [last for _, last in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(data for data, last in chunks if not last)
    assert max(len(data) for data, _ in chunks) <= size
    if all(pieces):  # an empty piece lets go what there is
        assert all(len(data) == size for data, last in chunks if not last)


@pytest.mark.parametrize("announced", [True, False])
def test_an_empty_piece_sends_what_there_is_on_its_way(announced: bool) -> None:
    pieces = [b"head", b"", b"", b"slice one", b"", b"two", b"tail", b""]
    chunks = asyncio.run(_cut(pieces, 6, sum(map(len, pieces)) if announced else None))
    assert [data for data, _ in chunks[:3]] == [b"head", b"slice ", b"one"]
    assert (
        chunks[3:] == [(b"twotai", False), (b"l", True)]
        if announced
        else [
            (b"twotai", False),
            (b"l", False),
            (b"", True),
        ]
    )


@pytest.mark.parametrize("total", [0, 9, 11])
def test_pieces_that_are_not_as_long_as_announced_are_an_error(total: int) -> None:
    with pytest.raises(ValueError, match="announced"):
        asyncio.run(_cut([bytes(10)], 4, total))


@given(st.binary(max_size=8_000), st.randoms(use_true_random=False), st.booleans())
def test_chunks_in_any_order_and_twice_make_the_payload(payload: bytes, random: object, announced: bool) -> None:
    cuts = asyncio.run(_cut([payload], CHUNK_BYTES, len(payload)))
    chunks = [_chunk(index, data, last=last) for index, (data, last) in enumerate(cuts)] * 2
    random.shuffle(chunks)  # type: ignore[attr-defined]
    assembly = Assembly(opening=_opening(len(payload) if announced else None))
    seen: set[int] = set()
    for chunk in chunks:
        assert assembly.add(chunk) == ("duplicate" if chunk.index in seen else "new")
        seen.add(chunk.index)
        gaps = sorted(set(range(max(seen))) - seen)
        assert assembly.missing() == tuple(gaps)
        assert assembly.complete == (len(seen) == len(cuts))
    assert b"".join(assembly.ready) == payload


@given(st.integers(0, 2**24), st.binary(max_size=50), st.booleans(), st.data())
def test_a_checksum_covers_place_and_data(index: int, data: bytes, last: bool, drawn: st.DataObject) -> None:
    other = drawn.draw(st.integers(0, 2**24).filter(lambda value: value != index))
    right = checksum(TRANSFER, index, data, last=last)
    assert right != checksum(TRANSFER, other, data, last=last)
    assert right != checksum(TRANSFER, index, data, last=not last)
    assert right != checksum(TRANSFER, index, data + b"x", last=last)


def test_a_broken_chunk_becomes_a_gap_and_too_many_a_contradiction() -> None:
    assembly = Assembly(opening=_opening())
    for _ in range(MAX_CORRUPT):
        assert assembly.add(_chunk(0, bytes(CHUNK_BYTES), crc32=1)) == "corrupt"
        assert assembly.missing() == (0,)
    with pytest.raises(Contradiction, match="arrived broken"):
        assembly.add(_chunk(0, bytes(CHUNK_BYTES), crc32=1))


@pytest.mark.parametrize(
    "chunks",
    [
        [_chunk(0, bytes(CHUNK_BYTES + 1))],
        [_chunk(0, b"")],
        [_chunk(0, bytes(CHUNK_BYTES), last=True)],
        [_chunk(2, bytes(CHUNK_BYTES)), _chunk(0, bytes(CHUNK_BYTES))],
        [_chunk(0, bytes(CHUNK_BYTES)), _chunk(1, bytes(475), last=True)],
        [_chunk(1, bytes(475), last=True), _chunk(0, bytes(CHUNK_BYTES))],
        [_chunk(1, bytes(477), last=True), _chunk(0, bytes(CHUNK_BYTES))],
        [_chunk(1, bytes(476), last=True), _chunk(2, bytes(CHUNK_BYTES))],
        [_chunk(1, bytes(476), last=True), _chunk(0, bytes(476), last=True)],
        [_chunk(MAX_AHEAD + 1, bytes(CHUNK_BYTES))],
    ],
)
def test_chunks_that_contradict_the_announcement_are_refused(chunks: list[Chunk]) -> None:
    assembly = Assembly(opening=_opening(1_500))
    for chunk in chunks[:-1]:
        assembly.add(chunk)
    with pytest.raises(Contradiction):
        assembly.add(chunks[-1])


def test_the_window_holds_back_what_is_not_acknowledged_but_always_lets_two_chunks_go() -> None:
    window = Window(window_bytes=10)
    for index in range(2):
        assert window.room()
        window.add(bytes(100), last=False, now_s=0)
        assert window.pop_waiting() == index
        window.started(index, 0)
    assert not window.room()
    assert window.acknowledged(1, (), 1)
    assert window.room()


def test_the_timeout_adapts_to_the_round_trip_and_the_rate_and_doubles() -> None:
    window = Window(window_bytes=1 << 20, rate_bps=8_000)
    window.add(bytes(10), last=False, now_s=0)
    assert window.timeout_s() == FIRST_TIMEOUT_S
    window.started(0, 0)
    window.published(0, failed=False)
    assert window.acknowledged(1, (), 0.01)
    assert window.timeout_s() == MIN_TIMEOUT_S
    window.add(bytes(5_000), last=False, now_s=1)
    assert window.timeout_s() == pytest.approx(5.0)
    slow = Window(window_bytes=1 << 20)
    slow.add(bytes(10), last=False, now_s=0)
    for doubling in (1, 2, 4, 8):
        assert slow.timeout_s() == FIRST_TIMEOUT_S * doubling
        slow.timed_out(0)


def test_a_chunk_that_has_not_left_us_is_not_sent_twice() -> None:
    window = Window(window_bytes=1 << 20)
    window.add(b"x", last=True, now_s=0)
    window.started(window.pop_waiting() or 0, 0)
    window.timed_out(5)
    window.acknowledged(0, (0,), 6)
    assert window.pop_waiting() is None
    window.published(0, failed=False)
    window.timed_out(10)
    assert window.pop_waiting() == 0


def test_old_acknowledgements_change_nothing() -> None:
    window = Window(window_bytes=1 << 20)
    for index in range(4):
        window.add(b"x", last=index == 3, now_s=0)
        window.started(index, 0)
    assert window.acknowledged(3, (), 1)
    assert not window.acknowledged(1, (1,), 2)
    assert not window.acknowledged(9, (), 2)
    assert window.next_index == 3
    assert window.acknowledged(4, (), 2)
    assert list(window.held) == [3]


@given(st.lists(st.integers(1, 5_000), min_size=5, max_size=60), st.floats(1e4, 1e8))
def test_the_pacer_keeps_the_rate_over_any_pieces(sizes: list[int], rate_bps: float) -> None:
    async def run() -> float:
        pacer = Pacer(rate_bps, 5_000)
        for size in sizes:
            await asyncio.sleep(pacer.delay_s(size))
        return asyncio.get_running_loop().time()

    took_s = run_virtual(run())
    burst_bytes = max(5_000, 0.05 * rate_bps / 8)
    assert took_s == pytest.approx(max(0.0, (sum(sizes) - burst_bytes) * 8 / rate_bps), abs=1e-5, rel=1e-6)


def test_a_pacer_without_rate_holds_nothing_back() -> None:
    assert Pacer(None, 1).delay_s(1 << 30) == 0


@pytest.mark.parametrize("rate_bps", [0.0, -1.0, float("nan")])
def test_a_rate_must_be_above_nothing(rate_bps: float) -> None:
    with pytest.raises(ValueError, match="rate_bps"):
        Pacer(rate_bps, 1)
