"""A calibration comes back from disk as it was, or not at all."""

from __future__ import annotations

import errno
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import AgentError, CalibrationInvalid
from edge_agent.kv import calibration_file
from edge_agent.kv.calibration import Calibration, Kind, moments, pair
from edge_agent.kv.calibration_file import (
    MAX_ABOUT_BYTES,
    calibration_name,
    find_calibration,
    read_calibration,
    write_calibration,
)
from tests.edge_agent.caches import FINGERPRINT, made_up, shapes

OTHER = "e" * 32


def made(*, kind: Kind | None = None, **receiver: int) -> Calibration:
    return pair(
        moments([made_up(seed=1)]),
        moments([made_up(**receiver)]),
        sender_fingerprint=OTHER,
        receiver_fingerprint=FINGERPRINT,
        kind=kind,
    )


def same(one: Calibration, other: Calibration) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(Calibration)]
    return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


def refused(path: Path, content: bytes) -> str:
    """The one line that reading these bytes ends in."""
    path.write_bytes(content)
    with pytest.raises(CalibrationInvalid) as caught:
        read_calibration(path)
    assert isinstance(caught.value, AgentError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / calibration_name(OTHER, FINGERPRINT)


@pytest.fixture
def arrays(path: Path) -> dict[str, Any]:
    """What a sound file holds."""
    write_calibration(made(), path)
    with np.load(path, allow_pickle=False) as held:
        return dict(held)


def packed(arrays: dict[str, Any], **changes: Any) -> bytes:
    """A file of these arrays."""
    stream = io.BytesIO()
    np.savez(stream, **(arrays | changes))
    return stream.getvalue()


def about(arrays: dict[str, Any], **changes: object) -> Any:
    """The description, changed."""
    return np.frombuffer(json.dumps(json.loads(bytes(arrays["about"])) | changes).encode(), dtype=np.uint8)


@given(shapes, st.sampled_from(["scalar", None]))
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, shape: dict[str, int], kind: Kind | None
) -> None:
    path = tmp_path_factory.mktemp("pair") / "deeper" / "pair.npz"
    calibration = made(kind=kind, **shape)
    write_calibration(calibration, path)
    assert same(read_calibration(path), calibration)
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_numpy_opens_it_without_pickle(arrays: dict[str, Any]) -> None:
    assert sorted(arrays) == ["about", "mean", "scale", "shift"]
    assert arrays["scale"].shape == (2, 2, 8)
    assert json.loads(bytes(arrays["about"]))["version"] == 1


def test_a_second_file_replaces_the_first(path: Path) -> None:
    write_calibration(made(), path)
    write_calibration(made(kind="scalar"), path)
    assert read_calibration(path).kind == "scalar"


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failed_write_leaves_what_was_there(where: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_calibration(made(), path)
    monkeypatch.setattr(os if where == "fsync" else Path, where, full)
    with pytest.raises(CalibrationInvalid, match="can't be written: No space left on device"):
        write_calibration(made(kind="scalar"), path)
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    assert read_calibration(path).kind == "dimension"


def test_a_file_that_was_cut_short_is_refused_wherever(path: Path) -> None:
    write_calibration(made(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        assert "can't be used" in refused(path, whole[:length])


def test_a_changed_byte_is_refused_or_changes_nothing(path: Path) -> None:
    calibration = made(layers=1, heads=1, dim=2)
    write_calibration(calibration, path)
    whole = path.read_bytes()
    refusals = 0
    for at in range(len(whole)):
        for flip in (0x01, 0x80, 0xFF):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            try:
                assert same(read_calibration(path), calibration)
            except CalibrationInvalid:
                refusals += 1
    assert refusals > 2 * len(whole)


@given(st.binary(max_size=300))
def test_any_other_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    refused(tmp_path_factory.getbasetemp() / "any.npz", content)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale": np.ones((2, 2, 8))}, "scale is not an array of type <f4 and shape (2, 2, 8)"),
        ({"shift": np.ones((2, 2, 8), dtype=">f4")}, "shift is not an array of type <f4"),
        ({"mean": np.ones((2, 2, 9), dtype=np.float32)}, "mean is not an array of type <f4 and shape (2, 2, 8)"),
        ({"mean": np.asfortranarray(np.ones((2, 2, 8), dtype=np.float32))}, "mean is not an array"),
        ({"scale": np.full((2, 2, 8), np.nan, dtype=np.float32)}, "scale holds a NaN or an infinity"),
        ({"mean": np.full((2, 2, 8), -np.inf, dtype=np.float32)}, "mean holds a NaN or an infinity"),
        ({"scale": np.array([{}], dtype=object)}, "scale is not an array"),
        ({"about": np.ones(4, dtype=np.int64)}, "about is not an array of type |u1"),
        ({"about": np.zeros(4, dtype=np.uint8)}, "its description is not one"),
        ({"about": np.frombuffer(b"[" * MAX_ABOUT_BYTES, dtype=np.uint8)}, "its description is not one"),
        ({"about": np.frombuffer(b'{"version":1,"x":' + b"[" * 9_999, dtype=np.uint8)}, "its description is not one"),
        ({"about": np.zeros(MAX_ABOUT_BYTES + 1, dtype=np.uint8)}, "its description has more than 16,384 bytes"),
        ({"more": np.ones(1)}, "it does not hold about.npy, mean.npy, scale.npy, shift.npy and nothing else"),
    ],
)
def test_other_arrays_are_refused(changes: dict[str, Any], said: str, arrays: dict[str, Any], path: Path) -> None:
    assert said in refused(path, packed(arrays, **changes))


def side(**changes: object) -> dict[str, object]:
    return {"fingerprint": OTHER, "layers": 2, "kv_heads": 2, "head_dim": 4} | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "version 2 is not known here (known: 1)"),
        ({"version": None}, "its description is not one"),
        ({"kind": "ridge"}, "its description is not one"),
        ({"kind": "scalar"}, "scale is not an array of type <f4 and shape (2, 2, 1)"),
        ({"layers": [0]}, "do not lead from 2 to 2"),
        ({"layers": [0, 2]}, "do not lead from 2 to 2"),
        ({"layers": [-1, 1]}, "do not lead from 2 to 2"),
        ({"sender": side(fingerprint="../../etc")}, "its description is not one"),
        ({"sender": side(kv_heads=4, head_dim=2)}, "the shapes of its models disagree"),
        ({"receiver": side(layers=0)}, "its description is not one"),
        ({"receiver": side(head_dim=10**12)}, "its description is not one"),
        ({"kind": "scalar", "receiver": side(kv_heads=4_096, head_dim=4_096)}, "scale is not an array"),
    ],
)
def test_other_descriptions_are_refused(
    changes: dict[str, object], said: str, arrays: dict[str, Any], path: Path
) -> None:
    assert said in refused(path, packed(arrays, about=about(arrays, **changes)))


