"""Cards are customised without touching what their owner has set, and read back; what is no such card is left alone."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from edge_agent.release.manifest import Layer, Release
from edge_agent.release.place import MANIFEST
from scripts.flash import media
from scripts.flash.bundle import Bundle
from scripts.flash.card import KEPT, ROOT_FOLDER, UNIT, USER_DATA, customise
from scripts.flash.device import Device, device
from scripts.flash.errors import CardRefused
from scripts.flash.media import ExtImage, FatImage, Folder, partitions, read_back

TOOLS = ("mformat", "mcopy", "sfdisk", "mkfs.ext4", "debugfs", "e2fsck")
IMAGER = """#cloud-config
hostname: kitchen
users:
- name: pi
  ssh_authorized_keys: ["ssh-ed25519 AAAA me"]
runcmd:
- [ rfkill, unblock, wifi ]
"""
MEBI = 1 << 20


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """One of a single small layer."""
    folder = tmp_path / "bundle"
    (folder / "layers").mkdir(parents=True)
    content = b"a layer" * 10_000
    digest = hashlib.sha256(content).hexdigest()
    (folder / "layers" / f"{digest}.layer").write_bytes(content)
    (folder / "installer.pyz").write_bytes(b"PK")
    layer = Layer(sha256=digest, size_bytes=len(content), unpacked_bytes=1)
    release = Release(version="1", protocol=1, machine="aarch64", python="3.13", layers={"agent": layer})
    return Bundle(folder=folder, release=release, signature=b"s", public_key=b"k", wheels=())


@pytest.fixture
def own(tmp_path: Path) -> Device:
    return device("kitchen", host="10.0.0.2", port=1883, site="home", users=tmp_path / "users")


@pytest.fixture
def card(tmp_path: Path) -> Path:
    """A mounted boot partition, as Imager leaves it."""
    folder = tmp_path / "bootfs"
    folder.mkdir()
    (folder / "config.txt").write_text("arm_64bit=1\n")
    (folder / "cmdline.txt").write_text("root=PARTUUID=1 ds=nocloud;i=1\n")
    (folder / USER_DATA).write_text(IMAGER)
    (folder / "meta-data").write_text("instance-id: rpi\n")
    return folder


def test_what_the_owner_has_set_stays_and_one_command_comes(card: Path, bundle: Bundle, own: Device) -> None:
    made = customise(card, bundle, own)
    text = (card / USER_DATA).read_text()
    assert text.startswith("#cloud-config\n")
    expected = yaml.safe_load(IMAGER)
    expected["bootcmd"] = ["test ! -e /boot/firmware/kvbus/begin.sh || sh /boot/firmware/kvbus/begin.sh"]
    assert yaml.safe_load(text) == expected
    assert (card / KEPT).read_text() == IMAGER
    assert (card / "meta-data").read_text() == "instance-id: rpi\n"
    assert (card / "kvbus" / "agent.toml").read_bytes() == own.own()["agent.toml"]
    assert {path.suffix for path in (card / "kvbus").iterdir()} >= {".layer", ".pyz", ".sh", ".toml"}
    assert "Raspberry Pi OS" in made.system
    customise(card, bundle, own)
    assert (card / USER_DATA).read_text() == text
    assert (card / KEPT).read_text() == IMAGER


def test_a_card_without_settings_of_its_owners_gets_them(card: Path, bundle: Bundle, own: Device) -> None:
    (card / USER_DATA).write_text("#cloud-config\n# nothing yet\n")
    customise(card, bundle, own)
    assert yaml.safe_load((card / USER_DATA).read_text())["bootcmd"]
    (card / USER_DATA).unlink()
    customise(card, bundle, own)
    assert yaml.safe_load((card / USER_DATA).read_text())["bootcmd"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("#!/bin/sh\necho hello\n", "no cloud-config"),
        ("#cloud-config\n[1, 2]\n", "no cloud-config"),
        ("#cloud-config\nbootcmd: reboot\n", "bootcmd is no list"),
        ("#cloud-config\n{\n", "can't be read"),
    ],
)
def test_settings_that_can_not_be_added_to_are_left_alone(
    card: Path, bundle: Bundle, own: Device, content: str, said: str
) -> None:
    (card / USER_DATA).write_text(content)
    with pytest.raises(CardRefused, match=said):
        customise(card, bundle, own)
    assert (card / USER_DATA).read_text() == content
    assert not (card / "kvbus").exists()


def test_what_is_no_card_is_refused(tmp_path: Path, card: Path, bundle: Bundle, own: Device) -> None:
    for name in (USER_DATA, "meta-data"):
        (card / name).unlink()
    with pytest.raises(CardRefused, match="no cloud-init"):
        customise(card, bundle, own)
    with pytest.raises(CardRefused, match="no boot partition of Raspberry Pi OS"):
        customise(tmp_path, bundle, own)
    with pytest.raises(CardRefused, match="neither a folder"):
        customise(tmp_path / "none", bundle, own)
    (tmp_path / "notes.img").write_text("no image")
    with pytest.raises(CardRefused, match="holds no boot partition"):
        customise(tmp_path / "notes.img", bundle, own)


def test_a_card_that_forgets_is_noticed(
    card: Path, bundle: Bundle, own: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(self: Folder, name: str) -> bytes | None:
        found = (self.path / name).read_bytes() if (self.path / name).exists() else None
        return found[:-1] if found and name.endswith(".layer") else found

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", forgetful)
        with pytest.raises(CardRefused, match="reads otherwise"):
            customise(card, bundle, own)


# Images


def needs_tools() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool, path="/usr/sbin:/sbin:/usr/bin:/bin") is None]
    if missing:
        pytest.skip(f"not installed: {' '.join(missing)} (apt-get install mtools fdisk e2fsprogs)")


def run(*command: object, text: str | None = None) -> str:
    environment = os.environ | {"PATH": f"{os.environ['PATH']}:{media.ADMINISTRATORS}"}
    words = [str(word) for word in command]
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=True, env=environment)
    return done.stdout


@pytest.fixture
def raspberry(tmp_path: Path, card: Path) -> Path:
    """An image with a table of DOS's kind, a FAT boot partition and an ext4 root."""
    needs_tools()
    path = tmp_path / "raspios.img"
    with path.open("wb") as file:
        file.truncate(64 * MEBI)
    run("sfdisk", "--quiet", path, text="label: dos\nstart=2048, size=40960, type=c\nstart=43008, type=83\n")
    where = f"{path}@@{2048 * 512}"
    run("mformat", "-i", where, "-T", 40960, "-h", 64, "-s", 32, "::")
    for each in card.iterdir():
        run("mcopy", "-i", where, each, f"::/{each.name}")
    return path


