"""What a device must be like is looked at before anything is sent, and each reason to refuse it is one line."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from edge_agent.release.manifest import Layer, Release
from scripts.flash.bundle import Bundle
from scripts.flash.device import device
from scripts.flash.errors import HostFailed, HostUnfit
from scripts.flash.flasher import STAGING, Flasher, Orders
from scripts.flash.host import Host

MEGA = 1_000_000


class FakeHost:
    """Answers as a Raspberry Pi with nothing installed would, but for what a test changes."""

    name = "pi@kitchen"
    local_address = "10.0.0.2"

    def __init__(self) -> None:
        self.machine, self.in_use = "aarch64", ""
        self.pythons = [("0", "/usr/bin/python3.11", "3.11")]
        self.commands: list[str] = []
        self.sent: list[str] = []
        self.held = False
        self.looks: str | None = None
        self.facts: dict[str, Any] = {
            "machine": "aarch64",
            "python": "3.11.2",
            "cores": 4,
            "root": True,
            "systemd": True,
            "free_bytes": 10_000 * MEGA,
            "staging_free_bytes": None,
            "memory_bytes": 1_000 * MEGA,
            "time_s": time.time(),
            "broker_error": "",
            "layers": [],
            "trial": None,
            "current": None,
        }

    def run(self, command: str, **_: object) -> str:
        self.commands.append(command)
        if "uname" in command and self.looks is not None:
            return self.looks
        if "uname" in command:
            found = "".join(f"python {owner} {path} {version}\n" for owner, path, version in self.pythons)
            return f"{self.machine}\nnow {self.in_use}\n{found}end\n"
        return "/home/pi" if "HOME" in command else ""

    def ask(self, command: str, **_: object) -> dict[str, Any]:
        self.commands.append(command)
        return self.facts

    def hold(self, _: str) -> None:
        self.held = True
        raise HostFailed("pi@kitchen: another flash is at work on this device")

    def send(self, source: Path, target: str, said: Callable[[int], None], **_: object) -> int:
        self.sent.append(target)
        said(source.stat().st_size)
        return source.stat().st_size


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture
def flasher(host: FakeHost, tmp_path: Path) -> Flasher:
    (tmp_path / "installer.pyz").write_bytes(b"PK")
    layers = {
        "model": Layer(sha256="a" * 64, size_bytes=180 * MEGA, unpacked_bytes=187 * MEGA),
        "agent": Layer(sha256="b" * 64, size_bytes=MEGA, unpacked_bytes=MEGA),
    }
    release = Release(version="1", protocol=1, machine="aarch64", python="3.11", layers=layers)
    bundle = Bundle(folder=tmp_path, release=release, signature=b"", public_key=b"", wheels=())
    orders = Orders(
        bundle=lambda *_: bundle,
        device=lambda address: device("kitchen", host=address, port=1883, site="home", users=None),
        here=lambda settings: settings,
        dry_run=True,
    )
    return Flasher(cast("Host", host), orders, lambda *_: None)


def test_looking_says_what_would_be_done_and_does_nothing(host: FakeHost, flasher: Flasher) -> None:
    host.facts["layers"] = ["a" * 64]
    plan = "\n".join(flasher.flash().plan)
    assert "model: is there" in plan
    assert "agent: send 1.0 MB" in plan
    assert "broker 10.0.0.2:1883" in plan
    assert not host.held
    assert [Path(target).name[:9] for target in host.sent] == ["installer"]
    (made,) = {str(Path(target).parent) for target in host.sent}
    assert host.commands[-1] == f"rm -rf {made}"  # and nothing of another's flash
    assert STAGING not in "".join(host.commands)


def test_what_was_put_there_to_look_is_taken_off_from_who_would_not_do(host: FakeHost, flasher: Flasher) -> None:
    host.facts["systemd"] = False
    with pytest.raises(HostUnfit):
        flasher.flash()
    assert host.commands[-1] == f"rm -rf {Path(host.sent[0]).parent}"


@pytest.mark.parametrize("said", ["", "aarch64", "aarch64\nnow \npython 0 /usr/local/bin/python3.12 \nend\n"])
def test_a_python_that_does_not_start_is_none(host: FakeHost, flasher: Flasher, said: str) -> None:
    """For want of a library, say, which it tells on standard error."""
    host.looks = said
    with pytest.raises(HostUnfit, match=r"no Python; kvbus needs|something unknown"):
        flasher.flash()
    host.looks = "aarch64\nnow \npython 0 /opt/x/bin/python3.13 \npython 0 /usr/bin/python3.11 3.11\nend\n"
    assert flasher.flash().plan


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"root": False}, "sudo does not make us root"),
        ({"systemd": False}, "does not run systemd"),
        ({"free_bytes": 300 * MEGA}, "300 MB of disk are free, 433 MB are needed"),
        ({"free_bytes": 200 * MEGA, "staging_free_bytes": 500 * MEGA}, "200 MB of disk are free, 252 MB are needed"),
        ({"free_bytes": 300 * MEGA, "staging_free_bytes": 90 * MEGA}, "90 MB are free where homes are, 181 MB are to"),
        ({"memory_bytes": 463 * MEGA}, "463 MB of memory; this model needs 507 MB"),
        ({"time_s": time.time() - 86_400}, "behind; `timedatectl` there says why"),
        ({"time_s": time.time() + 86_400}, "ahead; `timedatectl` there says why"),
        ({"broker_error": "Connection refused"}, "10.0.0.2:1883 can't be reached from it: Connection refused"),
    ],
)
def test_a_device_that_would_not_do_is_refused(
    host: FakeHost, flasher: Flasher, changes: dict[str, Any], said: str
) -> None:
    host.facts |= changes
    with pytest.raises(HostUnfit) as caught:
        flasher.flash()
    assert said in str(caught.value)
    assert str(caught.value).startswith("pi@kitchen: ")
    assert "\n" not in str(caught.value)
    assert not host.held


@pytest.mark.parametrize(
    ("machine", "pythons", "said"),
    [
        ("armv7l", ["3.11"], "is armv7l; kvbus needs a 64-bit system"),
        ("", ["3.11"], "something unknown"),
        ("aarch64", ["3.9"], "has 3.9; kvbus needs Python 3.11 to 3.13"),
        ("aarch64", [], "has no Python"),
    ],
)
def test_another_architecture_and_an_old_python_are_refused_before_anything_is_sent(
    host: FakeHost, flasher: Flasher, machine: str, pythons: list[str], said: str
) -> None:
    host.machine, host.pythons = machine, [("0", "/usr/bin/python3", version) for version in pythons]
    with pytest.raises(HostUnfit, match=said):
        flasher.flash()
    assert host.sent == []


@pytest.mark.parametrize(
    ("in_use", "taken"),
    [("", "/usr/bin/python3.12"), ("/usr/bin/python3.11", "/usr/bin/python3.11"), ("/gone", "/usr/bin/python3.12")],
)
def test_the_python_of_the_release_in_use_is_taken_or_the_newest_that_is_known(
    host: FakeHost, flasher: Flasher, in_use: str, taken: str
) -> None:
    """Only one that root has installed, and not in anybody's home."""
    host.in_use = in_use
    host.pythons = [
        ("0", "/usr/bin/python3.11", "3.11"),
        ("0", "/usr/bin/python3.12", "3.12"),
        ("0", "/usr/bin/python3.9", "3.9"),
        ("0", "/usr/bin/python3.14", "3.14"),
        ("1000", "/opt/mine/bin/python3.13", "3.13"),
        ("0", "/home/pi/bin/python3.13", "3.13"),
    ]
    flasher.flash()
    assert any(command.startswith(f"{taken} -I ") for command in host.commands)
