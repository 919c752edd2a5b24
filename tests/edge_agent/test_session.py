"""The session: chunks, forks and moved caches are exact up to rounding, and what doesn't fit is refused by name."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.errors import BundleInvalid, ContextEmpty, ContextTooLong, ModelFailed, ModelUnsupported
from edge_agent.kv.cache import Cache, Float32, Layer, concatenate
from edge_agent.model.manifest import MANIFEST_NAME, file_digest, read_manifest, verify_digests
from edge_agent.model.session import LiveContext, Model
from edge_agent.model.text import TOKENIZER_NAME, Text
from tests import tiny
from tests.edge_agent.caches import equal

CLOSE = 1e-4
"""Logits (spread about 20) that differ by less differ by float32 rounding."""

QUESTION = [40, 41, 42, 43]

token_ids = st.lists(st.integers(1, tiny.VOCABULARY - 1), min_size=1, max_size=60)


@cache
def model(chunk: int = 128) -> Model:
    """The tiny model, loaded once for each size of chunk."""
    return Model(tiny.tiny_bundle(), prefill_chunk=chunk)


def read(ids: list[int], *, chunk: int = 128) -> LiveContext:
    live = model(chunk).new_context()
    live.prefill(ids)
    return live


def far(one: Float32, other: Float32) -> float:
    return float(np.abs(one - other).max())


@given(token_ids, st.integers(1, 20))
@settings(deadline=None, max_examples=25)
def test_a_chunked_prefill_equals_one_piece(ids: list[int], chunk: int) -> None:
    pieces, whole = model(chunk).new_context(), model(4_096).new_context()
    calls: list[int] = []
    rows = pieces.prefill(ids, all_logits=True, on_chunk=calls.append)
    assert far(rows, whole.prefill(ids, all_logits=True)) < CLOSE
    assert rows.shape == (len(ids), tiny.VOCABULARY)
    assert calls == [*range(chunk, len(ids), chunk), len(ids)]
    assert far(pieces.prefill(QUESTION), whole.prefill(QUESTION)) < CLOSE
    assert pieces.entries == pieces.next_position == len(ids) + len(QUESTION)


def test_the_last_row_of_all_logits_is_what_a_prefill_returns() -> None:
    ids = list(range(1, 30))
    rows = model(8).new_context().prefill(ids, all_logits=True)
    assert far(rows[-1], model(8).new_context().prefill(ids)) < CLOSE


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


@given(token_ids, token_ids)
@settings(deadline=None, max_examples=25)
def test_what_is_extracted_and_appended_at_its_place_goes_on_like_the_live_context(
    prefix: list[int], context: list[int]
) -> None:
    live = read(prefix)
    again = live.fork()
    live.prefill(context)
    taken = live.extract(len(prefix), live.entries)
    assert [layer.positions.tolist() for layer in taken.layers] == [list(range(len(context)))] * tiny.LAYERS
    again.append(taken)
    assert again.entries == again.next_position == len(prefix) + len(context)
    assert far(again.prefill(QUESTION), live.prefill(QUESTION)) < CLOSE


@given(token_ids, st.data())
@settings(deadline=None, max_examples=25)
def test_a_split_cache_equals_the_whole(ids: list[int], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=3)))
    whole = read(ids).extract(0, len(ids))
    parts = [whole.between(a, b) for a, b in itertools.pairwise([0, *cuts, len(ids)])]
    assert equal(concatenate(parts), whole)
    again = model().new_context()
    again.append(concatenate(parts))
    assert far(again.prefill(QUESTION), read(ids).prefill(QUESTION)) < CLOSE


@given(token_ids, st.data())
@settings(deadline=None, max_examples=25)
def test_own_tokens_prefilled_and_a_received_rest_equal_the_whole(ids: list[int], data: st.DataObject) -> None:
    own = data.draw(st.integers(1, len(ids)))
    whole = read(ids).extract(0, len(ids))
    first = read(ids[:own]).extract(0, own)
    again = model().new_context()
    again.append(concatenate([first, whole.between(own, len(ids))]))
    assert far(again.prefill(QUESTION), read(ids).prefill(QUESTION)) < CLOSE


@given(st.integers(0, 900), st.integers(0, 2**16))
@settings(deadline=None, max_examples=20)
def test_a_cache_taken_out_where_it_landed_is_the_one_that_was_put_in(start: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(1, tiny.VOCABULARY, 12).tolist()
    taken = read(ids).extract(0, len(ids))
    live = model().new_context()
    if start:
        live.append(Cache(tuple(_nothing(start) for _ in range(tiny.LAYERS))))
    live.append(taken)
    back = live.extract(start, live.entries)
    for one, other in zip(taken.layers, back.layers, strict=True):
        assert far(one.keys, other.keys) < CLOSE
        assert np.array_equal(one.values, other.values)
        assert np.array_equal(one.positions, other.positions)


def _nothing(entries: int) -> Layer:
    zeros = np.zeros((tiny.KV_HEADS, entries, tiny.HEAD_DIM), dtype=np.float32)
    return Layer(zeros, zeros, np.arange(entries, dtype=np.int32))


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
        pytest.param(lambda live: live.chunks([1] * 151), id="chunks"),
    ],
)
def test_an_overflow_is_refused_before_anything_is_changed(grow: Callable[[LiveContext], object]) -> None:
    live = _full(room=150)
    before = live.extract(0, live.entries)
    with pytest.raises(ContextTooLong):
        grow(live)
    assert live.entries == tiny.WINDOW_TOKENS - 150
    assert equal(live.extract(0, live.entries), before)


def test_nothing_to_read_is_refused() -> None:
    with pytest.raises(ContextEmpty, match="no tokens to prefill"):
        model().new_context().prefill([])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4)])
def test_entries_that_are_not_there_cannot_be_extracted(start: int, stop: int) -> None:
    with pytest.raises(ModelUnsupported, match=f"entries {start} to {stop} of 3"):
        read([1, 2, 3]).extract(start, stop)


def _without_a_layer(taken: Cache) -> Cache:
    return Cache(taken.layers[:-1])


def _uneven(taken: Cache) -> Cache:
    return Cache((*taken.layers[:-1], taken.layers[-1].between(0, 3)))


def _with_a_gap(taken: Cache) -> Cache:
    return Cache(tuple(_joined(layer.between(0, 1), layer.between(2, 4)) for layer in taken.layers))


def _joined(one: Layer, other: Layer) -> Layer:
    return Layer(
        np.concatenate([one.keys, other.keys], axis=1),
        np.concatenate([one.values, other.values], axis=1),
        np.concatenate([one.positions, other.positions]),
    )


def _only_the_rest(taken: Cache) -> Cache:
    return taken.between(2, 4)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_without_a_layer, "a cache of 2 layers does not fit 3"),
        (_uneven, "different entries in different layers"),
        (_with_a_gap, "a context of 4 tokens in 3 entries"),
        (_only_the_rest, "a context of 4 tokens in 2 entries"),
    ],
)
def test_a_cache_that_the_graph_cannot_hold_is_refused_by_name(change: Callable[[Cache], Cache], line: str) -> None:
    live = read([1, 2, 3, 4])
    taken = live.extract(0, 4)
    with pytest.raises(ModelUnsupported, match=line):
        live.append(change(taken))
    assert live.entries == 4


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that may be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def _list_again(bundle: Path, name: str) -> None:
    """Put a changed file's size and digest into the manifest, as if it had been made so."""
    path = bundle / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    for entry in manifest["files"]:
        if entry["path"] == name:
            entry |= {"size_bytes": (bundle / name).stat().st_size, "sha256": file_digest(bundle / name)}
    path.write_text(json.dumps(manifest))


