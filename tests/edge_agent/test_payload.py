"""A payload carries a cache whole, and whatever is wrong with it is refused by name before anything is allocated."""

from __future__ import annotations

import hashlib
import struct
import zlib

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.errors import CacheInvalid, PayloadRejected, RecipeInvalid, WrongModel
from edge_agent.facts import Fact
from edge_agent.kv.cache import Cache, Layer, concatenate
from edge_agent.kv.header import FORMAT_VERSION, MAGIC
from edge_agent.kv.payload import encode
from edge_agent.kv.reader import PayloadReader, decode
from edge_agent.kv.recipe import recipe
from tests.edge_agent.caches import (
    attended,
    equal,
    evicted_for,
    expectation_for,
    header_for,
    made_up,
    shapes,
    transform_for,
)

sized = st.sampled_from(["float32", "fp16", "q1", "q3", "q4", "q5", "q6", "q8"])
names = sized | st.sampled_from(["klt0", "klt5", "klt8", "klt15"])


def payload(cache: Cache, name: str = "q8", *, own: int = 0, slice_tokens: int | None = None) -> bytes:
    header = header_for(cache, recipe(name), own=own, slice_tokens=slice_tokens)
    return b"".join(encode(header, cache, transform_for(cache)))


@given(shapes, st.integers(1, 7), st.data())
def test_the_lossless_rung_brings_the_very_cache(shape: dict[str, int], slice_tokens: int, data: st.DataObject) -> None:
    cache = made_up(**shape)
    own = data.draw(st.integers(0, shape["entries"]))
    header, back = decode(payload(cache, "float32", own=own, slice_tokens=slice_tokens), expectation_for(cache))
    assert (header.ids(), header.own_tokens) == (list(range(shape["entries"])), own)
    if own == shape["entries"]:
        assert back is None
    else:
        assert back is not None
        assert equal(back, cache.between(own, shape["entries"]))


@given(shapes, sized, st.integers(1, 7))
def test_the_size_is_known_before_anything_is_coded(shape: dict[str, int], name: str, slice_tokens: int) -> None:
    cache = made_up(**shape)
    rung = recipe(name)
    header = header_for(cache, rung, slice_tokens=slice_tokens)
    assert header.payload_bytes() == len(b"".join(encode(header, cache)))


