"""Caches with fewer entries than positions, others in other layers and heads, attend as transformers does.

The reference (tests.edge_agent.by_transformers) reads in float64 and hides what is missing by masks. Windows of a Gemma
count positions whatever is missing.
"""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.errors import ModelUnsupported
from edge_agent.model.session import LiveContext, Model, Runtime
from tests import tiny
from tests.edge_agent.by_transformers import Case, Context, Float64, Given, compute
from tests.edge_agent.caches import without_by_head
from tests.edge_agent.sessions import CLOSE, FAMILIES, far, model

CHUNKS = (1, 7, 23, 24, 25, 128)
SOURCES = {"llama": tiny.tiny_source, "gemma": tiny.tiny_gemma_source}
_RNG = np.random.default_rng(20_261)
_ALL, _NONE = tuple(range(70)), ()


def _ids(count: int) -> tuple[int, ...]:
    return tuple(int(i) for i in _RNG.integers(1, tiny.VOCABULARY, count))


def _some(count: int, share: float) -> tuple[tuple[int, ...], ...]:
    """So large a share of the positions, others in each layer."""
    return tuple(tuple(int(i) for i in np.flatnonzero(_RNG.random(count) < share)) for _ in range(tiny.LAYERS))


def _some_by_head(count: int, share: float) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """So large a share of the positions, others in each layer and KV head, but as many in each."""
    gone = round(share * count)
    return tuple(
        tuple(tuple(sorted(int(i) for i in _RNG.permutation(count)[:gone])) for _ in range(tiny.KV_HEADS))
        for _ in range(tiny.LAYERS)
    )


PREFIX, LONG, SHORT, QUESTION = _ids(9), _ids(70), _ids(15), _ids(31)
EVICTED = _some(70, 0.4)
NEAR_THE_END = (tuple(range(50, 66)), tuple(range(40, 70)), tuple(range(66, 70)))
"""Within reach of a window of 24 positions from the question; in two layers the last entries are gone."""

CASES = [
    Case(name="nothing missing", contexts=(Context(LONG),), question=QUESTION, steps=6),
    Case(name="a layer not sent", contexts=(Context(LONG, (_NONE, _ALL, _NONE)),), question=QUESTION, steps=6),
    Case(name="first and last not sent", contexts=(Context(LONG, (_ALL, _NONE, _ALL)),), question=QUESTION, steps=6),
    Case(name="nothing sent", contexts=(Context(LONG, (_ALL, _ALL, _ALL)),), question=QUESTION, steps=6),
    Case(name="evicted", contexts=(Context(LONG, EVICTED),), question=QUESTION, steps=6),
    Case(name="evicted near the end", contexts=(Context(LONG, NEAR_THE_END),), question=QUESTION, steps=6),
    Case(name="both", contexts=(Context(LONG, (*EVICTED[:2], _ALL)),), question=QUESTION, steps=6),
    Case(name="short", contexts=(Context(SHORT, _some(15, 0.5)),), question=QUESTION[:4], steps=30),
    Case(name="by head", contexts=(Context(LONG, by_head=_some_by_head(70, 0.4)),), question=QUESTION, steps=6),
    Case(name="little by head", contexts=(Context(LONG, by_head=_some_by_head(70, 0.9)),), question=QUESTION, steps=6),
    Case(
        name="by head and by layer",
        contexts=(Context(SHORT, by_head=_some_by_head(15, 0.5)), Context(LONG, EVICTED), Context(SHORT)),
        question=QUESTION,
        steps=6,
    ),
    Case(name="two", contexts=(Context(LONG), Context(SHORT)), question=QUESTION, steps=6),
    Case(
        name="three with gaps",
        contexts=(
            Context(SHORT, _some(15, 0.3)),
            Context(LONG, NEAR_THE_END),
            Context(SHORT, (_NONE, _ALL[:15], (14,))),
        ),
        question=QUESTION,
        steps=6,
    ),
]
WHOLE_TEXT = (*PREFIX, *LONG, *QUESTION)
NAMES = [case.name for case in CASES]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(family: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Float64]:
    given = Given(prefix=PREFIX, cases=tuple(CASES), texts=(WHOLE_TEXT,))
    return compute(SOURCES[family](), given, tmp_path_factory.mktemp(family) / "found.npz")


