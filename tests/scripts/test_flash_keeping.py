"""Looking after devices: also one on which a first flash has left something, but nothing that runs."""

from __future__ import annotations

from typing import Any, cast

import pytest

from scripts.flash.errors import HostFailed
from scripts.flash.host import Host
from scripts.flash.keeping import Keeper


class FakeHost:
    """Has an installer, and answers with these facts."""

    name = "pi@kitchen"

    def __init__(self, **facts: object) -> None:
        self.installed = True
        self.busy = False
        self.done: list[str] = []
        self.facts: dict[str, Any] = {
            "current": "2.0",
            "previous": "1.0",
            "trial": None,
            "failure": None,
            "service": {"ActiveState": "active", "NRestarts": "0", "StatusText": "at the broker"},
            **facts,
        }

    def run(self, command: str, **_: object) -> str:
        if command.startswith("test -e"):
            return "yes\n" if self.installed else ""
        self.done.append(command.rpartition("installer ")[2])
        return ""

    def insist(self, command: str, **_: object) -> str:
        return self.run(command)

    def ask(self, command: str, **_: object) -> dict[str, Any]:
        if command.endswith(" back"):
            self.done.append("back")
            return {"release": "1.0"}
        return self.facts

    def hold(self, command: str) -> None:
        if self.busy:
            raise HostFailed("pi@kitchen: another flash is at work on this device")
        self.done.append(command.rpartition("installer ")[2].partition(" ")[0])


def keeper(host: FakeHost) -> Keeper:
    return Keeper(cast("Host", host))


def test_a_device_says_what_it_runs_and_what_has_failed() -> None:
    assert keeper(FakeHost()).status().text == "2.0: at the broker; before: 1.0"
    strained = FakeHost(
        failure="3.0 is not in use: no answer", trial="2.0", service={"ActiveState": "activating", "NRestarts": "4"}
    )
    assert keeper(strained).status().text == (
        "2.0: activating; restarted 4 times; on trial; before: 1.0; last failure: 3.0 is not in use: no answer"
    )


def test_what_a_first_flash_has_left_is_seen_and_taken_off() -> None:
    host = FakeHost(current=None, previous=None, failure="1.0 is not in use: no answer", service={})
    assert keeper(host).status().text == "no release is in use; last failure: 1.0 is not in use: no answer"
    assert keeper(host).remove(state=True).text == "kvbus is off it"
    assert host.done == ["hold", "remove --state", 'rm -rf "$HOME/.cache/kvbus-flash"']  # which had its password
    host.installed = False
    for work in (keeper(host).status, keeper(host).back, lambda: keeper(host).remove(state=False)):
        with pytest.raises(HostFailed, match="nothing of kvbus is installed there"):
            work()


def test_going_back_is_kept_when_the_service_is_up() -> None:
    host = FakeHost()
    assert keeper(host).back().text == "1.0 runs again"
    assert host.done == ["hold", "back", "confirm 1.0"]


def test_nothing_is_changed_while_another_flash_is_at_work() -> None:
    host = FakeHost()
    host.busy = True
    for work in (keeper(host).back, lambda: keeper(host).remove(state=False)):
        with pytest.raises(HostFailed, match="another flash is at work"):
            work()
    assert host.done == []
