"""The join of design.md and moved caches, on the tiny models, as transformers computes them in float64."""

from __future__ import annotations

import pytest

from edge_agent.model.manifest import read_manifest
from edge_agent.model.rotary import rotate
from edge_agent.model.text import Text
from tests import tiny
from tests.edge_agent.by_transformers import Case, Context, Float64, Given, compute
from tests.edge_agent.sessions import CLOSE, FAMILIES, far, model

TEXTS = ("The pump stopped at noon.", "Valve 3 was closed because of the storm, and opened again.", "All is well.")
JOINS = ((0,), (1,), (0, 1), (1, 0), (2, 0, 1))
STARTS = (0, 1, 500)
SOURCES = {"llama": tiny.tiny_source, "gemma": tiny.tiny_gemma_source}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ids(family: str) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Of each text, and of the question."""
    bundle = FAMILIES[family]()
    text = Text(bundle, read_manifest(bundle))
    return [tuple(text.context_ids(each)) for each in TEXTS], tuple(text.question_ids("Why was the valve closed?"))


@pytest.fixture(scope="module")
def reference(
    family: str, ids: tuple[list[tuple[int, ...]], tuple[int, ...]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Float64]:
    contexts, question = ids
    prefix = model(family=family).manifest.prompt.prefix_ids
    given = Given(
        prefix=prefix,
        cases=tuple(
            Case(name=f"join {number}", contexts=tuple(Context(contexts[index]) for index in join), question=question)
            for number, join in enumerate(JOINS)
        ),
        texts=tuple((*prefix, *(token for index in join for token in contexts[index]), *question) for join in JOINS),
        moved=question,
        starts=STARTS,
    )
    return compute(SOURCES[family](), given, tmp_path_factory.mktemp(family) / "found.npz")


@pytest.mark.parametrize("number", range(len(JOINS)))
def test_the_join_equals_transformers_in_float64(
    family: str, ids: tuple[list[tuple[int, ...]], tuple[int, ...]], reference: dict[str, Float64], number: int
) -> None:
    contexts, question = ids
    prefix = model(family=family).new_context()
    prefix.prefill(model(family=family).manifest.prompt.prefix_ids)
    live = prefix.fork()
    for index in JOINS[number]:
        alone = prefix.fork()
        alone.prefill(contexts[index])
        live.append(alone.extract(prefix.next_position, alone.next_position))
    logits = live.prefill(question)
    join, text = reference[f"join {number} logits"][0], reference[f"text {number}"][-1]
    assert far(logits, join) < CLOSE
    if len(JOINS[number]) == 1:
        assert far(join, text) < CLOSE / 10  # one source: the join is the text
    else:
        assert far(join, text) > 100 * CLOSE  # several: they do not see each other, and that shows


@pytest.mark.parametrize("start", STARTS)
def test_a_moved_cache_holds_what_transformers_computes_at_that_place(
    family: str, ids: tuple[list[tuple[int, ...]], tuple[int, ...]], reference: dict[str, Float64], start: int
) -> None:
    live = model(family=family).new_context()
    live.prefill(ids[1])
    for index, layer in enumerate(live.extract(0, live.next_position).layers):
        landing = layer.positions + start
        for moved in (
            rotate(layer.keys, landing, model(family=family).frequencies(index)),
            model(family=family).rotated(index, layer.keys, landing),
        ):
            assert far(moved, reference[f"keys {start} {index}"]) < CLOSE
        assert far(layer.values, reference[f"values {start} {index}"]) < CLOSE