def test_a_missing_array_is_refused(arrays: dict[str, Any], path: Path) -> None:
    del arrays["shift"]
    assert "does not hold" in refused(path, packed(arrays))


def test_an_array_that_declares_more_than_it_has_is_refused_before_room_is_made(
    arrays: dict[str, Any], path: Path
) -> None:
    sound = packed(arrays)
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for content, said in (
        (members["mean.npy"].replace(b"(2, 2, 8), }", b"(9999999999,"), "mean is not an array"),
        (members["mean.npy"][:-4], "mean has 124 bytes, not those of shape (2, 2, 8)"),
        (members["mean.npy"] + bytes(4), "mean has 132 bytes"),
        (b"\x93NUMPY", "mean is not an array"),
        (b"", "mean is not an array"),
    ):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for name, held in (members | {"mean.npy": content}).items():
                archive.writestr(name, held)
        assert said in refused(path, stream.getvalue())


def test_a_compressed_file_is_refused_unopened(arrays: dict[str, Any], path: Path) -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    assert "its arrays are compressed" in refused(path, stream.getvalue())


def test_a_file_beyond_the_limit_is_neither_written_nor_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_calibration(made(), path)
    monkeypatch.setattr(calibration_file, "MAX_FILE_BYTES", path.stat().st_size - 1)
    assert "it has more than" in refused(path, path.read_bytes())
    with pytest.raises(CalibrationInvalid, match=r"a calibration of [\d,]+ bytes, more than"):
        write_calibration(made(), path)


def test_a_file_that_is_not_there_or_can_not_be_read_is_one_line(path: Path) -> None:
    with pytest.raises(CalibrationInvalid, match=r"no calibration at .*; make it with `python -m scripts.calibrate`"):
        read_calibration(path)
    path.mkdir()
    with pytest.raises(CalibrationInvalid, match="can't be read: Is a directory"):
        read_calibration(path)


def test_a_pair_is_found_by_its_models_in_one_direction(tmp_path: Path) -> None:
    calibration = made()
    write_calibration(calibration, tmp_path / calibration_name(OTHER, FINGERPRINT))
    found = find_calibration(tmp_path, OTHER, FINGERPRINT)
    assert found is not None
    assert same(found, calibration)
    assert find_calibration(tmp_path, FINGERPRINT, OTHER) is None
    assert find_calibration(tmp_path / "nowhere", OTHER, FINGERPRINT) is None


@pytest.mark.parametrize("change", ["both", "receiver"])
def test_a_file_under_another_pairs_name_is_refused(change: str, tmp_path: Path) -> None:
    calibration = made()
    other = replace(calibration, sender=calibration.receiver, receiver=calibration.sender)
    if change == "receiver":
        other = replace(calibration, receiver=calibration.sender)
    write_calibration(other, tmp_path / calibration_name(OTHER, FINGERPRINT))
    with pytest.raises(CalibrationInvalid, match="not for the models of its name; make it again"):
        find_calibration(tmp_path, OTHER, FINGERPRINT)


@pytest.mark.parametrize("name", ["", "../" + "a" * 29, "A" * 32, "a" * 31, "a" * 32 + "\n"])
@pytest.mark.parametrize("use", [calibration_name, lambda one, two: find_calibration(Path(), one, two)])
def test_what_is_no_fingerprint_becomes_no_path(name: str, use: Callable[[str, str], object]) -> None:
    for pair_of in ((name, FINGERPRINT), (FINGERPRINT, name)):
        with pytest.raises(CalibrationInvalid, match="is not the fingerprint of a model"):
            use(*pair_of)