def test_an_image_of_raspberry_pi_os_is_customised_in_its_boot_partition(
    raspberry: Path, bundle: Bundle, own: Device, tmp_path: Path
) -> None:
    (found,) = partitions(raspberry)
    assert isinstance(found, FatImage)
    customise(raspberry, bundle, own)
    where = f"{raspberry}@@{found.offset}"
    assert "begin.sh" in run("mtype", "-i", where, f"::/{USER_DATA}")
    run("mcopy", "-i", where, "-s", "::/kvbus", tmp_path / "out")
    assert (tmp_path / "out" / "password").read_bytes() == own.own()["password"]
    assert found.read(KEPT) == IMAGER.encode()
    assert found.read("none") is None
    customise(raspberry, bundle, own)


def test_a_card_that_is_full_is_one_line(raspberry: Path, bundle: Bundle, own: Device, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"x" * 19 * MEBI)
    run("mcopy", "-i", f"{raspberry}@@{2048 * 512}", big, "::/big")
    (layer,) = (bundle.folder / "layers").iterdir()
    content = b"y" * 4 * MEBI
    digest = hashlib.sha256(content).hexdigest()
    layer.rename(layer.with_name(f"{digest}.layer")).write_bytes(content)
    bundle.release.layers["agent"] = Layer(sha256=digest, size_bytes=len(content), unpacked_bytes=1)  # type: ignore[index]
    with pytest.raises(CardRefused) as caught:
        customise(raspberry, bundle, own)
    assert "\n" not in str(caught.value)


