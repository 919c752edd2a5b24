"""A recipe's name says all that it does; the paper's pipeline is what the paper says."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.errors import CacheInvalid, RecipeInvalid
from edge_agent.kv.cache import Cache, Layer
from edge_agent.kv.evicted import Eviction
from edge_agent.kv.profile import Profile
from edge_agent.kv.recipe import BASELINES, CANDIDATES, WHOLE, Layout, Recipe, recipe
from edge_agent.kv.selection import Selection

LAYERS = 10
PROFILE = Profile(
    passages=1,
    tokens=1,
    answer_positions=1,
    error=tuple(float(layer) for layer in range(LAYERS)),
    divergence=tuple(float(LAYERS - layer) for layer in range(LAYERS)),
    attention=(0.5,) * LAYERS,
)


def attended(shares: list[float]) -> Cache:
    """A cache of ten layers of which each got that share of attention on its last entry."""
    nothing = np.zeros((1, 5, 2), dtype=np.float32)
    masses = [np.array([[0, 0, 0, 0, share]], dtype=np.float32) for share in shares]
    return Cache(tuple(Layer(nothing, nothing, np.arange(5, dtype=np.int32), mass) for mass in masses))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("float32", Recipe("float32", "float32", 32)),
        ("fp16", Recipe("fp16", "fp16", 16)),
        ("q5", Recipe("q5", "affine", 5)),
        ("q4-whole", Recipe("q4-whole", "affine", 4, slice_tokens=WHOLE)),
        ("mix6", Recipe("mix6", "affine", 6, mix="error")),
        ("klmix8", Recipe("klmix8", "affine", 8, mix="divergence")),
        ("fp16-l50", Recipe("fp16-l50", "fp16", 16, selection=Selection(ratio=0.5))),
        ("klmix6-k70", Recipe("klmix6-k70", "affine", 6, mix="divergence", selection=Selection(0.7, by="divergence"))),
        (
            "mix4-l70-a20-m40-s30",
            Recipe("mix4-l70-a20-m40-s30", "affine", 4, mix="error", selection=Selection(0.7, 0.2, 0.4, 0.3)),
        ),
        ("klt5-e30", Recipe("klt5-e30", "klt", 0, level=5, eviction=Eviction(0.3, "layer"))),
        ("fp16-h5-b2", Recipe("fp16-h5-b2", "fp16", 16, eviction=Eviction(0.05, "head", 2))),
        (
            "qkvcomm-6-e50-b4",
            Recipe(
                "qkvcomm-6-e50-b4",
                "affine",
                6,
                WHOLE,
                mix="error",
                selection=Selection(0.7),
                eviction=Eviction(0.5, "layer", 4),
            ),
        ),
        (
            "q6-l70-s10-whole",
            Recipe("q6-l70-s10-whole", "affine", 6, WHOLE, selection=Selection(0.7, prior_spread=0.1)),
        ),
    ],
)
def test_a_name_says_what_is_done(name: str, expected: Recipe) -> None:
    assert recipe(name) == expected


@pytest.mark.parametrize("target", [4, 6, 8])
def test_the_papers_pipeline_sends_seven_tenths_of_the_layers_in_three_widths_of_whole_tensors(target: int) -> None:
    found = recipe(f"qkvcomm-{target}")
    assert found == Recipe(f"qkvcomm-{target}", "affine", target, WHOLE, mix="error", selection=Selection(ratio=0.7))


@pytest.mark.parametrize(
    "name",
    ["", "q", "q0", "q9", "fp168", "float32x", "mix3", "mix9", "mix", "klmix", "qkvcomm-3", "qkvcomm-", "q6-l0",
     "q6-l101", "q6-a50", "q6-m50-l70", "q6-l70-m50-a50", "q6-whole-l70", "q6-l70-l70", "q6-k70-a50", "q6-l70-k70",
     "q6-k0", "q06", "q6-e0", "q6-e100", "q6-b4", "q6-e30-b0", "q6-e30-h30", "-e30", "klt16-e30",
     "q6-l070", "qkvcomm-06", "Q6", "q6 ", "q6-l70-s0"],
)  # fmt: skip
def test_any_other_name_is_refused(name: str) -> None:
    with pytest.raises(RecipeInvalid):
        recipe(name)


def test_a_uniform_recipe_needs_neither_profile_nor_attention() -> None:
    assert recipe("q6").layout(3, None, None) == Layout((0, 1, 2), (6, 6, 6))
    assert recipe("fp16").layout(3, None, None) == Layout((0, 1, 2))


def test_bits_follow_the_profile() -> None:
    assert recipe("mix6").layout(LAYERS, PROFILE, None).widths == (4, 4, 4, 6, 6, 6, 6, 8, 8, 8)
    assert recipe("klmix6").layout(LAYERS, PROFILE, None).widths == (8, 8, 8, 6, 6, 6, 6, 4, 4, 4)


def test_layers_follow_the_attention_of_the_very_cache_and_bits_are_shared_out_among_those_sent() -> None:
    cache = attended([0.9, 0.9, 0.9, 0, 0, 0, 0, 0, 0, 0.9])
    found = recipe("mix6-l40-a100").layout(LAYERS, PROFILE, cache)
    assert found == Layout((0, 1, 2, 9), (4, 6, 6, 8))


def test_layers_by_what_they_cost_need_no_attention() -> None:
    assert recipe("mix6-k40").layout(LAYERS, PROFILE, None) == Layout((0, 1, 2, 3), (4, 6, 6, 8))


def test_what_is_missing_is_named() -> None:
    with pytest.raises(RecipeInvalid, match="profile by error"):
        recipe("mix6").layout(LAYERS, None, None)
    with pytest.raises(RecipeInvalid, match="profile by divergence"):
        recipe("klmix6").layout(LAYERS + 1, PROFILE, None)
    with pytest.raises(RecipeInvalid, match="profile by divergence"):
        recipe("fp16-k70").layout(LAYERS, None, attended([0.0] * LAYERS))
    with pytest.raises(RecipeInvalid, match="chooses layers"):
        recipe("q6-l70").layout(LAYERS, PROFILE, None)
    bare = Cache(tuple(Layer(layer.keys, layer.values, layer.positions) for layer in attended([0] * 10).layers))
    with pytest.raises(CacheInvalid, match="attention mass"):
        recipe("q6-l70").layout(LAYERS, PROFILE, bare)


def test_the_ladder_begins_without_loss_and_holds_the_papers_recipes_beside_it() -> None:
    assert CANDIDATES[0].name == "float32"
    assert {"qkvcomm-8", "qkvcomm-6", "qkvcomm-4"} <= {rung.name for rung in BASELINES}