def _edit_graph(bundle: Path, edit: Callable[[Any], None]) -> None:
    path = bundle / "model.onnx"
    proto = onnx.load(path)
    edit(proto.graph)
    onnx.save(proto, path)
    _list_again(bundle, path.name)


def _rename_input(graph: Any, old: str, new: str) -> None:
    for value in graph.input:
        if value.name == old:
            value.name = new
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def _drop_output(graph: Any, name: str) -> None:
    kept = [value for value in graph.output if value.name != name]
    del graph.output[:]
    graph.output.extend(kept)


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (
            lambda graph: _rename_input(graph, "past_key_values.1.key", "past_key_values.1.latent"),
            r"lacks input past_key_values\.1\.key \(1 missing\)",
        ),
        (lambda graph: _rename_input(graph, "attention_mask", "mask"), "lacks input attention_mask"),
        (lambda graph: _drop_output(graph, "present.2.value"), r"lacks output present\.2\.value"),
        (lambda graph: _drop_output(graph, "logits"), "lacks output logits"),
    ],
)
def test_a_graph_that_lacks_something_is_refused_by_name_at_load(
    copied: Path, edit: Callable[[Any], None], line: str
) -> None:
    _edit_graph(copied, edit)
    with pytest.raises(ModelUnsupported, match=line) as caught:
        Model(copied)
    assert "\n" not in str(caught.value)


