"""The command `python -m scripts.flash`: a mistake is one line, and nothing has happened."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from broker_config.settings import BrokerSettings
from scripts.flash.__main__ import app, console
from scripts.flash.errors import HostUnfit
from scripts.flash.shown import Shown, bars
from scripts.flash.sites import broker_place, here_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bundle", "--python", "3.9"], "no bundle for Python 3.9"),
        (["bundle", "--model", "/nonexistent"], "no model to put on a device"),
        (["flash", "a", "b", "--agent", "x"], "can't be several hosts"),
        (["flash", "node.lab", "node.home"], "node.lab and node.home would both be agent node"),
        (["flash", "nobody.invalid"], "no such host"),
        (["flash", "nobody.invalid", "--broker", "[fd00::1]"], "no such host"),
        (["status", "nobody.invalid"], "no such host"),
        (["logs", "nobody.invalid"], "no such host"),
        (["rollback", "nobody.invalid"], "no such host"),
        (["unflash", "nobody.invalid"], "no such host"),
        (["image", "/nonexistent", "--agent", "a", "--broker", "h:x", "--open-broker"], "is no HOST[:PORT]"),
        (["image", "/nonexistent", "--agent", "a", "--broker", "h", "--python", "2.7"], "no bundle for Python 2.7"),
        (["image", "/nonexistent", "--agent", "A!", "--broker", "h", "--open-broker"], "agent"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, tmp_path: Path, tiny_bundle: Path) -> None:
    options = {
        "flash": ["--users", f"{tmp_path}/users", "--site-key", f"{tmp_path}/k.pem", "--model", str(tiny_bundle)],
        "bundle": ["--site-key", f"{tmp_path}/k.pem", "--folder", f"{tmp_path}/b"],
        "image": ["--site-key", f"{tmp_path}/k.pem", "--users", f"{tmp_path}/users", "--model", str(tiny_bundle)],
    }.get(words[0], [])
    result = CliRunner().invoke(app, [*words, *options])
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.output.splitlines() if said in line]
    assert "Traceback" not in result.output
    assert line


def test_without_a_prepared_model_the_line_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUS_CACHE", str(tmp_path / "cache"))
    for words in (["flash", "h"], ["bundle"], ["image", str(tmp_path), "--agent", "a", "--broker", "h"]):
        keys = ["--site-key", f"{tmp_path}/k.pem", *(["--open-broker"] if words[0] != "bundle" else [])]
        result = CliRunner().invoke(app, [*words, *keys])
        assert result.exit_code == 1
        assert "has not been prepared; run `make prepare-model`" in result.output
        assert "Traceback" not in result.output
        assert isinstance(result.exception, SystemExit)


def test_what_is_said_is_not_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    said = "pi: the broker [fd00::1]:1883 can't be reached; see [/opt/kvbus]"
    console.print(said)
    with bars() as shown_bars:
        Shown(shown_bars, "pi").say(said, None)
    heard = capsys.readouterr()
    assert said in heard.out
    assert said in heard.err.replace("\n", " ")


def test_a_report_says_what_became_of_each_host(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["status", "one.invalid", "two.invalid", "--json", str(report)])
    assert result.exit_code == 1
    hosts = json.loads(report.read_text())["hosts"]
    assert [host["host"] for host in hosts] == ["one.invalid", "two.invalid"]
    assert all("no such host" in host["error"] for host in hosts)


@pytest.mark.parametrize("target", ["flash", "image", "unflash", "flash-status"])
def test_make_says_what_it_wants_to_know(target: str, tmp_path: Path) -> None:
    (tmp_path / "installed").touch()
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", target, f"STAMP={tmp_path}/installed", "-o", f"{tmp_path}/installed"],
        cwd=ROOT,
        env=alone,  # the tests themselves may be run by make
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout.startswith("say which ")
    assert "make " in done.stdout


def test_the_broker_is_where_devices_see_it() -> None:
    assert broker_place("", "10.0.0.2") == ("10.0.0.2", 1883)
    assert broker_place("hall", "10.0.0.2") == ("hall", 1883)
    assert broker_place("hall:8883", "10.0.0.2") == ("hall", 8883)
    assert broker_place("[fe80::1]:1", "x") == ("fe80::1", 1)
    assert broker_place("[fe80::1]", "x") == ("fe80::1", 1883)
    for wrong in ("h:", "h:0", "h:99999", "h:x"):
        with pytest.raises(HostUnfit):
            broker_place(wrong, "x")
    for bare in ("2001:db8::5", "fe80::1:1883", "::1"):  # no port follows where nothing sets it apart
        assert broker_place(bare, "x") == (bare, 1883)
    for ours in ("127.0.0.1", "fe80::7"):
        with pytest.raises(HostUnfit, match="BROKER="):
            broker_place("", ours)


def test_who_asks_for_a_proof_has_a_user_of_its_own(tmp_path: Path) -> None:
    there = BrokerSettings(host="10.0.0.2", port=7, username="kitchen", password_file="/opt/p")  # noqa: S106
    asking = here_of(tmp_path / "users", "")
    assert not (tmp_path / "users").exists()  # not before somebody asks
    here = asking(there)
    assert (here.host, here.port, here.username) == ("10.0.0.2", 7, "flash")
    assert here.password() == here_of(tmp_path / "users", "localhost:9")(there).password()
    assert here_of(None, "localhost:9")(there) == BrokerSettings(host="localhost", port=9)
    assert here_of(None, "")(BrokerSettings(host="2001:db8::5")).host == "2001:db8::5"
    (tmp_path / "flash.password").unlink()
    with pytest.raises(HostUnfit, match="its password is not in"):
        asking(there)


def test_help_is_there_for_every_command() -> None:
    for words in ([], ["bundle"], ["flash"], ["image"], ["status"], ["logs"], ["rollback"], ["unflash"]):
        result = CliRunner().invoke(app, [*words, "--help"])
        assert result.exit_code == 0
        assert "Usage: " in result.output