@given(shapes, names, st.data())
def test_it_can_be_read_in_any_pieces(shape: dict[str, int], name: str, data: st.DataObject) -> None:
    cache = made_up(**shape)
    whole = payload(cache, name, slice_tokens=3)
    reader, at = PayloadReader(expectation_for(cache)), 0
    while at < len(whole):
        step = data.draw(st.integers(1, max(1, len(whole) // 3)))
        reader.feed(whole[at : at + step])
        at += step
    again = decode(whole, expectation_for(cache))[1]
    got = reader.finish()
    assert got is not None
    assert again is not None
    assert equal(got, again)


@given(shapes, st.integers(1, 8))
def test_quantized_entries_are_within_half_a_step(shape: dict[str, int], bits: int) -> None:
    cache = made_up(**shape)
    back = decode(payload(cache, f"q{bits}"), expectation_for(cache))[1]
    assert back is not None
    for old, new in zip(cache.layers, back.layers, strict=True):
        for x, y in ((old.keys, new.keys), (old.values, new.values)):
            assert np.abs(x - y).max() <= (x.max() - x.min()) / (2**bits - 1) / 2 * 1.0001 + 1e-6


@given(shapes, st.integers(0, 15), st.integers(1, 7))
def test_a_transformed_cache_comes_back_as_its_symbols(shape: dict[str, int], level: int, slice_tokens: int) -> None:
    cache = made_up(**shape)
    transform = transform_for(cache)
    header, back = decode(payload(cache, f"klt{level}", slice_tokens=slice_tokens), expectation_for(cache))
    assert (header.transform, header.level, header.payload_bytes()) == (transform.id, level, None)
    assert back is not None
    for index, (old, new) in enumerate(zip(cache.layers, back.layers, strict=True)):
        expected = transform.entries(index, transform.symbols(index, old, level), level, shape["heads"])
        np.testing.assert_allclose(new.keys, expected[0], atol=1e-4)
        np.testing.assert_allclose(new.values, expected[1], atol=1e-4)
        assert np.array_equal(new.positions, old.positions)


@given(shapes, st.sampled_from(["e30", "h30", "e5-b4", "h70-b2"]), names | st.just("float32"), st.data())
def test_evicted_entries_arrive_where_they_stood(
    shape: dict[str, int], less: str, name: str, data: st.DataObject
) -> None:
    cache = attended(made_up(**shape))
    own = data.draw(st.integers(0, shape["entries"] - 1))
    header, sent = evicted_for(cache, recipe(f"{name}-{less}"), own=own, slice_tokens=data.draw(st.integers(1, 7)))
    data_bytes = b"".join(encode(header, sent, transform_for(cache)))
    assert header.payload_bytes() in {None, len(data_bytes)}
    back = decode(data_bytes, expectation_for(cache))[1]
    assert back is not None
    for old, new in zip(sent.layers, back.layers, strict=True):
        assert np.array_equal(old.positions, new.positions)
        assert old.keys.shape == new.keys.shape
    assert header.kept is not None
    assert header.kept.by_head == (less[0] == "h")
    if name == "float32":
        assert equal(sent, back)


def evicted_payload(**changes: object) -> bytes:
    cache = attended(made_up(entries=12))
    header, sent = evicted_for(cache, recipe("fp16-h50"))
    _, *others = encode(header, sent)
    assert header.kept is not None
    lie = msgspec.structs.replace(header, kept=msgspec.structs.replace(header.kept, **changes))
    packed: bytes = msgpack.packb(msgspec.to_builtins(lie, builtin_types=(bytes,)), use_bin_type=True)
    digest = hashlib.blake2b(packed, digest_size=16).digest()
    return MAGIC + struct.pack("<I", len(packed)) + packed + digest + b"".join(others)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"entries": 7}, "not 7 entries of every layer"),
        ({"entries": 13}, "13 entries of 12"),
        ({"by_head": False}, "is not the mask of 24 entries"),
        ({"mask": b"no deflate"}, "incorrect header check"),
        ({"mask": zlib.compress(bytes(6))[:-1]}, "is not the mask of 48 entries"),
        ({"mask": zlib.compress(bytes(6)) + b"!"}, "is not the mask of 48 entries"),
        ({"mask": zlib.compress(bytes(1 << 20))}, "is not the mask of 48 entries"),
        ({"mask": zlib.compress(bytes(6))}, "not 8 entries of every layer"),
    ],
)
def test_a_mask_that_does_not_add_up_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(PayloadRejected, match=reason):
        decode(evicted_payload(**changes), expectation_for(made_up(entries=12)))


def test_a_cache_without_the_announced_entries_is_not_sent() -> None:
    cache = attended(made_up(entries=12))
    header, sent = evicted_for(cache, recipe("fp16-e50"))
    other = attended(made_up(entries=12), seed=1)
    with pytest.raises(CacheInvalid, match="layer 0 has not the 8 entries"):
        b"".join(encode(header, recipe("fp16-e50").reduced(other)))
    with pytest.raises(CacheInvalid, match="layer 0"):
        b"".join(encode(header, cache))
    assert decode(b"".join(encode(header, sent)), expectation_for(cache))[1] is not None


def test_without_the_transform_nothing_is_coded() -> None:
    cache = made_up()
    other = transform_for(cache, seed=1)
    for transform in (None, other):
        with pytest.raises(RecipeInvalid, match="klt3 needs the transform"):
            b"".join(encode(header_for(cache, recipe("klt3")), cache, transform))
    with pytest.raises(PayloadRejected, match=f"is not known here .known: {other.id}"):
        decode(payload(cache, "klt3"), expectation_for(cache, transform=other))


