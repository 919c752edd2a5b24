"""The buffer behind a live context: it grows without losing a bit, never beyond what is there, and nobody shares it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.errors import MemoryShort
from edge_agent.kv.cache import Cache, Float32, Layer
from edge_agent.model.buffer import MASKED, Buffer, Form
from edge_agent.model.session import FIRST_CAPACITY, LiveContext
from tests import tiny
from tests.edge_agent.caches import equal
from tests.edge_agent.sessions import model, read

FORM = Form(layers=3, kv_heads=2, head_dim=4)
QUESTION = [40, 41, 42, 43]


def _entries(count: int, seed: int = 0) -> tuple[Float32, Float32]:
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, FORM.kv_heads, count, FORM.head_dim)).astype(np.float32)
    return keys, values


@given(st.lists(st.integers(0, 9), min_size=3, max_size=3), st.integers(9, 40), st.integers(0, 2**16))
def test_a_copy_has_the_same_entries_and_no_memory_in_common(filled: list[int], capacity: int, seed: int) -> None:
    buffer = Buffer(FORM, 9)
    for layer, count in enumerate(filled):
        positions = np.arange(count, dtype=np.int32) * 2 + layer
        buffer.write(layer, *_entries(count, seed + layer), positions)
    other = buffer.copy(capacity)
    assert (other.capacity, other.entries, other.filled.tolist()) == (capacity, max(filled), filled)
    for layer, count in enumerate(filled):
        keys, values = _entries(count, seed + layer)
        assert np.array_equal(other.keys(layer), keys)
        assert np.array_equal(other.layer_values(layer), values)
        assert other.positions(layer).tolist() == [2 * i + layer for i in range(count)]
    _assert_apart(buffer, other)


def _assert_apart(one: Buffer, other: Buffer) -> None:
    assert not np.shares_memory(one._block, other._block)
    assert not np.shares_memory(one._positions, other._positions)
    assert not np.shares_memory(one.filled, other.filled)
    assert not {value.data_ptr() for value in one.values} & {value.data_ptr() for value in other.values}


def test_what_runtime_and_agent_see_is_the_same_memory() -> None:
    buffer = Buffer(FORM, 8)
    for index, value in enumerate(buffer.values):
        assert value.data_ptr() == buffer._block[index // 2, index % 2].ctypes.data
        assert value.shape() == [1, FORM.kv_heads, 8, FORM.head_dim]


def test_more_entries_than_fit_are_refused_and_change_nothing() -> None:
    buffer = Buffer(FORM, 8)
    buffer.write(1, *_entries(6), np.arange(6, dtype=np.int32))
    with pytest.raises(ValueError, match="9 entries do not fit a buffer of 8"):
        buffer.write(1, *_entries(3), np.arange(6, 9, dtype=np.int32))
    with pytest.raises(ValueError, match="3 entries more than the buffer's 8 were written"):
        buffer.note(np.arange(6, 9, dtype=np.int32))
    assert buffer.filled.tolist() == [0, 6, 0]
    buffer.note(np.arange(6, 8, dtype=np.int32))  # the fullest layer is full, to the last entry
    assert buffer.filled.tolist() == [2, 8, 2]
    assert buffer.positions(0).tolist() == [6, 7]
    buffer.write(0, *_entries(6), np.arange(8, 14, dtype=np.int32))
    assert buffer.filled.tolist() == [8, 8, 2]


@given(st.sets(st.integers(0, 39), max_size=20), st.integers(1, 9), st.integers(1, 30), st.integers(0, 3))
def test_a_window_s_bias_hides_what_the_graph_would_show_beyond_it(
    held: set[int], tokens: int, window: int, more: int
) -> None:
    """The graph shows a token the last `window` entries up to its own; of these, none may stand beyond the window."""
    buffer = Buffer(FORM, 64)
    buffer.write(1, *_entries(len(held)), np.array(sorted(held), dtype=np.int32))
    own = np.arange(40, 40 + tokens, dtype=np.int32)
    total = len(held) + tokens + more  # as if another layer had more entries
    bias = buffer.window_bias(1, window, own, total)
    assert bias.shape == (1, 1, tokens, total)
    assert set(np.unique(bias)) <= {np.float32(0), MASKED}
    entries = [*sorted(held), *own.tolist()]
    for row, at in enumerate(own.tolist()):
        last = len(held) + row
        shown = {entries[i] for i in range(max(0, last - window + 1), last + 1) if bias[0, 0, row, i] == 0}
        assert shown == {position for position in entries if at - window < position <= at}


def _live(steps: list[int], *, capacity: int) -> LiveContext:
    """A context that has read so many tokens in each step."""
    live = model().new_context(capacity=capacity)
    ids = np.random.default_rng(5).integers(1, tiny.VOCABULARY, sum(steps)).astype(np.int32)
    for piece in np.split(ids, np.cumsum(steps)[:-1]):
        held = [live._buffer.keys(layer).copy() for layer in range(tiny.LAYERS)]
        values = [live._buffer.layer_values(layer).copy() for layer in range(tiny.LAYERS)]
        live.step(piece, logits=None, keys=True)
        for layer in range(tiny.LAYERS):
            count = held[layer].shape[1]
            assert np.array_equal(live._buffer.keys(layer)[:, :count], held[layer])
            assert np.array_equal(live._buffer.layer_values(layer)[:, :count], values[layer])
    return live


@given(st.lists(st.integers(1, 140), min_size=1, max_size=7), st.integers(1, 64))
@settings(max_examples=20)
def test_growing_keeps_every_entry_bit_for_bit(steps: list[int], capacity: int) -> None:
    grown, roomy = _live(steps, capacity=capacity), _live(steps, capacity=tiny.WINDOW_TOKENS)
    assert roomy.capacity == tiny.WINDOW_TOKENS
    assert grown.capacity in {capacity, 256, 512, 1_024}
    assert grown.capacity >= grown.entries == sum(steps)
    assert grown.capacity <= max(2 * sum(steps), FIRST_CAPACITY)
    for layer in range(tiny.LAYERS):
        assert np.array_equal(grown._buffer.keys(layer), roomy._buffer.keys(layer))
        assert np.array_equal(grown._buffer.layer_values(layer), roomy._buffer.layer_values(layer))
        assert np.array_equal(grown._buffer.positions(layer), roomy._buffer.positions(layer))
    assert equal(grown.extract(0, grown.next_position), roomy.extract(0, roomy.next_position))
    assert np.array_equal(grown.prefill(QUESTION), roomy.prefill(QUESTION))


def _no_memory(*_: object, **__: object) -> None:
    raise MemoryError


def _little_free() -> SimpleNamespace:
    return SimpleNamespace(available=10_000_000)


@pytest.mark.parametrize(
    ("place", "instead", "line"),
    [
        ("edge_agent.model.buffer.mmap.mmap", _no_memory, r"buffer of \d+ MB does not fit the \d+ MB of memory"),
        (
            "edge_agent.model.buffer.psutil.virtual_memory",
            _little_free,
            "buffer of 17 MB does not fit the 10 MB of memory",
        ),
    ],
)
def test_a_context_that_cannot_grow_is_refused_in_one_line_and_goes_on_as_it_was(
    place: str, instead: object, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, untouched = read(range(1, 201)), read(range(1, 201))
    before, pointer = live.extract(0, 200), live._buffer.values[0].data_ptr()
    taken = read([5] * 60).extract(0, 60)
    with monkeypatch.context() as patch:
        patch.setattr(place, instead)
        for grow in (
            lambda: live.reserve(57),
            lambda: live.prefill([1] * 57),
            lambda: live.step(np.ones(57, dtype=np.int32), logits="last"),
            lambda: live.append(taken),
            live.fork,
            lambda: model().new_context(),
        ):
            with pytest.raises(MemoryShort, match=line) as caught:
                grow()
            assert "\n" not in str(caught.value)
    assert (live.entries, live.next_position, live.capacity) == (200, 200, 256)
    assert live._buffer.values[0].data_ptr() == pointer
    assert equal(live.extract(0, 200), before)
    assert np.array_equal(live.prefill(QUESTION), untouched.prefill(QUESTION))
    live.prefill([1] * 57)
    assert (live.entries, live.capacity) == (261, 512)


def test_a_context_within_its_capacity_needs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    live = read([1, 2, 3])
    monkeypatch.setattr("edge_agent.model.buffer.psutil.virtual_memory", _little_free)
    live.prefill([1] * (FIRST_CAPACITY - 3))
    assert live.entries == live.capacity == FIRST_CAPACITY


def test_decoding_within_the_capacity_writes_in_place() -> None:
    live = read([1, 2, 3])
    pointers = [value.data_ptr() for value in live._buffer.values]
    for token in range(1, 100):
        live.step(np.array([token], dtype=np.int32), logits="last")
        assert [value.data_ptr() for value in live._buffer.values] == pointers
    (binding,) = (each for outputs, each in live._bindings.items() if len(outputs) == 1)
    bound = {value.data_ptr() for value in binding.get_outputs()}
    assert set(pointers) <= bound  # the graph's presents are the buffer itself
    assert live.entries == 102


@pytest.mark.parametrize("room", [0, 1, 300])
def test_a_fork_never_shares_memory_with_its_origin(room: int) -> None:
    live = read([1, 2, 3])
    fork = live.fork(room=room)
    _assert_apart(live._buffer, fork._buffer)
    assert fork.capacity >= 3 + room
    before = live.extract(0, 3)
    fork._buffer._block[:] = np.nan
    fork._buffer._positions[:] = -1
    assert equal(live.extract(0, 3), before)


def test_a_fork_with_room_does_not_grow_within_it() -> None:
    fork = read([1, 2, 3]).fork(room=600)
    pointer = fork._buffer.values[0].data_ptr()
    fork.prefill([1] * 600)
    assert fork._buffer.values[0].data_ptr() == pointer


def test_an_extracted_cache_shares_no_memory_with_the_context() -> None:
    live = model().new_context()
    live.step(np.array([1, 2, 3], dtype=np.int32), logits=None)  # keys not kept: they come out of the buffer
    for context in (live, read([1, 2, 3])):
        taken = context.extract(0, 3)
        kept = Cache(tuple(Layer(x.keys.copy(), x.values.copy(), x.positions.copy()) for x in taken.layers))
        for layer in taken.layers:
            for array in (layer.keys, layer.values, layer.positions):
                assert not np.shares_memory(array, context._buffer._block)
                assert not np.shares_memory(array, context._buffer._positions)
                array[:] = 0
        assert equal(context.extract(0, 3), kept)
