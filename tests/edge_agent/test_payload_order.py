"""Slices may come in any order, each once and where it belongs, and can be used as they come."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.errors import PayloadRejected
from edge_agent.kv.cache import Cache, concatenate
from edge_agent.kv.payload import PayloadWriter, encode, slice_bodies
from edge_agent.kv.reader import BodyReader, PayloadReader, decode
from edge_agent.kv.recipe import recipe
from edge_agent.kv.shelved import as_payload, from_payload, shelve
from tests.edge_agent.caches import equal, expectation_for, header_for, made_up, shapes, transform_for

names = st.sampled_from(["float32", "fp16", "q3", "q8", "klt0", "klt5"])


def in_pieces(cache: Cache, name: str, *, own: int = 0, slice_tokens: int = 2) -> list[bytes]:
    """Header, slices in rising order, trailer."""
    header = header_for(cache, recipe(name), own=own, slice_tokens=slice_tokens)
    return list(encode(header, cache, transform_for(cache)))


def ordered(cache: Cache, name: str, order: Sequence[int], *, own: int = 0, slice_tokens: int = 2) -> list[bytes]:
    """The pieces of the payload whose slices stand in this order."""
    header = header_for(cache, recipe(name), own=own, slice_tokens=slice_tokens)
    bodies = list(slice_bodies(header, cache, transform_for(cache)))
    writer = PayloadWriter(header)
    return [writer.first, *(writer.slice(bodies[index]) for index in order), writer.trailer()]


@given(shapes, names, st.integers(1, 4), st.data())
def test_the_whole_is_the_same_whatever_the_order(
    shape: dict[str, int], name: str, slice_tokens: int, data: st.DataObject
) -> None:
    cache = made_up(**shape)
    own = data.draw(st.integers(0, shape["entries"] - 1))
    count = -(-(shape["entries"] - own) // slice_tokens)
    order = data.draw(st.permutations(range(count)))
    mixed = b"".join(ordered(cache, name, order, own=own, slice_tokens=slice_tokens))
    rising = decode(b"".join(in_pieces(cache, name, own=own, slice_tokens=slice_tokens)), expectation_for(cache))[1]
    header, back = decode(mixed, expectation_for(cache))
    assert rising is not None
    assert back is not None
    assert equal(back, rising)
    assert header.payload_bytes() in {None, len(mixed)}


@given(shapes, names, st.data())
def test_each_slice_can_be_used_as_soon_as_it_is_there(shape: dict[str, int], name: str, data: st.DataObject) -> None:
    cache = made_up(**shape)
    count = -(-shape["entries"] // 2)
    order = data.draw(st.permutations(range(count)))
    whole = decode(b"".join(in_pieces(cache, name)), expectation_for(cache))[1]
    assert whole is not None
    reader, taken = PayloadReader(expectation_for(cache)), {}
    first, *slices, trailer = ordered(cache, name, order)
    reader.feed(first)
    assert reader.take() == []
    for index, piece in zip(order, slices, strict=True):
        reader.feed(piece)
        ((start, one),) = reader.take()
        assert start == 2 * index
        assert equal(one, whole.between(start, start + 2))
        taken[start] = one
    assert not reader.complete
    reader.feed(trailer)
    assert reader.complete
    assert equal(concatenate([taken[start] for start in sorted(taken)]), whole)


@given(shapes, names)
def test_last_first_is_one_of_the_orders(shape: dict[str, int], name: str) -> None:
    cache = made_up(**shape)
    header = header_for(cache, recipe(name), slice_tokens=2)
    sent = list(encode(header, cache, transform_for(cache), last_first=True))
    assert sent == ordered(cache, name, range(len(sent) - 2)[::-1])


@given(shapes, names, st.data())
def test_a_shelved_cache_can_be_read_from_any_order(shape: dict[str, int], name: str, data: st.DataObject) -> None:
    cache = made_up(**shape)
    order = data.draw(st.permutations(range(-(-shape["entries"] // 2))))
    kept = shelve(header_for(cache, recipe(name), slice_tokens=2), cache, transform_for(cache))
    back = from_payload(b"".join(ordered(cache, name, order)), expectation_for(cache))
    assert (back.header, back.bodies) == (kept.header, kept.bodies)
    assert from_payload(as_payload(back), expectation_for(cache)).bodies == kept.bodies


@pytest.mark.parametrize("kind", [PayloadReader, BodyReader])
@pytest.mark.parametrize("order", list(itertools.product(range(3), repeat=2)))
def test_a_slice_that_comes_twice_is_refused(kind: type[PayloadReader], order: tuple[int, int]) -> None:
    cache = made_up(entries=5)
    pieces = ordered(cache, "q4", order)
    reader = kind(expectation_for(cache))
    reader.feed(b"".join(pieces[:2]))
    if order[0] == order[1]:
        with pytest.raises(PayloadRejected, match="comes twice"):
            reader.feed(pieces[2])
    else:
        reader.feed(pieces[2])
        with pytest.raises(PayloadRejected, match="trailer: 2 slices announced"):
            reader.feed(pieces[3])


@pytest.mark.parametrize(
    ("start", "entries"), [(1, 2), (2, 1), (2, 3), (4, 2), (5, 1), (6, 2), (0, 0), (5, 0), (2**32 - 2, 2), (2**31, 0)]
)
@pytest.mark.parametrize("kind", [PayloadReader, BodyReader])
def test_a_slice_off_the_grid_is_refused_before_it_is_there(
    kind: type[PayloadReader], start: int, entries: int
) -> None:
    cache = made_up(entries=5)
    reader = kind(expectation_for(cache))
    reader.feed(in_pieces(cache, "q4")[0])
    with pytest.raises(PayloadRejected, match="not where one may stand") as caught:
        reader.feed(b"S" + struct.pack("<III", 100, start, entries))
    assert caught.value.field == "slice"


@settings(max_examples=200)
@given(names, st.permutations(range(3)), st.data())
def test_a_truncated_payload_in_any_order_is_never_taken_for_a_whole_one(
    name: str, order: list[int], data: st.DataObject
) -> None:
    cache = made_up(entries=5)
    whole = b"".join(ordered(cache, name, order))
    with pytest.raises(PayloadRejected):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))], expectation_for(cache))


def test_the_trailer_vouches_for_the_order_too() -> None:
    cache = made_up(entries=5)
    first, one, two, three, trailer = in_pieces(cache, "q4")
    with pytest.raises(PayloadRejected, match="its digest does not match"):
        decode(b"".join([first, two, one, three, trailer]), expectation_for(cache))


def test_what_was_passed_is_checked_but_not_decoded() -> None:
    cache = made_up(entries=5)
    first, one, two, three, trailer = in_pieces(cache, "q4")
    reader = PayloadReader(expectation_for(cache))
    reader.feed(first)
    reader.passed = 3
    reader.feed(one + two)
    assert [start for start, _ in reader.take()] == [2]
    broken = bytearray(three)
    broken[-1] ^= 1
    reader.passed = 5
    with pytest.raises(PayloadRejected, match="corrupt"):
        reader.feed(bytes(broken))
    whole = PayloadReader(expectation_for(cache))
    whole.passed = 5
    whole.feed(b"".join([first, one, two, three, trailer]))
    assert whole.complete
    assert whole.take() == []


def test_all_ids_travel_whatever_is_sent_as_cache() -> None:
    cache = made_up(entries=5)
    for own in range(6):
        header, _ = decode(b"".join(in_pieces(cache, "q4", own=own)), expectation_for(cache))
        assert (header.ids(), header.own_tokens, header.tokens) == (list(range(5)), own, 5)


def test_a_record_with_a_place_but_no_digest_is_waited_for() -> None:
    cache = made_up(entries=5)
    pieces = in_pieces(cache, "q4")
    body = pieces[1][5:-16]
    reader = PayloadReader(expectation_for(cache))
    reader.feed(pieces[0] + b"S" + struct.pack("<I", len(body)) + body)
    assert reader.take() == []
    reader.feed(hashlib.blake2b(body, digest_size=16).digest())
    assert [start for start, _ in reader.take()] == [0]