@settings(max_examples=400)
@given(st.integers(0, 15), st.data())
def test_a_slice_with_a_digest_of_its_own_lie_is_a_cache_or_refused(level: int, data: st.DataObject) -> None:
    cache = made_up()
    header = header_for(cache, recipe(f"klt{level}"))
    pieces = list(encode(header, cache, transform_for(cache)))
    body = bytearray(pieces[1][5:-16])
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(8, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    lie = bytes(body[: data.draw(st.integers(8, len(body)))])
    lie_piece = b"S" + struct.pack("<I", len(lie)) + lie + hashlib.blake2b(lie, digest_size=16).digest()
    reader = PayloadReader(expectation_for(cache))
    reader.feed(pieces[0])
    try:
        reader.feed(lie_piece)
    except PayloadRejected:
        return
    reader.slices[0].check()


@settings(max_examples=300)
@given(names, st.data())
def test_a_truncated_payload_is_never_taken_for_a_whole_one(name: str, data: st.DataObject) -> None:
    cache = made_up()
    whole = payload(cache, name, slice_tokens=2)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(PayloadRejected):
        decode(whole[:cut], expectation_for(cache))


@settings(max_examples=500)
@given(names, st.data())
def test_a_flipped_bit_is_refused(name: str, data: st.DataObject) -> None:
    cache = made_up()
    whole = bytearray(payload(cache, name, slice_tokens=2))
    position = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[position // 8] ^= 1 << position % 8
    with pytest.raises(PayloadRejected):
        decode(bytes(whole), expectation_for(cache))


@settings(max_examples=200)
@given(st.binary(max_size=400))
def test_noise_is_refused_without_a_crash(noise: bytes) -> None:
    for data in (noise, MAGIC + noise, MAGIC + struct.pack("<I", len(noise)) + noise):
        with pytest.raises(PayloadRejected):
            decode(data, expectation_for(made_up()))


def test_bytes_after_the_trailer_are_refused() -> None:
    cache = made_up()
    with pytest.raises(PayloadRejected, match="follow it"):
        decode(payload(cache) + b"x", expectation_for(cache))


def test_another_models_cache_is_refused_by_name() -> None:
    cache = made_up()
    with pytest.raises(WrongModel, match="fingerprint"):
        decode(payload(cache), expectation_for(cache, fingerprint="9" * 32))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("tokenizer", {"tokenizer": "9" * 32}),
        ("prefix", {"prefix": "9" * 32}),
        ("shape", {"layers": 5}),
        ("tokens", {"window_tokens": 3}),
        ("size", {"limit_bytes": 100}),
        ("token_ids", {"vocabulary": 1}),
    ],
)
def test_what_does_not_fit_the_receiver_is_refused_by_field(field: str, change: dict[str, object]) -> None:
    cache = made_up()
    with pytest.raises(PayloadRejected) as caught:
        decode(payload(cache, own=2), expectation_for(cache, **change))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("format_version", {"format_version": FORMAT_VERSION + 1}),
        ("header", {"widths": [9]}),
        ("widths", {"widths": [8]}),
        ("widths", {"codec": "fp16"}),
        ("header", {"facts": [["keyword", "a", 2.0, 0, 1]]}),
        ("facts", {"facts": [["keyword", "a\nQuestion: b", 1.0, 0, 1]]}),
        ("header", {"facts": [["spell", "a", 1.0, 0, 1]]}),
        ("header", {"codec": "pickle"}),
        ("header", {"transform": "klt-1"}),
        ("transform", {"transform": "9" * 32}),
        ("transform", {"level": 4}),
        ("transform", {"codec": "klt", "widths": [], "level": 4}),
        ("transform", {"codec": "klt", "widths": [], "transform": "9" * 32}),
        ("header", {"codec": "klt", "widths": [], "level": 16}),
        ("header", {"tokens": -1}),
        ("token_ids", {"token_ids": b"abc"}),
        ("token_ids", {"token_ids": b"ab" * 40}),
        ("token_ids", {"tokens": 4}),
        ("token_ids", {"id_bytes": 4}),
        ("own_tokens", {"own_tokens": 6}),
        ("header", {"own_tokens": -1}),
        ("header", {"shape": {"layers": 2**40, "kv_heads": 2, "head_dim": 4, "sent_layers": []}}),
        ("sent_layers", {"shape": {"layers": 2, "kv_heads": 2, "head_dim": 4, "sent_layers": [1, 0]}}),
    ],
)
def test_a_header_that_lies_is_refused_by_field(field: str, change: dict[str, object]) -> None:
    cache = made_up()
    fields = msgspec.to_builtins(header_for(cache, recipe("q8")), builtin_types=(bytes,)) | change
    packed = msgpack.packb(fields)
    reader = PayloadReader(expectation_for(cache))
    with pytest.raises(PayloadRejected) as caught:
        reader.feed(MAGIC + struct.pack("<I", len(packed)) + packed + hashlib.blake2b(packed, digest_size=16).digest())
    assert caught.value.field == field


