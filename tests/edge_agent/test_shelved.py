"""A cache at rest gives back what its rung makes of it, and payloads that those of floats would equal."""

from __future__ import annotations

import hashlib
import itertools
import struct
import tracemalloc
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import PayloadRejected, RecipeInvalid
from edge_agent.kv.payload import decode_slice, encode, pieces
from edge_agent.kv.reader import decode
from edge_agent.kv.recipe import recipe
from edge_agent.kv.shelved import (
    Shelved,
    as_payload,
    bodies_for,
    from_payload,
    nests,
    refined,
    refinement,
    shelve,
    taken_down,
    tightened,
)
from tests.edge_agent.caches import equal, expectation_for, header_for, made_up, shapes, transform_for

names = st.sampled_from(["float32", "fp16", "q8", "q4", "klt0", "klt3", "klt8"])


def shelved(shape: dict[str, int], name: str, slice_tokens: int = 3) -> Shelved:
    cache = made_up(**shape)
    return shelve(header_for(cache, recipe(name), slice_tokens=slice_tokens), cache, transform_for(cache))


@given(shapes, names, st.integers(1, 7))
def test_what_is_taken_down_is_what_a_payload_brings(shape: dict[str, int], name: str, slice_tokens: int) -> None:
    cache = made_up(**shape)
    header = header_for(cache, recipe(name), slice_tokens=slice_tokens)
    sent = b"".join(encode(header, cache, transform_for(cache)))
    kept = shelve(header, cache, transform_for(cache))
    back = decode(sent, expectation_for(cache))[1]
    assert back is not None
    assert equal(taken_down(kept, transform_for(cache)), back)
    assert as_payload(kept) == sent
    again = from_payload(sent, expectation_for(cache))
    assert (again.header, again.bodies, again.rung) == (header, kept.bodies, name)
    assert again.nbytes == sum(map(len, kept.bodies)) < len(sent)


@given(shapes, st.integers(0, 15), st.integers(0, 7), st.integers(1, 5))
def test_tightened_it_is_as_if_coded_at_once(shape: dict[str, int], level: int, steps: int, slice_tokens: int) -> None:
    to = min(15 - (15 - level) % 2, level + 2 * steps)
    cache = made_up(**shape)
    transform = transform_for(cache)
    kept = shelved(shape, f"klt{level}", slice_tokens)
    direct = shelved(shape, f"klt{to}", slice_tokens)
    found = tightened(kept, recipe(f"klt{to}"), transform)
    assert (found.header, found.bodies) == (direct.header, direct.bodies)


@given(shapes, st.sampled_from([(0, 0), (0, 4), (3, 9), (5, 5)]), st.integers(1, 7), st.integers(1, 7), st.data())
def test_any_part_of_it_is_sent_as_floats_would_be(
    shape: dict[str, int], levels: tuple[int, int], own_slices: int, slices: int, data: st.DataObject
) -> None:
    cache = made_up(**shape)
    transform = transform_for(cache)
    own = data.draw(st.integers(0, shape["entries"] - 1))
    header = header_for(cache, recipe(f"klt{levels[1]}"), own=own, slice_tokens=slices)
    kept = shelved(shape, f"klt{levels[0]}", own_slices)
    sent = b"".join(pieces(header, bodies_for(header, kept, transform)))
    assert sent == b"".join(encode(header, cache, transform))


def test_only_what_nests_follows() -> None:
    known = ["float32", "fp16", "q8", "klt0", "klt1", "klt2", "klt5", "klt2-e50", "klt4-h50"]
    found = {(a, b) for a, b in itertools.product(known, known) if nests(recipe(a), recipe(b))}
    assert found == {
        ("klt0", "klt0"), ("klt1", "klt1"), ("klt2", "klt2"), ("klt5", "klt5"), ("klt0", "klt2"), ("klt1", "klt5"),
    }  # fmt: skip
    kept = shelved({"entries": 4}, "klt3")
    transform = transform_for(made_up(entries=4))
    for name in ("klt4", "klt1", "fp16"):
        with pytest.raises(RecipeInvalid, match=f"{name} does not follow from klt3"):
            tightened(kept, recipe(name), transform)


