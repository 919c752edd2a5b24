"""A cache is sent from what is kept of it only where that loses next to nothing more; else it is computed again."""

from __future__ import annotations

import numpy as np
import pytest

from broker_config.messages import SLICE_TOKENS
from edge_agent.errors import RecipeInvalid
from edge_agent.kv.cache import Cache
from edge_agent.kv.payload import pieces
from edge_agent.kv.reader import decode
from edge_agent.kv.recipe import WHOLE, recipe
from tests.edge_agent.caches import equal
from tests.edge_agent.memory.shelves import ONE, TOKENS, context_id, expected, shelf

IDS = tuple(range(TOKENS))


@pytest.mark.parametrize(
    ("tightest_kl", "transformed", "chain"),
    [
        (0.02, True, ("float32", "klt2", "klt4", "klt6")),
        (0.1, True, ("float32", "klt2", "klt4", "klt6", "klt8")),
        (0.006, True, ("float32", "klt1", "klt5")),
        (0.0, True, ("float32",)),
        (0.02, False, ("float32", "fp16", "q8")),
    ],
)
def test_a_cache_tightens_along_rungs_that_follow_from_each_other(
    tightest_kl: float, transformed: bool, chain: tuple[str, ...]
) -> None:
    kept = shelf(tightest_kl=tightest_kl, transformed=transformed)
    assert kept.rungs == chain
    assert [kept.tighter(rung) for rung in chain] == [*chain[1:], None]
    assert kept.tighter("klt9") is None


@pytest.mark.parametrize(
    ("held", "served"),
    [
        ("float32", None),
        ("fp16", ("q8", "q4", "fp16", "klt1", "klt2", "klt4", "klt5", "klt6", "klt8")),
        ("klt1", ("q4", "klt1", "klt5", "klt6", "klt8")),
        ("klt2", ("q4", "klt2", "klt4", "klt6", "klt8")),
        ("klt6", ("q4", "klt6", "klt8")),
    ],
)
def test_what_it_can_be_sent_at_as_it_is(held: str, served: tuple[str, ...] | None) -> None:
    assert shelf().ready(held) == served


def test_a_rung_that_chooses_by_attention_needs_floats() -> None:
    kept = shelf()
    for wanted in ("qkvcomm-6", "klt8-h50", "fp16-e30"):
        assert kept.serves("float32", wanted)
        assert not kept.serves("klt2", wanted)


def test_it_may_be_used_where_it_is_if_it_is_no_worse_than_asked() -> None:
    kept = shelf()
    assert kept.keeps("float32", "float32")
    assert kept.keeps("klt4", "klt5")
    assert not kept.keeps("klt5", "klt4")
    assert not kept.keeps("klt6", "float32")
    assert not kept.keeps("klt6", "unknown")


@pytest.mark.parametrize("start", ["float32", "klt2"])
@pytest.mark.parametrize("rung", ["klt2", "klt4", "klt6", "klt8"])
@pytest.mark.parametrize("own", [0, 7])
def test_what_is_sent_from_the_shelf_equals_what_floats_send(start: str, rung: str, own: int) -> None:
    kept = shelf()
    form = ONE if start == "float32" else kept.put(ONE, start, context_id("a"), IDS)
    sent = [
        b"".join(pieces(*kept.to_send(each, recipe(rung), context_id("a"), IDS, own_tokens=own)))
        for each in (ONE, form)
    ]
    assert sent[0] == sent[1]


@pytest.mark.parametrize(("held", "rung"), [("klt2", "klt7"), ("fp16", "klt4"), ("fp16", "q8")])
def test_what_does_not_nest_is_coded_again(held: str, rung: str) -> None:
    kept = shelf()
    form = kept.put(ONE, held, context_id("a"), IDS)
    data = b"".join(pieces(*kept.to_send(form, recipe(rung), context_id("a"), IDS, own_tokens=3)))
    header, back = decode(data, expected())
    assert (header.rung, header.own_tokens) == (rung, 3)
    assert back is not None
    direct = decode(b"".join(pieces(*kept.to_send(ONE, recipe(rung), context_id("a"), IDS, own_tokens=3))), expected())[
        1
    ]
    assert direct is not None
    assert error(back) < 1.15 * error(direct)


def error(cache: Cache) -> float:
    whole = ONE.between(TOKENS - cache.entries, TOKENS)
    return float(sum(np.square(a.keys - b.keys).sum() for a, b in zip(cache.layers, whole.layers, strict=True)))


def test_slices_are_fine_where_ends_meet_unless_they_are_there_already_or_must_be_whole() -> None:
    kept = shelf()
    for held, rung, meet, tokens in (
        (None, "klt4", True, SLICE_TOKENS),
        (None, "klt4", False, 128),
        ("klt4", "klt4", True, 128),
        ("klt2", "klt4", True, SLICE_TOKENS),
        ("float32", "float32", True, SLICE_TOKENS),
        (None, "q4-whole", True, WHOLE),
        (None, "klt4-e30", True, 128),
    ):
        assert kept.slice_tokens(held, recipe(rung), meet=meet) == tokens


@pytest.mark.parametrize("name", ["fp16-e50", "q4-l70"])
def test_a_rung_that_chooses_by_attention_has_no_header_before_its_cache(name: str) -> None:
    with pytest.raises(RecipeInvalid, match="by a cache's attention, and there is none"):
        shelf().header(recipe(name), context_id("a"), IDS, own_tokens=3)


@pytest.mark.parametrize(("name", "meets"), [("klt4", True), ("q4-whole", True), ("q4-k70", False), ("q4-l70", False)])
def test_only_slices_of_all_layers_and_entries_meet(name: str, *, meets: bool) -> None:
    assert recipe(name).meets == meets
    assert not recipe(f"{name}-h30").meets


def test_only_ids_need_no_cache() -> None:
    header, bodies = shelf().to_send(None, recipe("klt4"), context_id("a"), IDS, own_tokens=TOKENS)
    assert (header.own_tokens, list(bodies)) == (TOKENS, [])


def test_tightened_in_steps_is_tightened_at_once() -> None:
    kept = shelf()
    steps = kept.put(kept.put(ONE, "klt2", context_id("a"), IDS), "klt6", context_id("a"), IDS)
    assert steps.bodies == kept.put(ONE, "klt6", context_id("a"), IDS).bodies
    assert equal(kept.take(ONE), ONE)


def test_without_a_transform_plain_rungs_serve() -> None:
    kept = shelf(transformed=False)
    form = kept.put(kept.put(ONE, "fp16", context_id("a"), IDS), "q8", context_id("a"), IDS)
    assert (form.rung, kept.take(form).entries) == ("q8", TOKENS)
    with pytest.raises(RecipeInvalid, match="needs a transform"):
        kept.put(ONE, "klt2", context_id("a"), IDS)