def test_a_declared_size_is_refused_before_it_is_there() -> None:
    reader = PayloadReader(expectation_for(made_up()))
    with pytest.raises(PayloadRejected, match="above the limit"):
        reader.feed(MAGIC + struct.pack("<I", 2**31))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["float32", "fp16", "q4", "klt4"])
def test_a_nan_in_a_cache_is_not_sent(poison: float, name: str) -> None:
    cache = made_up()
    cache.layers[1].values[0, 0, 0] = poison
    with pytest.raises(CacheInvalid, match="NaN or an infinity"):
        payload(cache, name)


def test_what_fp16_cannot_hold_is_not_sent_as_fp16() -> None:
    with pytest.raises(CacheInvalid, match="fp16"):
        payload(made_up(scale=1e6), "fp16")


def test_a_cache_with_missing_entries_is_not_sent() -> None:
    cache = made_up(entries=5)
    short = Cache((cache.layers[0], cache.layers[1].between(0, 3)))
    with pytest.raises(CacheInvalid, match="layer 1 has"):
        payload(short)


def test_a_layer_that_is_not_sent_has_no_entries_at_the_receiver() -> None:
    cache, rung = made_up(layers=3), recipe("float32")
    header = header_for(cache, rung)
    header = msgspec.structs.replace(header, shape=msgspec.structs.replace(header.shape, sent_layers=(0, 2)))
    back = decode(b"".join(encode(header, cache)), expectation_for(cache))[1]
    assert back is not None
    assert [layer.entries for layer in back.layers] == [5, 0, 5]
    assert equal(Cache((back.layers[0], back.layers[2])), Cache((cache.layers[0], cache.layers[2])))
    assert isinstance(back.layers[1], Layer)


@pytest.mark.parametrize("name", ["q0", "q9", "q99", "fp8", "Q4", ""])
def test_an_unknown_rung_is_refused(name: str) -> None:
    with pytest.raises(RecipeInvalid):
        recipe(name)


@given(shapes, st.data(), st.integers(1, 7))
def test_any_layers_at_any_widths_come_back_as_each_would_alone(
    shape: dict[str, int], data: st.DataObject, slice_tokens: int
) -> None:
    cache = made_up(**shape)
    sent = data.draw(st.sets(st.integers(0, shape["layers"] - 1)).map(sorted))
    widths = data.draw(st.tuples(*[st.integers(1, 8)] * len(sent)))
    uniform = header_for(cache, recipe("q8"), slice_tokens=slice_tokens)
    header = msgspec.structs.replace(
        uniform, shape=msgspec.structs.replace(uniform.shape, sent_layers=tuple(sent)), widths=widths
    )
    whole = b"".join(encode(header, cache))
    assert len(whole) == header.payload_bytes()
    back = decode(whole, expectation_for(cache))[1]
    assert back is not None
    for index, layer in enumerate(back.layers):
        if index not in sent:
            assert not layer.entries
            continue
        alone = decode(
            payload(cache, f"q{widths[sent.index(index)]}", slice_tokens=slice_tokens), expectation_for(cache)
        )
        assert alone[1] is not None
        assert np.array_equal(layer.keys, alone[1].layers[index].keys)
        assert np.array_equal(layer.values, alone[1].layers[index].values)


def test_facts_travel_in_the_header() -> None:
    cache = made_up()
    facts = (Fact(type="quantity", content="214 metres", confidence=0.8, start=4, end=14, detail="metres"),)
    header = msgspec.structs.replace(header_for(cache, recipe("q4")), facts=facts)
    whole = b"".join(encode(header, cache))
    assert len(whole) == header.payload_bytes()
    assert decode(whole, expectation_for(cache))[0].facts == facts


def test_the_attention_of_a_cache_is_kept_with_its_parts_and_is_not_sent() -> None:
    cache = made_up(entries=6)
    mass = np.arange(12, dtype=np.float32).reshape(2, 6)
    kept = Cache(tuple(Layer(each.keys, each.values, each.positions, mass) for each in cache.layers))
    joined = concatenate([kept.between(0, 2), kept.between(2, 6)])
    assert all(each.mass is not None and np.array_equal(each.mass, mass) for each in joined.layers)
    assert concatenate([kept.between(0, 2), cache.between(2, 6)]).layers[0].mass is None
    assert payload(kept) == payload(cache)
    assert kept.nbytes == cache.nbytes + len(cache.layers) * mass.nbytes
