"""Releases on a device: whole or not there, one in use, and always a way back."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.release import cli, trial
from edge_agent.release import place as places
from edge_agent.release.errors import (
    DeviceBusy,
    LayerDamaged,
    NothingInstalled,
    ReleaseError,
    ReleaseInvalid,
    SignatureWrong,
    SystemFailed,
)
from edge_agent.release.layers import unpack, write_whole
from edge_agent.release.manifest import Layer, Release, read_release
from edge_agent.release.place import CONFIGURATION, PASSWORD, Place, Trial
from edge_agent.release.signature import check_signature
from edge_agent.release.units import units
from scripts.flash.archive import write_layer
from scripts.flash.bundle import installer

PYTHON = Path("/usr/bin/python3.11")


def release(version: str = "1.0", **layers: Layer) -> Release:
    return Release(version=version, protocol=1, machine="aarch64", python="3.11", layers=layers)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    root = tmp_path / "kvbus"
    root.mkdir()
    return Place(root)


def layer_of(place: Place, tmp_path: Path, **files: bytes) -> Layer:
    layer = write_layer(tmp_path, files, compress=True)
    unpack(tmp_path / f"{layer.sha256}.layer", layer, place.store)
    return layer


def add(place: Place, tmp_path: Path, version: str, **own: bytes) -> str:
    layer = layer_of(place, tmp_path, code=version.encode())
    return place.add(release(version, agent=layer), b"s", own, PYTHON, None)


@dataclass
class Told:
    """A service that notes what it was told, and which release was current then."""

    place: Place
    said: list[str] = field(default_factory=list)
    fails: bool = False

    def watch_trial(self) -> None:
        self.said.append(f"watch {self.place.current()}")

    def restart(self) -> None:
        self.said.append(f"restart {self.place.current()}")
        if self.fails:
            self.fails = False
            raise SystemFailed("systemd is away")

    def stop(self) -> None:
        self.said.append("stop")


# Manifests and signatures


@given(
    st.text("abc019.+-", min_size=1, max_size=20).filter(lambda text: text[0].isalnum()),
    st.dictionaries(st.sampled_from(["runtime", "agent", "model"]), st.integers(0, 2**40)),
)
def test_a_manifest_is_read_as_it_was_written(version: str, sizes: Mapping[str, int]) -> None:
    layers = {
        name: Layer(sha256=hashlib.sha256(name.encode()).hexdigest(), size_bytes=size, unpacked_bytes=size + 1)
        for name, size in sizes.items()
    }
    one = release(version, **layers)
    assert read_release(one.to_bytes()) == one
    assert read_release(one.to_bytes()).digest == one.digest


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"format": 2}',
        b'{"format": 1}',
        b'{"format": 1, "version": "../x", "protocol": 1, "machine": "a", "python": "3.11", "layers": {}}',
        b'{"format": 1, "version": "x", "protocol": true, "machine": "a", "python": "3.11", "layers": {}}',
        b'{"format": 1, "version": "x", "protocol": 1, "machine": "a", "python": "2.7", "layers": {}}',
        b'{"format": 1, "version": "x", "protocol": 1, "machine":"a","python": "3.11", "layers": {"a": {"sha256": 0}}}',
        release().to_bytes() + b" ",
        b" " * (2 << 20),
    ],
)
def test_what_is_no_manifest_is_refused_in_one_line(content: bytes) -> None:
    with pytest.raises(ReleaseInvalid) as caught:
        read_release(content)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_only_the_sites_own_key_signs_for_it() -> None:
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    check_signature(b"content", key.sign(b"content"), public)
    for content, signature, known in (
        (b"Content", key.sign(b"content"), public),
        (b"content", other.sign(b"content"), public),
        (b"content", b"", public),
        (b"content", key.sign(b"content"), public[:5]),
    ):
        with pytest.raises(SignatureWrong):
            check_signature(content, signature, known)


# Layers


def test_a_layer_is_unpacked_as_it_was_packed(tmp_path: Path) -> None:
    files = {"a/b/c.py": b"print()\n", "empty": b"", "big": os.urandom(3_000_000)}
    told: list[int] = []
    for compress in (True, False):
        layer = write_layer(tmp_path / "out", files, compress=compress)
        target = unpack(tmp_path / "out" / f"{layer.sha256}.layer", layer, tmp_path / f"store{compress}", told.append)
        assert {name: (target / name).read_bytes() for name in files} == files
        assert told[-1] == layer.unpacked_bytes == sum(map(len, files.values()))
        assert not [path for path in (tmp_path / f"store{compress}").iterdir() if path != target]


@contextmanager
def archive(path: Path) -> Iterator[tarfile.TarFile]:
    with tarfile.open(path, "w") as tar:
        yield tar


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "link", "hard", "fifo"])
def test_a_layer_writes_nowhere_but_below_its_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "evil"
    with archive(path) as tar:
        member = tarfile.TarInfo(name)
        if name == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc"
        elif name == "hard":
            member.type, member.linkname = tarfile.LNKTYPE, "/etc/passwd"
        elif name == "fifo":
            member.type = tarfile.FIFOTYPE
        else:
            member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    layer = Layer(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size_bytes=1, unpacked_bytes=1)
    with pytest.raises(LayerDamaged, match="which no layer may hold"):
        unpack(path, layer, tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []
    assert not (tmp_path / "out").exists()


def test_a_layer_that_is_cut_short_or_changed_leaves_nothing(tmp_path: Path) -> None:
    layer = write_layer(tmp_path, {"big": os.urandom(200_000)}, compress=True)
    path = tmp_path / f"{layer.sha256}.layer"
    whole = path.read_bytes()
    for content in (whole[:-5000], whole[:100], b"", whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:]):
        path.write_bytes(content)
        with pytest.raises(LayerDamaged, match="its digest is another"):
            unpack(path, layer, tmp_path / "store")
        own = Layer(sha256=hashlib.sha256(content).hexdigest(), size_bytes=1, unpacked_bytes=1)
        with pytest.raises(LayerDamaged, match=r"is no archive|bytes"):
            unpack(path, own, tmp_path / "store")
        assert list((tmp_path / "store").iterdir()) == []
    with pytest.raises(SystemFailed, match="can't unpack"):
        unpack(tmp_path / "none", layer, tmp_path / "store")


# Releases side by side


def test_a_release_holds_its_own_files_and_shares_its_layers(place: Place, tmp_path: Path) -> None:
    own = {CONFIGURATION: f'bundle = "{place.root}/current/model"\n'.encode(), PASSWORD: b"secret"}
    one = add(place, tmp_path, "1.0", **own)
    assert add(place, tmp_path, "1.0", **own) == one
    assert place.names() == (one,)
    folder = place.releases / one
    assert (folder / "agent" / "code").read_bytes() == b"1.0"
    assert (folder / CONFIGURATION).read_text() == f'bundle = "{folder}/model"\n'
    assert (folder / PASSWORD).stat().st_mode & 0o777 == 0o640
    assert add(place, tmp_path, "1.0", **{**own, PASSWORD: b"other"}) != one
    assert not [path for path in place.releases.iterdir() if path.name.startswith(".")]


def test_what_nobody_uses_is_forgotten_and_the_way_back_is_not(place: Place, tmp_path: Path) -> None:
    names = [add(place, tmp_path, f"1.{number}") for number in range(4)]
    place.use("current", names[3])
    place.use("previous", names[1])
    assert place.forget_unused() > 0
    assert set(place.names()) == {names[1], names[3]}
    assert (place.root / "previous" / "agent" / "code").read_bytes() == b"1.1"
    assert len(list(place.store.iterdir())) == 2


# Trials


@pytest.fixture
def told(place: Place) -> Told:
    return Told(place)


def test_a_release_that_is_confirmed_stays_with_a_way_back(place: Place, tmp_path: Path, told: Told) -> None:
    names = []
    for version in ("1.0", "2.0"):
        names.append(name := add(place, tmp_path, version))
        trial.begin(place, name, told, within_s=60)
        assert place.current() == name
        trial.confirm(place, name)
        trial.confirm(place, name)  # the answer to the first was lost
    one, two = names
    assert (place.current(), place.previous(), place.trial()) == (two, one, None)
    assert told.said == ["watch None", f"restart {one}", f"watch {one}", f"restart {two}"]
    assert trial.back(place, told, within_s=60) == one
    trial.confirm(place, one)
    assert (place.current(), place.previous()) == (one, two)


def both(place: Place, tmp_path: Path, told: Told) -> tuple[str, str]:
    """One that is in use, and one that is ready to be tried."""
    one = add(place, tmp_path, "1.0")
    trial.begin(place, one, told, within_s=60)
    trial.confirm(place, one)
    return one, add(place, tmp_path, "2.0")


def test_a_release_that_fails_gives_way_to_the_one_before_or_to_none(place: Place, tmp_path: Path, told: Told) -> None:
    one = add(place, tmp_path, "1.0")
    trial.begin(place, one, told, within_s=60)
    assert trial.undo(place, told, "no answer") is None
    assert (place.current(), told.said[-1]) == (None, "stop")
    two = both(place, tmp_path, told)[1]
    trial.begin(place, two, told, within_s=60)
    assert trial.undo(place, told, "no answer") == one
    assert (place.current(), told.said[-1]) == (one, f"restart {one}")
    assert place.failure() == f"{two} is not in use: no answer"
    with pytest.raises(NothingInstalled, match="no answer"):
        trial.confirm(place, two)
    told.fails = True
    with pytest.raises(SystemFailed):
        trial.begin(place, two, told, within_s=60)
    assert (place.current(), place.trial()) == (one, None)


def test_going_back_needs_no_room_on_the_disk(
    place: Place, tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = both(place, tmp_path, told)
    trial.begin(place, two, told, within_s=60)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(places, "write_whole", full)
    assert trial.undo(place, told, "no answer") == one
    assert (place.current(), place.trial(), place.failure()) == (one, None, None)
    assert told.said[-1] == f"restart {one}"


def test_going_back_is_not_over_before_the_service_has_heard_of_it(place: Place, tmp_path: Path, told: Told) -> None:
    one, two = both(place, tmp_path, told)
    trial.begin(place, two, told, within_s=0)
    told.fails = True
    with pytest.raises(SystemFailed):
        trial.watch(place, told)
    assert place.trial() is not None
    trial.watch(place, told)  # systemd starts it again
    assert (place.current(), place.trial(), told.said[-1]) == (one, None, f"restart {one}")


def test_a_trial_outlives_neither_its_time_nor_a_restart(place: Place, tmp_path: Path, told: Told) -> None:
    one, two = both(place, tmp_path, told)
    trial.begin(place, two, told, within_s=0)
    trial.watch(place, told)
    assert place.current() == one
    assert "not confirmed in time" in str(place.failure())
    assert not trial.settle(place, told)
    trial.begin(place, two, told, within_s=60)
    assert not trial.settle(place, told)  # the same boot
    place.begin(Trial(release=two, previous=one, boot="another", until_s=1e12))
    assert trial.settle(place, told)
    assert place.current() == one
    assert "restarted before it was confirmed" in str(place.failure())


def test_only_one_release_is_on_trial_and_only_one_that_is_there(place: Place, tmp_path: Path, told: Told) -> None:
    one, two = add(place, tmp_path, "1.0"), add(place, tmp_path, "2.0")
    with pytest.raises(NothingInstalled):
        trial.begin(place, "3.0", told, within_s=60)
    with pytest.raises(NothingInstalled, match="no earlier release"):
        trial.back(place, told, within_s=60)
    trial.begin(place, one, told, within_s=60)
    with pytest.raises(DeviceBusy):
        trial.begin(place, two, told, within_s=60)
    (place.root / "trial.json").write_text("{")
    with pytest.raises(ReleaseInvalid):
        place.trial()


@pytest.mark.parametrize("cut_at", range(16))
def test_a_power_cut_at_any_rename_leaves_a_release_that_worked(
    place: Place, tmp_path: Path, told: Told, cut_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it the device starts again and settles; nothing that isn't confirmed is in use."""
    one, two = both(place, tmp_path, told)
    changes = 0

    class PowerCut(BaseException):
        pass

    def counted(name: str) -> None:
        original = getattr(Path, name)

        def change(self: Path, *arguments: object, **options: object) -> object:
            nonlocal changes
            if changes == cut_at:
                raise PowerCut
            changes += 1
            return original(self, *arguments, **options)

        monkeypatch.setattr(Path, name, change)

    for name in ("rename", "replace", "unlink", "symlink_to"):
        counted(name)
    confirmed = False
    try:
        trial.begin(place, two, told, within_s=60)
        trial.confirm(place, two)
        confirmed = True
    except PowerCut:
        pass
    monkeypatch.undo()
    monkeypatch.setattr(trial, "boot_id", lambda: "another")
    trial.settle(place, told)
    assert place.trial() is None
    assert place.current() in ({two} if confirmed else {one, two})
    assert (place.root / "current" / "agent" / "code").exists()


