"""Attention mass: that of transformers for texts, that of the formula for made-up queries and keys.

Masses over caches with entries missing are in test_gaps.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import ModelUnsupported
from edge_agent.model.attention import Queries, attention_mass
from edge_agent.model.signature import LAST_QUERIES
from tests import tiny
from tests.edge_agent.by_transformers import MASS_QUERIES, Case, Float64, Given, compute
from tests.edge_agent.sessions import FAMILIES, far, model, read

CLOSE = 1e-5
LENGTHS = (1, 5, 31, 32, 33, 48, 100)
CHUNKS = (1, 7, 31, 32, 33, 48, 128)
SOURCES = {"llama": tiny.tiny_source, "gemma": tiny.tiny_gemma_source}
_IDS = tuple(int(i) for i in np.random.default_rng(7).integers(1, tiny.VOCABULARY, max(LENGTHS)))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(family: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Float64]:
    cases = tuple(Case(name=str(length), question=_IDS[:length]) for length in LENGTHS)
    return compute(SOURCES[family](), Given(prefix=(), cases=cases), tmp_path_factory.mktemp(family) / "found.npz")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_last_queries_attend_as_transformers_has_it(
    reference: dict[str, Float64], family: str, length: int, chunk: int
) -> None:
    assert LAST_QUERIES == MASS_QUERIES
    live = model(chunk, family=family).new_context()
    live.prefill(_IDS[:length], queries=True)
    mass = live.attention_mass()
    assert [each.shape for each in mass] == [(tiny.KV_HEADS, length)] * tiny.LAYERS
    assert far(np.stack(mass), reference[f"{length} mass"]) < CLOSE
    assert far(np.stack(mass).sum(-1), np.ones(tiny.KV_HEADS)) < CLOSE


def test_it_is_asked_of_every_token_read_with_queries_and_of_no_other() -> None:
    live = model(7).new_context()
    live.prefill(_IDS[:40])
    live.prefill(_IDS[40:60], queries=True)
    twenty, whole = live.attention_mass(), read(_IDS[:60])
    assert live._queries is not None
    assert live._queries.positions.tolist() == list(range(40, 60))
    live.prefill(_IDS[60:70])  # not these, but they do not see what comes after them either
    for mass, before in zip(live.attention_mass(), twenty, strict=True):
        assert far(mass[:, :60], before) < CLOSE
        assert not mass[:, 60:].any()
    live.prefill(_IDS[70:72], queries=True)  # a gap: those before do not count any more
    assert live._queries.positions.tolist() == [70, 71]
    with pytest.raises(ModelUnsupported, match="no queries were kept: read the tokens with queries=True"):
        whole.attention_mass()


def test_a_fork_keeps_the_queries_and_adds_its_own() -> None:
    trunk = model().new_context()
    trunk.prefill(_IDS[:50], queries=True)
    before = trunk.attention_mass()
    fork = trunk.fork()
    for one, other in zip(fork.attention_mass(), before, strict=True):
        assert np.array_equal(one, other)
    fork.prefill(_IDS[50:60], queries=True)
    assert [mass.shape[1] for mass in fork.attention_mass()] == [60] * tiny.LAYERS
    for one, other in zip(trunk.attention_mass(), before, strict=True):
        assert np.array_equal(one, other)


def test_keeping_queries_changes_no_logits() -> None:
    live = model(7).new_context()
    assert np.array_equal(live.prefill(_IDS, queries=True), model(7).new_context().prefill(_IDS))


@given(st.data())
def test_it_equals_the_formula_in_float64(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    kv_heads, group, dim = data.draw(st.sampled_from([(1, 1, 2), (2, 3, 4), (3, 1, 6)]))
    count, entries = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    window = data.draw(st.none() | st.integers(1, 12))
    own = np.arange(30, 30 + count, dtype=np.int32)
    held = np.sort(rng.choice(30, entries, replace=False)).astype(np.int32)
    positions = np.concatenate([held, own])
    queries = rng.standard_normal((count, kv_heads * group * dim)).astype(np.float32) * 3
    keys = rng.standard_normal((kv_heads, len(positions), dim)).astype(np.float32)
    found = attention_mass(queries, own, keys, positions, scale=0.7, window=window)
    assert found.shape == (kv_heads, len(positions))
    for head in range(kv_heads):
        expected = np.zeros(len(positions))
        for row, at in enumerate(own):
            for member in range(group):
                first = (head * group + member) * dim
                query = queries[row, first : first + dim].astype(np.float64)
                seen = (positions <= at) & (positions > at - (window or 10**6))
                weights = np.exp(0.7 * keys[head].astype(np.float64) @ query) * seen
                expected += weights / weights.sum() / (count * group)
        assert far(found[head], expected) < CLOSE


@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=8))
def test_the_last_queries_are_those_of_the_last_tokens_however_they_were_read(runs: list[tuple[int, bool]]) -> None:
    kept, at, expected = None, 0, list[int]()
    for tokens, with_queries in runs:
        positions = np.arange(at, at + tokens, dtype=np.int32)
        at += tokens
        if not with_queries:
            continue
        given = positions[-LAST_QUERIES:, None].astype(np.float32)
        kept = Queries.after(kept, positions, [given, given * 2])
        consecutive = bool(expected) and expected[-1] + 1 == positions[0]
        expected = ((expected if consecutive else []) + positions.tolist())[-LAST_QUERIES:]
        assert kept.positions.tolist() == expected
        assert kept.layers[0][:, 0].tolist() == expected
        assert kept.layers[1][:, 0].tolist() == [2 * each for each in expected]
