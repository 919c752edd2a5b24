"""The cache of bundles and model directories: nothing half-made or damaged is ever used."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import msgspec
import pytest

from edge_agent.errors import BundleInvalid
from edge_agent.model.manifest import MANIFEST_NAME, read_manifest, verify_digests
from scripts.prepare_model import cache, calibration, default_bundle, exported_graph, source
from scripts.prepare_model.bundle import copy_to
from scripts.prepare_model.errors import DiskFull, PreparationError, SourceUnavailable, is_disk_full
from tests import tiny

VERSIONS = dict.fromkeys(cache.SHAPING_PACKAGES, "1")


def test_a_key_changes_with_everything_a_bundle_is_made_from() -> None:
    keys = {
        cache.bundle_key("a", "t", VERSIONS, "int8"),
        cache.bundle_key("b", "t", VERSIONS, "int8"),
        cache.bundle_key("a", "u", VERSIONS, "int8"),
        cache.bundle_key("a", "t", {**VERSIONS, "torch": "2"}, "int8"),
        cache.bundle_key("a", "t", VERSIONS, "fp32"),
    }
    assert len(keys) == 5


def test_an_exports_key_changes_with_everything_it_is_made_from_and_not_with_the_runtime() -> None:
    one = cache.export_key("a", "s", VERSIONS)
    others = [
        cache.export_key("b", "s", VERSIONS),
        cache.export_key("a", "t", VERSIONS),
        cache.export_key("a", "s", {**VERSIONS, "torch": "2"}),
    ]
    assert len({one, *others}) == 4
    assert cache.export_key("a", "s", {**VERSIONS, "onnxruntime": "2"}) == one


def test_the_cache_is_where_the_variable_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "here"))
    assert cache.cache_root() == tmp_path / "here"
    monkeypatch.delenv(cache.CACHE_VARIABLE)
    assert cache.cache_root() == Path.home() / ".cache" / "kvbus"


def test_a_default_bundle_that_is_not_there_says_what_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path))
    with pytest.raises(BundleInvalid, match="make prepare-model"):
        default_bundle()


def _entry(root: Path, name: str, size: int, used_at: float) -> Path:
    path = root / "bundles" / name
    path.mkdir(parents=True)
    (path / MANIFEST_NAME).write_bytes(b"x" * size)
    os.utime(path, (used_at, used_at))
    return path


def test_over_the_limit_the_least_recently_used_leaves_and_the_new_one_never(tmp_path: Path) -> None:
    oldest, middle, newest = (_entry(tmp_path, name, 100, at) for name, at in (("b", 1), ("a", 2), ("c", 3)))
    assert [entry.path for entry in cache.shrink(tmp_path, 250, keep=newest)] == [oldest]
    assert middle.exists()
    assert newest.exists()
    assert [entry.path for entry in cache.shrink(tmp_path, 0, keep=middle)] == [newest]
    assert middle.exists()


def test_a_download_counts_towards_the_limit(tmp_path: Path) -> None:
    wheel = tmp_path / "downloads" / "x.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"x" * 100)
    os.utime(wheel, (1, 1))
    made = _entry(tmp_path, "a", 100, 2)
    assert [entry.path for entry in cache.shrink(tmp_path, 150, keep=made)] == [wheel]


def _export(root: Path, size: int, used_at: float) -> Path:
    path = cache.export_path(root, "owner/model", "0" * 16)
    path.mkdir(parents=True)
    (path / "model.onnx").write_bytes(b"x" * size)
    cache.note_export(path, b'{"a": [1, 2]}')
    os.utime(path, (used_at, used_at))
    return path


def test_an_export_counts_towards_the_limit_and_leaves_whole(tmp_path: Path) -> None:
    export = _export(tmp_path, 1000, 1)
    bundle = _entry(tmp_path, "a", 100, 2)
    assert {entry.path for entry in cache.entries(tmp_path)} == {export, bundle}
    assert cache.shrink(tmp_path, 2000, keep=bundle) == []
    assert [entry.path for entry in cache.shrink(tmp_path, 150, keep=bundle)] == [export]
    assert not export.exists()


def test_an_export_that_was_just_used_leaves_after_older_bundles(tmp_path: Path) -> None:
    export = _export(tmp_path, 100, 1)
    old, made = _entry(tmp_path, "a", 100, 2), _entry(tmp_path, "b", 100, 3)
    assert cache.find_export(export) is not None
    assert [entry.path for entry in cache.shrink(tmp_path, 300, keep=made)] == [old]


def test_what_is_noted_of_an_export_comes_back_only_while_it_is_whole(tmp_path: Path) -> None:
    export = _export(tmp_path, 100, 1)
    noted = cache.find_export(export)
    assert noted is not None
    assert msgspec.json.decode(noted) == {"a": [1, 2]}
    assert export.stat().st_mtime > 1
    note, model = export / cache.EXPORT_NAME, export / "model.onnx"
    whole = note.read_bytes()
    for harmed in (b"", whole[:-1], b"{}", b"\xff" * 20, b"[]"):
        note.write_bytes(harmed)
        assert cache.find_export(export) is None
    note.write_bytes(whole)
    model.write_bytes(b"x" * 99)
    assert cache.find_export(export) is None
    model.unlink()
    assert cache.find_export(export) is None
    assert cache.find_export(tmp_path / "nowhere") is None


def test_an_export_that_is_gone_is_made_again(tiny_bundle: Path, tmp_path: Path) -> None:
    made = exported_graph(str(tiny.tiny_source()), root=tmp_path)
    assert made.is_file()
    assert made.is_relative_to(tmp_path / "exports")
    assert exported_graph(str(tiny.tiny_source()), root=tmp_path) == made


def test_leftovers_are_removed_and_whole_bundles_stay(tmp_path: Path) -> None:
    whole = _entry(tmp_path, "whole", 1, 1)
    (tmp_path / "bundles" / ".tmp-dead" / "bundle").mkdir(parents=True)
    (tmp_path / "downloads" / ".tmp-x").mkdir(parents=True)
    (tmp_path / "exports" / ".tmp-y" / "export").mkdir(parents=True)
    assert cache.remove_leftovers(tmp_path) == 3
    assert [path.name for path in (tmp_path / "bundles").iterdir()] == [whole.name]


def test_a_second_preparation_waits_for_the_first(tmp_path: Path) -> None:
    waited, entered = threading.Event(), threading.Event()

    def second() -> None:
        with cache.locked(tmp_path, waited.set):
            entered.set()

    thread = threading.Thread(target=second)
    with cache.locked(tmp_path, lambda: None):
        thread.start()
        assert waited.wait(10)
        assert not entered.is_set()
    assert entered.wait(10)
    thread.join()


def test_a_truncated_bundle_is_refused_by_the_name_of_its_file(tiny_bundle: Path, tmp_path: Path) -> None:
    copy_to(tiny_bundle, tmp_path / "copy")
    model = tmp_path / "copy" / "model.onnx"
    whole = model.read_bytes()
    model.unlink()
    with pytest.raises(BundleInvalid, match=r"lacks model\.onnx"):
        read_manifest(tmp_path / "copy")
    model.write_bytes(whole[:-1])
    with pytest.raises(BundleInvalid, match=r"truncated: model\.onnx"):
        read_manifest(tmp_path / "copy")
    model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleInvalid, match=r"model\.onnx is damaged"):
        verify_digests(tmp_path / "copy", read_manifest(tmp_path / "copy"))


def test_output_replaces_a_bundle_but_nothing_else(tiny_bundle: Path, tmp_path: Path) -> None:
    for _ in range(2):
        copy_to(tiny_bundle, tmp_path / "out")
        verify_digests(tmp_path / "out", read_manifest(tmp_path / "out"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(PreparationError, match="no bundle is there"):
        copy_to(tiny_bundle, tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_a_directory_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    for missing in ("config.json", "tokenizer.json", "weights"):
        with pytest.raises(SourceUnavailable, match=missing):
            source.resolve(str(tmp_path))
        (tmp_path / missing).write_text("{}")


def test_a_source_is_the_same_wherever_its_directory_lies(tmp_path: Path) -> None:
    for place in ("a/model", "b/model", "c/model"):
        (tmp_path / place).mkdir(parents=True)
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (tmp_path / place / name).write_text("{}")
    (tmp_path / "b/model/README.md").write_text("hello")
    (tmp_path / "c/model/model.safetensors").write_text("{ }")
    a, b, c = (source.resolve(str(tmp_path / place)).key for place in ("a/model", "b/model", "c/model"))
    assert a == b != c


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
    ],
)
def test_a_full_disk_is_known_whoever_says_it(error: Exception, full: bool) -> None:
    wrapped = ValueError("saving failed")
    wrapped.__cause__ = error
    assert is_disk_full(error) == is_disk_full(wrapped) == full


def test_the_disk_full_line_names_what_and_how_much_is_free(tmp_path: Path) -> None:
    assert "disk full while writing the bundle: " in str(DiskFull("the bundle", tmp_path / "not" / "yet"))
    assert "MB free" in str(DiskFull("the bundle", tmp_path))


def test_the_shipped_texts_are_24_passages_of_prose() -> None:
    texts = calibration.read_texts(None)
    assert len(texts.passages) == 24
    assert all(80 <= len(passage.split()) <= 200 for passage in texts.passages)


def test_a_long_text_is_cut_at_sentences_and_headings_are_left_out(tmp_path: Path) -> None:
    sentence = "The pump of well number seven ran for ten hours on that day. "
    (tmp_path / "a.txt").write_text("# Title\n\n" + sentence * 50)
    (tmp_path / "short.md").write_text("Too short.")
    (tmp_path / "other.json").write_text('"' + sentence * 50 + '"')
    passages = calibration.read_texts(tmp_path).passages
    assert all(
        passage.endswith("day.") and calibration.MIN_WORDS <= len(passage.split()) <= 180 for passage in passages
    )
    assert sum(len(passage.split()) for passage in passages) == len(sentence.split()) * 50


@pytest.mark.parametrize("content", ["", "Too short."])
def test_a_folder_without_text_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(PreparationError, match="no passage of 40 words"):
        calibration.read_texts(tmp_path)
    with pytest.raises(PreparationError, match="no such folder"):
        calibration.read_texts(tmp_path / "nothing")
