"""A profile says what each layer bears, and its picture shows it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_agent.kv.cache import Cache
from edge_agent.kv.selection import attention_on_context
from edge_agent.model.manifest import read_manifest
from scripts import relay
from scripts.prepare_model import profile
from scripts.prepare_model.answered import Answered
from scripts.prepare_model.errors import PreparationError
from scripts.prepare_model.picture import draw
from tests import tiny

PASSAGES = (
    "The pump of the north tank stopped at noon because its filter was full of sand. The crew came at four.",
    "Valve 3 in the south was closed before the storm. Relay 7 failed, and the panel showed a wrong depth.",
)


@pytest.fixture(scope="module")
def answered(tiny_bundle: Path) -> Answered:
    return Answered(tiny_bundle, PASSAGES)


def test_every_layer_of_a_bundle_has_its_figures(tiny_bundle: Path) -> None:
    found = read_manifest(tiny_bundle).profile
    assert found is not None
    for figures in (found.error, found.divergence, found.attention):
        assert len(figures) == tiny.LAYERS
        assert all(0 < figure < np.inf for figure in figures)
    assert max(found.attention) < 1
    assert min(found.passages, found.tokens, found.answer_positions) > 0


def test_the_error_is_the_papers_by_its_own_formulas(answered: Answered) -> None:
    done: list[int] = []
    found = profile.measure(answered, done.append)
    assert done == [1, 2]
    expected = np.zeros(tiny.LAYERS)
    for reference in answered:
        for index, layer in enumerate(reference.cache.layers):
            for tensor in (layer.keys.astype(np.float64), layer.values.astype(np.float64)):
                scale = (tensor.max() - tensor.min()) / (2**4 - 1)
                zero = -tensor.min() / scale
                codes = np.clip(np.round(tensor / scale + zero), 0, 15)
                expected[index] += (((codes - zero) * scale - tensor) ** 2).sum() / len(PASSAGES)
    assert found.error == pytest.approx(expected, rel=1e-3)


def test_the_divergence_is_of_one_layer_alone(answered: Answered) -> None:
    found = profile.measure(answered, lambda _: None)
    sums, positions = np.zeros(tiny.LAYERS), 0
    for reference in answered:
        coarse = profile.coarsened(reference.cache)
        positions += reference.positions
        for index in range(tiny.LAYERS):
            layers = [*reference.cache.layers]
            layers[index] = coarse.layers[index]
            live = relay.behind(answered.prefix, Cache(tuple(layers)), reference.cache.entries)
            log_q = relay.along(live, relay.read_question(live, reference.question), reference.answer)
            sums[index] += relay.divergence(reference.log_p, log_q).sum()
    assert found.divergence == pytest.approx(sums / positions, rel=1e-4)


def test_the_attention_is_the_mean_over_passages(answered: Answered) -> None:
    mean = np.mean([attention_on_context(reference.cache) for reference in answered], axis=0)
    assert profile.measure(answered, lambda _: None).attention == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_drawn(tiny_bundle: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"profile.{suffix}"
    draw(read_manifest(tiny_bundle), path)
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize("path", ["missing/profile.png", "profile.nosuchformat"])
def test_a_picture_that_cannot_be_written_is_one_line(tiny_bundle: Path, tmp_path: Path, path: str) -> None:
    with pytest.raises(PreparationError, match="--picture") as caught:
        draw(read_manifest(tiny_bundle), tmp_path / path)
    assert "\n" not in str(caught.value)


def test_a_bundle_without_profile_has_no_picture(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = msgspec.structs.replace(read_manifest(tiny_bundle), profile=None)
    with pytest.raises(PreparationError, match="no profile"):
        draw(manifest, tmp_path / "profile.png")