@given(shapes, st.sampled_from([(0, 2), (0, 8), (3, 5), (1, 15)]), st.integers(1, 5))
def test_a_second_part_brings_it_to_the_finer_rung(
    shape: dict[str, int], levels: tuple[int, int], slice_tokens: int
) -> None:
    cache = made_up(**shape)
    transform = transform_for(cache)
    fine, coarse = (shelved(shape, f"klt{level}", slice_tokens) for level in levels)
    more = b"".join(refinement(fine, recipe(coarse.rung), transform))
    found = refined(coarse, more, expectation_for(cache))
    assert (found.header, found.bodies) == (fine.header, fine.bodies)
    for wrong in (tightened(fine, recipe(f"klt{levels[0]}"), transform), shelved({**shape, "seed": 1 << 20}, "klt1")):
        if wrong.header.level != levels[1]:
            with pytest.raises(PayloadRejected, match="refines"):
                refined(wrong, more, expectation_for(cache))
    with pytest.raises(PayloadRejected, match="refines"):
        decode(more, expectation_for(cache))
    with pytest.raises(PayloadRejected, match="refines"):
        from_payload(more, expectation_for(cache))


def test_a_second_part_of_another_context_is_refused() -> None:
    cache = made_up()
    fine = shelved({}, "klt1")
    more = b"".join(refinement(fine, recipe("klt3"), transform_for(cache)))
    coarse = shelved({}, "klt3")
    other = replace(coarse, header=msgspec.structs.replace(coarse.header, context_id="e" * 32))
    with pytest.raises(PayloadRejected, match="another cache"):
        refined(other, more, expectation_for(cache))
    for name in ("klt1", "klt2", "klt0", "fp16"):
        with pytest.raises(RecipeInvalid, match="does not refine"):
            refinement(fine, recipe(name), transform_for(cache))


@given(shapes, st.data())
def test_a_second_part_with_a_lie_is_refused_or_a_valid_cache(shape: dict[str, int], data: st.DataObject) -> None:
    cache = made_up(**shape)
    transform = transform_for(cache)
    fine, coarse = shelved(shape, "klt0", 50), shelved(shape, "klt4", 50)
    header, piece, trailer = refinement(fine, recipe("klt4"), transform)
    body = bytearray(piece[5:-16])
    at = data.draw(st.integers(8, len(body)))
    lie = bytes(body[:at]) + data.draw(st.binary(max_size=20))
    forged = b"S" + struct.pack("<I", len(lie)) + lie + hashlib.blake2b(lie, digest_size=16).digest()
    whole = header + forged + trailer[:5]
    whole += hashlib.blake2b(whole, digest_size=32).digest()
    try:
        found = refined(coarse, whole, expectation_for(cache))
    except PayloadRejected:
        return
    taken_down(found, transform).check()


@given(shapes, names, st.data())
def test_any_flipped_bit_of_it_is_refused(shape: dict[str, int], name: str, data: st.DataObject) -> None:
    whole = bytearray(as_payload(shelved(shape, name)))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(PayloadRejected):
        from_payload(bytes(whole), expectation_for(made_up(**shape)))


@given(shapes, names, st.data())
def test_cut_short_it_is_refused(shape: dict[str, int], name: str, data: st.DataObject) -> None:
    whole = as_payload(shelved(shape, name))
    with pytest.raises(PayloadRejected):
        from_payload(whole[: data.draw(st.integers(0, len(whole) - 1))], expectation_for(made_up(**shape)))


def test_a_part_of_a_context_is_not_put_away() -> None:
    cache = made_up()
    sent = b"".join(encode(header_for(cache, recipe("fp16"), own=2), cache))
    with pytest.raises(PayloadRejected, match="no whole cache"):
        from_payload(sent, expectation_for(cache))


def test_another_transforms_or_models_cache_is_refused() -> None:
    cache = made_up()
    kept = shelved({}, "klt3")
    with pytest.raises(PayloadRejected, match="transform"):
        from_payload(as_payload(kept), expectation_for(cache, transform=None))
    other = replace(kept, header=msgspec.structs.replace(kept.header, fingerprint="e" * 32))
    with pytest.raises(PayloadRejected):
        from_payload(as_payload(other), expectation_for(cache))


@pytest.mark.parametrize("name", ["klt0", "klt4", "klt8", "q4", "fp16"])
def test_coding_takes_at_most_twice_the_cache_beside_it_and_what_it_gives(name: str) -> None:
    cache = made_up(layers=6, heads=3, entries=512, dim=64)
    transform = transform_for(cache)
    header = header_for(cache, recipe(name))
    limit = 2 * cache.nbytes
    taken_down(shelve(header, cache, transform), transform)  # what is made once is made
    tracemalloc.start()
    try:
        kept = shelve(header, cache, transform)
        encoding = tracemalloc.get_traced_memory()[1] - kept.nbytes
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        parts = [decode_slice(header, header.positions(), body, transform) for body in kept.bodies]
        decoding = tracemalloc.get_traced_memory()[1] - before - sum(part.nbytes for part in parts)
    finally:
        tracemalloc.stop()
    assert encoding < limit, f"encoding: {encoding / cache.nbytes:.2f} of the cache"
    assert decoding < limit, f"decoding: {decoding / cache.nbytes:.2f} of the cache"
