"""The session: chunks, forks and moved caches change nothing beyond rounding, and what doesn't fit is refused by name.

Caches with entries missing are compared with transformers in test_gaps.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.errors import CacheInvalid, ContextEmpty, ContextTooLong, ModelFailed, ModelUnsupported
from edge_agent.kv.cache import Cache, Float32, Layer, concatenate
from edge_agent.kv.payload import encode
from edge_agent.kv.reader import decode
from edge_agent.kv.recipe import recipe
from edge_agent.model.exchange import expectation, to_send
from edge_agent.model.session import LiveContext
from tests import tiny
from tests.edge_agent.caches import equal, without
from tests.edge_agent.sessions import CLOSE, TOLERANCE, far, model, read

QUESTION = [40, 41, 42, 43]

token_ids = st.lists(st.integers(1, tiny.VOCABULARY - 1), min_size=1, max_size=60)
every_precision = pytest.mark.parametrize("weights", TOLERANCE)
every_model = pytest.mark.parametrize(
    ("family", "weights"), [(family, weights) for family in ("llama", "gemma") for weights in TOLERANCE]
)


@every_model
@given(ids=token_ids, chunk=st.integers(1, 20))
@settings(max_examples=15)
def test_a_chunked_prefill_equals_one_piece(family: str, weights: str, ids: list[int], chunk: int) -> None:
    sizes = (chunk, 4_096)
    pieces, whole = (model(size, family=family, weights=weights).new_context() for size in sizes)
    calls: list[int] = []
    rows = pieces.prefill(ids, all_logits=True, on_chunk=calls.append)
    assert far(rows, whole.prefill(ids, all_logits=True)) < TOLERANCE[weights]
    assert rows.shape == (len(ids), tiny.VOCABULARY)
    assert calls == [*range(chunk, len(ids), chunk), len(ids)]
    assert far(pieces.prefill(QUESTION), whole.prefill(QUESTION)) < TOLERANCE[weights]
    assert pieces.entries == pieces.next_position == len(ids) + len(QUESTION)


@every_precision
def test_the_last_row_of_all_logits_is_what_a_prefill_returns(weights: str) -> None:
    ids = list(range(1, 30))
    rows = model(8, weights=weights).new_context().prefill(ids, all_logits=True)
    assert far(rows[-1], model(8, weights=weights).new_context().prefill(ids)) < TOLERANCE[weights]


def test_a_fork_goes_its_own_way() -> None:
    trunk = read([5, 6, 7])
    before = trunk.extract(0, 3)
    one, other = trunk.fork(), trunk.fork()
    one.prefill([8, 9])
    first = other.prefill([8, 9, 10])
    assert (trunk.entries, one.entries, other.entries) == (3, 5, 6)
    assert equal(trunk.extract(0, 3), before)
    assert far(one.prefill([10]), first) < CLOSE
    assert far(trunk.prefill([8, 9, 10]), first) < CLOSE


@every_model
@given(kept=token_ids, gone=token_ids)
@settings(max_examples=10)
def test_what_is_read_after_a_rewind_is_as_if_nothing_had_been_read_between(
    family: str, weights: str, kept: list[int], gone: list[int]
) -> None:
    straight, back = (model(family=family, weights=weights).new_context() for _ in range(2))
    for live in (straight, back):
        live.prefill(kept)
    back.prefill(gone, queries=True)
    back.rewind(len(kept))
    assert (back.entries, back.next_position) == (len(kept), len(kept))
    assert np.array_equal(back.prefill(QUESTION, queries=True), straight.prefill(QUESTION, queries=True))
    assert equal(back.extract(0, back.next_position), straight.extract(0, straight.next_position))
    for one, other in zip(back.attention_mass(), straight.attention_mass(), strict=True):
        assert np.array_equal(one, other)


def test_a_rewind_into_a_run_keeps_the_keys_before_it_and_forgets_the_queries() -> None:
    live = read([5, 6, 7, 8])
    before = live.extract(0, 2)
    live.prefill([9, 10], queries=True)
    live.rewind(2)
    assert equal(live.extract(0, 2), before)
    with pytest.raises(ModelUnsupported, match="no queries"):
        live.attention_mass()


def test_queries_before_a_rewind_stay() -> None:
    straight, back = (model().new_context() for _ in range(2))
    for live in (straight, back):
        live.prefill([5, 6, 7, 8], queries=True)
    back.prefill([9, 10], queries=True)
    back.rewind(4)
    for one, other in zip(back.attention_mass(), straight.attention_mass(), strict=True):
        assert np.array_equal(one, other)


def test_a_rewind_behind_a_cache_that_misses_layers_leaves_the_others() -> None:
    whole = read([5, 6, 7, 8]).extract(0, 4)
    live = read([3, 4])
    live.append(without(whole, [[], [0, 1, 2, 3], [1]]), tokens=4)
    live.prefill([9])
    live.rewind(5)
    assert [layer.entries for layer in live.extract(0, 5).layers] == [5, 2, 4]


@pytest.mark.parametrize("position", [-1, 5])
def test_only_what_was_read_can_be_gone_back_to(position: int) -> None:
    live = read([5, 6, 7, 8])
    with pytest.raises(ModelUnsupported, match="can't be gone back to"):
        live.rewind(position)
    assert live.next_position == 4


@every_model
@given(prefix=token_ids, context=token_ids)
@settings(max_examples=10)
def test_what_is_extracted_and_appended_at_its_place_goes_on_like_the_live_context_bit_for_bit(
    family: str, weights: str, prefix: list[int], context: list[int]
) -> None:
    live = read(prefix, family=family, weights=weights)
    again = live.fork()
    live.prefill(context)
    taken = live.extract(len(prefix), live.next_position)
    assert [layer.positions.tolist() for layer in taken.layers] == [list(range(len(context)))] * tiny.LAYERS
    again.append(taken)
    assert again.entries == again.next_position == len(prefix) + len(context)
    assert np.array_equal(again.prefill(QUESTION), live.prefill(QUESTION))


@every_model
@given(seed=st.integers(0, 2**16))
@settings(max_examples=5)
def test_a_relay_on_the_lossless_rung_gives_the_very_tokens_of_text_prefill(
    family: str, weights: str, seed: int
) -> None:
    ids = np.random.default_rng(seed).integers(1, tiny.VOCABULARY, 48).tolist()
    sender = read(ids[:8], family=family, weights=weights)
    receiver = sender.fork()
    sender.prefill(ids[8:])
    manifest, rung = model(family=family, weights=weights).manifest, recipe("float32")
    sent = to_send(manifest, "0" * 32, ids[8:], sender.extract(8, sender.next_position), own_tokens=0, rung=rung)
    received = decode(b"".join(encode(*sent)), expectation(manifest, 1 << 30))[1]
    assert received is not None
    receiver.append(received)
    assert _answer(receiver) == _answer(sender)


def _answer(live: LiveContext) -> list[int]:
    logits, tokens = live.prefill(QUESTION), list[int]()
    while len(tokens) < 12:
        tokens.append(int(np.argmax(logits)))
        logits = live.step(np.array(tokens[-1:], dtype=np.int32), logits="last")
    return tokens


@given(token_ids)
@settings(max_examples=15)
def test_keys_that_were_not_kept_are_extracted_within_rounding(ids: list[int]) -> None:
    live = model().new_context()
    live.step(np.array(ids, dtype=np.int32), logits=None)
    kept = read(ids).extract(0, len(ids))
    for one, other in zip(live.extract(0, len(ids)).layers, kept.layers, strict=True):
        assert far(one.keys, other.keys) < CLOSE / 10
        assert np.array_equal(one.values, other.values)


@given(token_ids, st.data())
@settings(max_examples=15)
def test_what_runs_kept_is_extracted_across_their_borders(ids: list[int], data: st.DataObject) -> None:
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(ids))] * 2)))
    live = model(data.draw(st.integers(2, 20))).new_context()
    live.prefill(ids)
    whole = live.extract(0, len(ids)).between(start, stop)
    part = live.extract(start, stop)
    for one, other in zip(part.layers, whole.layers, strict=True):
        assert np.array_equal(one.keys, other.keys)
        assert np.array_equal(one.values, other.values)
        assert np.array_equal(one.positions + start, other.positions)


@every_precision
@given(ids=token_ids, data=st.data())
@settings(max_examples=10)
def test_a_split_cache_equals_the_whole(weights: str, ids: list[int], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=3)))
    live = read(ids, weights=weights)
    whole = live.extract(0, len(ids))
    parts = [whole.between(a, b) for a, b in itertools.pairwise([0, *cuts, len(ids)])]
    assert equal(concatenate(parts), whole)
    again = model(weights=weights).new_context()
    again.append(concatenate(parts))
    assert np.array_equal(again.prefill(QUESTION), live.prefill(QUESTION))


@every_precision
@given(ids=token_ids, data=st.data())
@settings(max_examples=10)
def test_own_tokens_prefilled_and_a_received_rest_equal_the_whole(
    weights: str, ids: list[int], data: st.DataObject
) -> None:
    own = data.draw(st.integers(1, len(ids)))
    live = read(ids, weights=weights)
    whole = live.extract(0, len(ids))
    first = read(ids[:own], weights=weights).extract(0, own)
    again = model(weights=weights).new_context()
    again.append(concatenate([first, whole.between(own, len(ids))]))
    assert far(again.prefill(QUESTION), live.prefill(QUESTION)) < TOLERANCE[weights]


@given(st.integers(0, 900), st.integers(0, 2**16))
@settings(max_examples=20)
def test_a_cache_taken_out_where_it_landed_is_the_one_that_was_put_in(start: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = read(rng.integers(1, tiny.VOCABULARY, 12).tolist()).extract(0, 12)
    taken = without(whole, [np.flatnonzero(rng.random(12) < 0.3).tolist() for _ in range(tiny.LAYERS)])
    live = model().new_context()
    if start:
        live.append(Cache(tuple(_nothing(start) for _ in range(tiny.LAYERS))))
    live.append(taken, tokens=12)
    assert live.next_position == start + 12
    back = live.extract(start, live.next_position)
    for one, other in zip(taken.layers, back.layers, strict=True):
        assert np.array_equal(one.positions, other.positions)
        assert np.array_equal(one.values, other.values)
        if one.entries:
            assert far(one.keys, other.keys) < CLOSE


def _nothing(entries: int) -> Layer:
    zeros = np.zeros((tiny.KV_HEADS, entries, tiny.HEAD_DIM), dtype=np.float32)
    return Layer(zeros, zeros, np.arange(entries, dtype=np.int32))


def test_a_cache_ends_with_its_last_entry_unless_its_tokens_are_given() -> None:
    taken = without(read([1, 2, 3, 4]).extract(0, 4), [{2, 3}, {0, 3}, {0, 1, 2, 3}])
    guessed, told = read([5]), read([5])
    guessed.append(taken)
    told.append(taken, tokens=9)
    assert (guessed.entries, guessed.next_position) == (3, 4)
    assert (told.entries, told.next_position) == (3, 10)


def _full(room: int) -> LiveContext:
    """A live context with so many positions left."""
    live = model().new_context()
    live.append(Cache(tuple(_nothing(tiny.WINDOW_TOKENS - room) for _ in range(tiny.LAYERS))))
    return live


def test_the_window_can_be_filled_to_its_last_position() -> None:
    live = _full(room=3)
    live.prefill([1, 2, 3])
    assert live.entries == tiny.WINDOW_TOKENS
    with pytest.raises(ContextTooLong, match="1025 tokens do not fit the model's window of 1024") as caught:
        live.prefill([4])
    assert (caught.value.tokens, caught.value.window) == (1_025, 1_024)


@pytest.mark.parametrize(
    "grow",
    [
        pytest.param(lambda live: live.prefill([1] * 200), id="prefill"),  # two chunks: none of them may be read
        pytest.param(lambda live: live.append(read([1] * 151).extract(0, 151)), id="append"),
        pytest.param(lambda live: live.append(read([1] * 3).extract(0, 3), tokens=151), id="append with gaps"),
        pytest.param(lambda live: live.chunks([1] * 151), id="chunks"),
        pytest.param(lambda live: live.step(np.ones(151, dtype=np.int32), logits=None), id="step"),
        pytest.param(lambda live: live.reserve(151), id="reserve"),
    ],
)
def test_an_overflow_is_refused_before_anything_is_changed(grow: Callable[[LiveContext], object]) -> None:
    live = _full(room=150)
    before = live.extract(0, live.next_position)
    with pytest.raises(ContextTooLong):
        grow(live)
    assert live.entries == live.next_position == tiny.WINDOW_TOKENS - 150
    assert equal(live.extract(0, live.next_position), before)


def test_positions_count_toward_the_window_though_their_entries_are_missing() -> None:
    live = model().new_context()
    live.append(Cache(tuple(_nothing(0) for _ in range(tiny.LAYERS))), tokens=tiny.WINDOW_TOKENS - 1)
    live.prefill([1])
    assert (live.entries, live.next_position) == (1, tiny.WINDOW_TOKENS)
    with pytest.raises(ContextTooLong):
        live.prefill([1])


def test_nothing_to_read_is_refused() -> None:
    with pytest.raises(ContextEmpty, match="no tokens to prefill"):
        model().new_context().prefill([])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4)])
def test_positions_that_were_not_reached_cannot_be_extracted(start: int, stop: int) -> None:
    with pytest.raises(ModelUnsupported, match=f"positions {start} to {stop} of 3"):
        read([1, 2, 3]).extract(start, stop)


def _changed_layer(taken: Cache, change: Callable[[Layer], Layer]) -> Cache:
    return Cache((*taken.layers[:-1], change(taken.layers[-1])))


@pytest.mark.parametrize(
    ("change", "tokens", "error", "line"),
    [
        (lambda c: Cache(c.layers[:-1]), None, ModelUnsupported, "a cache of 2 layers does not fit 3"),
        (lambda c: c, 3, ModelUnsupported, "a cache with an entry at position 3 does not fit 3 tokens"),
        (lambda c: c.between(0, 0), -1, ModelUnsupported, "does not fit -1 tokens"),
        (
            lambda c: _changed_layer(c, lambda layer: Layer(layer.keys[:1], layer.values[:1], layer.positions)),
            None,
            ModelUnsupported,
            "layer 2 of a cache has 1 KV heads of 16, the model 2 of 16",
        ),
        (
            lambda c: _changed_layer(
                c, lambda layer: Layer(layer.keys[..., :8], layer.values[..., :8], layer.positions)
            ),
            None,
            ModelUnsupported,
            "layer 2 of a cache has 2 KV heads of 8, the model 2 of 16",
        ),
        (
            lambda c: _changed_layer(c, lambda layer: replace(layer, positions=layer.positions[::-1])),
            None,
            CacheInvalid,
            "layer 2: positions do not rise",
        ),
        (
            lambda c: _changed_layer(c, lambda layer: replace(layer, positions=layer.positions - np.int32(1))),
            None,
            CacheInvalid,
            "layer 2: positions do not rise",
        ),
        (
            lambda c: _changed_layer(c, lambda layer: replace(layer, values=layer.values[:, 1:])),
            None,
            CacheInvalid,
            "layer 2: keys .* and values .* disagree",
        ),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_by_name(
    change: Callable[[Cache], Cache], tokens: int | None, error: type[Exception], line: str
) -> None:
    live = read([1, 2, 3, 4])
    taken = live.extract(0, 4)
    with pytest.raises(error, match=line):
        live.append(change(taken), tokens=tokens)
    assert live.entries == live.next_position == 4
    assert equal(live.extract(0, 4), taken)


def test_a_run_that_fails_is_an_error_of_ours_in_one_line_and_leaves_the_context_as_it_was() -> None:
    live, untouched = read([1, 2, 3]), read([1, 2, 3])
    live.prefill([4], queries=True)
    untouched.prefill([4], queries=True)
    beyond = np.array([5, tiny.VOCABULARY + 5], dtype=np.int32)
    for keeping in (True, False):
        with pytest.raises(ModelFailed, match="the model run failed") as caught:
            live.step(beyond, logits="last", keys=keeping, queries=keeping)
        assert "\n" not in str(caught.value)
    assert live.entries == live.next_position == 4
    assert equal(live.extract(0, 4), untouched.extract(0, 4))
    for one, other in zip(live.attention_mass(), untouched.attention_mass(), strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(live.prefill(QUESTION), untouched.prefill(QUESTION))


@every_model
def test_contexts_of_one_model_do_not_influence_one_another(family: str, weights: str) -> None:
    rng = np.random.default_rng(3)
    texts = [rng.integers(1, tiny.VOCABULARY, (5, 40)).astype(np.int32) for _ in range(2)]
    one_model = model(family=family, weights=weights)
    alone = []
    for text in texts:
        live = one_model.new_context()
        alone.append([live.step(piece, logits="all") for piece in text])
    pair = [one_model.new_context() for _ in texts]
    for index in range(5):
        for live, text, expected in zip(pair, texts, alone, strict=True):
            assert np.array_equal(live.step(text[index], logits="all"), expected[index])


def test_contexts_may_run_in_threads_of_their_own() -> None:
    rng = np.random.default_rng(4)
    texts = [rng.integers(1, tiny.VOCABULARY, 500).tolist() for _ in range(3)]
    shared = model(16, family="gemma")
    expected = [shared.new_context().prefill(text, all_logits=True) for text in texts]
    found: dict[int, Float32] = {}

    def work(index: int) -> None:
        found[index] = shared.new_context().prefill(texts[index], all_logits=True)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[index], each) for index, each in enumerate(expected))