def test_a_root_file_system_gets_a_unit_that_runs_once(tmp_path: Path, bundle: Bundle, own: Device) -> None:
    """As JetPack's image has it: a table of GPT's kind, the root first."""
    needs_tools()
    root, path = tmp_path / "root", tmp_path / "jetson.img"
    (root / "etc/systemd/system/multi-user.target.wants").mkdir(parents=True)
    (root / "etc/os-release").write_text('NAME="Ubuntu"\n')
    (root / "opt").mkdir()
    with path.open("wb") as file:
        file.truncate(64 * MEBI)
    run("sfdisk", "--quiet", path, text="label: gpt\nstart=2048, name=APP\n")
    run("mkfs.ext4", "-q", "-F", "-d", root, "-E", f"offset={2048 * 512}", path, "60M")
    (found,) = partitions(path)
    assert isinstance(found, ExtImage)
    assert "systemd" in customise(path, bundle, own).system
    where = f"{path}?offset={found.offset}"
    wants = f"/etc/systemd/system/multi-user.target.wants/{UNIT}"
    assert f"/etc/systemd/system/{UNIT}" in run("debugfs", "-R", f"stat {wants}", where)
    said = run("debugfs", "-R", f"stat /{ROOT_FOLDER}/password", where)
    assert "Mode:  0600" in said
    assert "User:     0" in said
    assert found.read(f"{ROOT_FOLDER}/agent.toml") == own.own()["agent.toml"]
    found.check()
    customise(path, bundle, own)
    read_back(found, {f"{ROOT_FOLDER}/password": own.own()["password"]})


def test_tools_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(media, "ADMINISTRATORS", "")
    with pytest.raises(CardRefused, match="mtools"):
        media.FatImage(tmp_path / "x.img", 0).read("a")


def test_the_first_start_installs_once_and_says_why_it_could_not(
    card: Path, bundle: Bundle, own: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    customise(card, bundle, own)
    script = card / "kvbus" / "first-start.sh"
    (tmp_path / "bin").mkdir()
    for tool in ("dirname", "tee", "tail", "rm", "sh", "cat", "sync"):
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    failed = subprocess.run(["sh", str(script)], capture_output=True, text=True, check=False)
    assert (failed.returncode, (card / "kvbus" / "failed.txt").read_text()) == (1, "no Python 3.13 on this device\n")
    python = tmp_path / "bin" / "python3.13"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/ran\necho kvbus: no room >&2\nexit $(cat {tmp_path}/code)\n')
    python.chmod(0o755)
    (tmp_path / "code").write_text("1")
    assert subprocess.run(["sh", str(script)], capture_output=True, check=False).returncode == 1
    assert (card / "kvbus" / "failed.txt").read_text() == "kvbus: no room\n"
    assert script.exists()  # it tries again at the next start
    (tmp_path / "code").write_text("0")
    assert subprocess.run(["sh", str(script)], capture_output=True, check=False).returncode == 0
    assert "install --keep --package" in (tmp_path / "ran").read_text()
    assert not (card / "kvbus").exists()
    customise(card, bundle, own)
    (card / "kvbus" / MANIFEST).unlink()  # as a power cut leaves it while it is being cleared up
    (tmp_path / "ran").unlink()
    assert subprocess.run(["sh", str(script)], capture_output=True, check=False).returncode == 0
    assert not (card / "kvbus").exists()
    assert not (tmp_path / "ran").exists()