# What runs there


def test_the_installer_needs_nothing_but_python(tmp_path: Path) -> None:
    path = tmp_path / "installer.pyz"
    path.write_bytes(installer())
    assert installer() == path.read_bytes()
    root = tmp_path / "root"
    command = [sys.executable, "-I", "-S", str(path), "--root", str(root)]
    done = subprocess.run([*command, "status"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["current"] is None
    facts = subprocess.run([*command, "facts", "--broker", "127.0.0.1:1"], capture_output=True, text=True, check=True)
    assert "refused" in json.loads(facts.stdout)["broker_error"].lower()
    failed = subprocess.run([*command, "activate", "x"], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr) == (1, "kvbus: no release x here\n")


def test_units_are_what_systemd_understands(tmp_path: Path) -> None:
    for name, text in units(tmp_path, PYTHON).items():
        assert "{" not in text
        assert text.count("[Service]") == 1
        assert name.startswith("kvbus-")
    assert "PrivateDevices=yes" in units(tmp_path, PYTHON)["kvbus-agent.service"]
    assert (
        "SupplementaryGroups=video render" in units(tmp_path, PYTHON, groups=["video", "render"])["kvbus-agent.service"]
    )


def test_errors_of_releases_are_one_tree() -> None:
    assert all(issubclass(each, ReleaseError) for each in (DeviceBusy, LayerDamaged, SignatureWrong))


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_whole(path, b"1", mode=0o600)
    write_whole(path, b"2", mode=0o640)
    assert path.read_bytes() == b"2"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


def test_who_is_silent_holds_a_device_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(cli, "SILENCE_S", 0.5)
    ours, theirs = os.pipe()
    with os.fdopen(ours) as listening:
        monkeypatch.setattr(sys, "stdin", listening)
        holding = threading.Thread(target=cli.main, args=[["hold", "--who", "one"]])
        holding.start()
        for _ in range(5):
            time.sleep(0.25)
            os.write(theirs, b"\n")
            assert holding.is_alive()
        with (tmp_path / "lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holding.join(10)
        assert not holding.is_alive()
    os.close(theirs)