def test_a_graph_that_wants_more_is_refused_by_name_at_load(copied: Path) -> None:
    def edit(graph: Any) -> None:
        graph.input.append(onnx.helper.make_tensor_value_info("token_type_ids", onnx.TensorProto.INT64, [1, None]))

    _edit_graph(copied, edit)
    with pytest.raises(ModelUnsupported, match="wants an input this agent does not know: token_type_ids"):
        Model(copied)


def test_a_manifest_of_more_layers_than_the_graph_has_is_refused_at_load(copied: Path) -> None:
    path = copied / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["layers"].append(manifest["layers"][0])
    path.write_text(json.dumps(manifest))
    with pytest.raises(ModelUnsupported, match=r"lacks input past_key_values\.3\.key \(2 missing\)"):
        Model(copied)


def test_a_graph_that_is_none_is_refused_in_one_line(copied: Path) -> None:
    (copied / "model.onnx").write_bytes(b"not a graph" * 100)
    _list_again(copied, "model.onnx")
    with pytest.raises(ModelUnsupported, match=r"model\.onnx can't be loaded: ") as caught:
        Model(copied)
    assert "\n" not in str(caught.value)


def _missing_bundle(bundle: Path) -> None:
    shutil.rmtree(bundle)


def _missing_file(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()


def _cut_file(bundle: Path) -> None:
    path = bundle / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1_000])


def _cut_manifest(bundle: Path) -> None:
    path = bundle / MANIFEST_NAME
    path.write_text(path.read_text()[:-40])


def _later_manifest(bundle: Path) -> None:
    path = bundle / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"manifest_version": 2}))


def _short_rotary(bundle: Path) -> None:
    path = bundle / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rotary": [[1.0, 0.5]]}))


def _wrong_rotary(bundle: Path) -> None:
    path = bundle / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers": [{"rotary": 1}] * tiny.LAYERS}))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (_missing_bundle, r"no model bundle at .*: manifest\.json is missing; run `make prepare-model`"),
        (_missing_file, r"lacks model\.onnx; prepare it again"),
        (_cut_file, r"is truncated: model\.onnx has \d+ bytes of \d+; prepare it again"),
        (_cut_manifest, "is not a manifest of version 1"),
        (_later_manifest, r"is not a manifest of version 1: .*manifest_version"),
        (_short_rotary, "rotary frequencies must be 8 per embedding"),
        (_wrong_rotary, "a layer names a rotary embedding that is not there"),
    ],
)
def test_a_damaged_bundle_is_refused_in_one_line(copied: Path, damage: Callable[[Path], None], line: str) -> None:
    damage(copied)
    with pytest.raises(BundleInvalid, match=line) as caught:
        Model(copied)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_found_by_the_digests(copied: Path) -> None:
    path = copied / TOKENIZER_NAME
    data = bytearray(path.read_bytes())
    data[1_000] ^= 1
    path.write_bytes(bytes(data))
    manifest = read_manifest(copied)
    with pytest.raises(BundleInvalid, match=r"tokenizer\.json is damaged; prepare it again"):
        verify_digests(copied, manifest)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version": "1.0"', b"\xff\xfe"])
def test_a_corrupt_tokenizer_is_refused_in_one_line(copied: Path, content: bytes) -> None:
    (copied / TOKENIZER_NAME).write_bytes(content)
    _list_again(copied, TOKENIZER_NAME)
    with pytest.raises(BundleInvalid, match=r"tokenizer\.json is not a tokenizer") as caught:
        Text(copied, read_manifest(copied))
    assert "\n" not in str(caught.value)


def test_a_run_that_fails_is_an_error_of_ours_in_one_line(tiny_bundle: Path) -> None:
    model = Model(tiny_bundle)
    live = model.new_context()
    beyond = np.array([model.manifest.vocabulary + 5], dtype=np.int32)
    with pytest.raises(ModelFailed, match="the model run failed") as caught:
        live.step(beyond, logits="last")
    assert "\n" not in str(caught.value)
    assert live.entries == 0