def _joined(model: Model, case: Case) -> LiveContext:
    """The contexts of a case, each prefilled alone behind the prefix, thinned out and appended."""
    prefix = model.new_context()
    prefix.prefill(PREFIX)
    live = prefix.fork()
    for context in case.contexts:
        alone = prefix.fork()
        alone.prefill(context.ids)
        whole = alone.extract(prefix.next_position, alone.next_position)
        missing = context.by_head or [[gone] * tiny.KV_HEADS for gone in context.hidden]
        live.append(without_by_head(whole, missing), tokens=len(context.ids))
    return live


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_question_and_answer_after_caches_with_gaps_equal_transformers(
    reference: dict[str, Float64], family: str, name: str, chunk: int
) -> None:
    case = CASES[NAMES.index(name)]
    live = _joined(model(chunk, family=family), case)
    start = live.next_position
    assert start == len(PREFIX) + sum(len(context.ids) for context in case.contexts)
    rows = [live.prefill(case.question)]
    rows += [live.step(np.array([token], dtype=np.int32), logits="last") for token in reference[f"{name} tokens"]]
    assert far(np.stack(rows), reference[f"{name} logits"]) < CLOSE
    assert live.next_position == start + len(case.question) + case.steps


@pytest.mark.parametrize("name", NAMES)
def test_the_attention_of_a_question_after_caches_with_gaps_equals_transformers(
    reference: dict[str, Float64], family: str, name: str
) -> None:
    case = CASES[NAMES.index(name)]
    live = _joined(model(7, family=family), case)
    live.prefill(case.question, queries=True)
    for layer, (mass, expected) in enumerate(zip(live.attention_mass(), reference[f"{name} mass"], strict=True)):
        held = np.broadcast_to(live._buffer.positions(layer), mass.shape)
        assert far(mass, np.take_along_axis(expected, held, axis=1)) < 1e-5
        assert far(mass.sum(-1), np.ones(tiny.KV_HEADS)) < 1e-5
        for head, positions in enumerate(held):  # what is missing got nothing in the reference either
            assert np.delete(expected[head], positions).sum() == 0


@pytest.mark.parametrize(
    "runtime",
    [
        pytest.param(Runtime(threads=2, flash_attention=True), id="flash attention"),
        pytest.param(Runtime(threads=2, spin=False, arena=False), id="two threads, no spinning, no arena"),
    ],
)
def test_other_ways_of_running_equal_transformers_too(
    reference: dict[str, Float64], family: str, runtime: Runtime
) -> None:
    other = Model(FAMILIES[family](), runtime, prefill_chunk=24)
    for case in CASES:
        assert far(_joined(other, case).prefill(case.question), reference[f"{case.name} logits"][0]) < CLOSE


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_text_read_in_chunks_equals_transformers_at_every_token(
    reference: dict[str, Float64], family: str, chunk: int
) -> None:
    rows = model(chunk, family=family).new_context().prefill(WHOLE_TEXT, all_logits=True)
    assert far(rows, reference["text 0"]) < CLOSE


@pytest.mark.parametrize("name", NAMES[1:])
def test_what_is_missing_shows(reference: dict[str, Float64], name: str) -> None:
    """Or the comparison with the reference would say nothing."""
    assert far(reference[f"{name} logits"][0], reference["nothing missing logits"][0]) > 100 * CLOSE


def test_the_reference_with_nothing_missing_is_the_text_as_transformers_masks_it(reference: dict[str, Float64]) -> None:
    assert far(reference["nothing missing logits"][0], reference["text 0"][-1]) < CLOSE / 10


@pytest.mark.parametrize("name", NAMES)
def test_what_a_buffer_holds_beyond_its_entries_is_never_read(family: str, name: str) -> None:
    case = CASES[NAMES.index(name)]
    clean, soiled = (_joined(model(24, family=family), case) for _ in range(2))
    for layer, filled in enumerate(soiled._buffer.filled):
        soiled._buffer._block[layer, :, :, filled:] = np.nan
    for tokens in (case.question, QUESTION[:1]):
        assert np.array_equal(soiled.prefill(tokens), clean.prefill(tokens))


def test_a_provider_that_onnxruntime_does_not_have_is_named_with_those_that_it_has(family: str) -> None:
    with pytest.raises(ModelUnsupported, match=r"has no CUDAExecutionProvider, but .*CPUExecutionProvider"):
        Model(FAMILIES[family](), Runtime(provider="CUDAExecutionProvider"))
