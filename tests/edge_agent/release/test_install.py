"""An installation from archives to a release that starts; what fails leaves what the next attempt can mend."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.release import cli, install, system
from edge_agent.release.errors import DeviceBusy, SignatureWrong, SystemFailed
from edge_agent.release.manifest import Release
from edge_agent.release.place import CONFIGURATION, MANIFEST, PUBLIC_KEY, SIGNATURE, Place
from scripts.flash.archive import write_layer

GOOD, BAD = b"def app(): print('whole')\n", b"raise SystemExit('edge-agent: damaged')\n"


@dataclass
class Sent:
    """A folder as a laptop has filled it."""

    folder: Path
    key: Ed25519PrivateKey

    def release(self, code: bytes, version: str = "1.0") -> Release:
        """Put it there."""
        layers = {
            "runtime": write_layer(self.folder, {"package.py": b"x = 1\n"}, compress=True),
            "agent": write_layer(
                self.folder, {"edge_agent/__init__.py": b"", "edge_agent/cli.py": code}, compress=True
            ),
        }
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        made = Release(version=version, protocol=1, machine=platform.machine(), python=python, layers=layers)
        self.sign(made, self.key)
        (self.folder / CONFIGURATION).write_text('agent = "a"\n')
        return made

    def sign(self, release: Release, key: Ed25519PrivateKey) -> None:
        """By this key."""
        (self.folder / MANIFEST).write_bytes(release.to_bytes())
        (self.folder / SIGNATURE).write_bytes(key.sign(release.to_bytes()))
        (self.folder / PUBLIC_KEY).write_bytes(key.public_key().public_bytes_raw())


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sent:
    """On a machine that does all that systemd is asked for."""
    monkeypatch.setattr(system, "make_user", os.getegid)
    monkeypatch.setattr(system, "install_units", lambda *_, **__: None)
    monkeypatch.setattr(system, "SystemdService", Idle)
    monkeypatch.setattr(cli, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "installer.pyz")])
    (tmp_path / "installer.pyz").write_bytes(b"PK")
    folder = tmp_path / "sent"
    folder.mkdir()
    return Sent(folder, Ed25519PrivateKey.generate())


class Idle:
    """A service that does what it is told."""

    def watch_trial(self) -> None: ...

    def restart(self) -> None: ...

    def stop(self) -> None: ...


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "kvbus")


def put(place: Place, sent: Sent) -> str:
    package = install.Package(folder=sent.folder)
    return install.install(place, package, Path(sys.executable), lambda *_: None)


def run(place: Place, *words: str) -> int:
    return cli.main(["--root", str(place.root), *words])


def test_a_release_is_installed_and_its_agent_starts(place: Place, sent: Sent) -> None:
    sent.release(GOOD)
    name = put(place, sent)
    assert place.names() == (name,)
    assert place.current() is None  # a trial is another step
    assert place.key.read_bytes() == sent.key.public_key().public_bytes_raw()
    assert put(place, sent) == name


def test_what_does_not_start_is_taken_off_and_sent_again(
    place: Place, sent: Sent, capfd: pytest.CaptureFixture[str]
) -> None:
    sent.release(GOOD)
    first = put(place, sent)
    place.use("current", first)
    kept = {path.name for path in place.store.iterdir()}
    broken = sent.release(BAD, "2.0")
    with pytest.raises(SystemFailed, match="edge-agent: damaged"):
        put(place, sent)
    assert place.names() == (first,)
    assert {path.name for path in place.store.iterdir()} == kept
    assert broken.layers["agent"].sha256 not in kept
    assert run(place, "status") == 0
    assert first in capfd.readouterr().out


def test_a_first_installation_that_fails_can_be_asked_about_and_taken_off(place: Place, sent: Sent) -> None:
    sent.release(BAD)
    with pytest.raises(SystemFailed, match="edge-agent: damaged"):
        put(place, sent)
    assert place.installer.exists()
    assert place.current() is None
    sent.release(GOOD, "2.0")
    assert put(place, sent) in place.names()


def test_an_archive_that_was_damaged_on_its_way_is_not_kept(
    place: Place, sent: Sent, capfd: pytest.CaptureFixture[str]
) -> None:
    layer = sent.release(GOOD).layers["agent"]
    path = sent.folder / layer.file_name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert run(place, "install", "--package", str(sent.folder)) == 1
    assert "its digest is another" in capfd.readouterr().err
    assert not path.exists()
    assert (sent.folder / MANIFEST).exists()
    path.write_bytes(content)
    assert run(place, "install", "--package", str(sent.folder)) == 0


def test_a_device_takes_nothing_that_its_site_has_not_signed(place: Place, sent: Sent) -> None:
    sent.release(GOOD)
    name = put(place, sent)
    place.use("current", name)
    other = sent.release(GOOD, "2.0")
    sent.sign(other, Ed25519PrivateKey.generate())
    with pytest.raises(SignatureWrong, match="not signed by the site"):
        put(place, sent)
    assert place.names() == (name,)


def test_a_card_installs_alone_and_at_once(place: Place, sent: Sent, capfd: pytest.CaptureFixture[str]) -> None:
    sent.release(GOOD)
    words = ("install", "--keep", "--package", str(sent.folder))
    with cli._held("ada@laptop"):
        assert run(place, *words) == 1
    assert "another flash is at work on this device, from ada@laptop" in capfd.readouterr().err
    assert place.current() is None
    assert run(place, *words) == 0
    name = place.current()
    assert name in place.names()
    assert place.trial() is None
    assert run(place, *words) == 0  # its power went before it had taken its package away
    assert place.current() == name
    with cli._held("one"), pytest.raises(DeviceBusy), cli._held("two"):
        pass


def test_what_the_system_refuses_is_one_line(
    place: Place, sent: Sent, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent.release(GOOD)

    def refused(*_: object) -> None:
        raise OSError(28, "No space left on device", "/opt/kvbus")

    monkeypatch.setattr(install, "write_whole", refused)
    assert run(place, "install", "--package", str(sent.folder)) == 1
    assert capfd.readouterr().err == "kvbus: /opt/kvbus: No space left on device\n"
