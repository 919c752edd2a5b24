"""The command `edge-agent`: help that a newcomer can follow, and one line for every mistake of theirs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from broker_config.settings import load_toml
from edge_agent.settings import AgentSettings

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "edge_agent.cli"]
ENVIRONMENT = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


def edge_agent(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )


def printed(*arguments: str) -> str:
    """What a command that succeeds prints, as one line of words."""
    done = edge_agent(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return " ".join(done.stdout.split())


@pytest.fixture
def configuration(tiny_bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration over a copy of the tiny bundle; the port is one that nobody listens on."""

    def write(extra: str = "", *, bundle: str | None = None, agent: str = "pi-1") -> Path:
        own = tmp_path / "bundle"
        if not own.exists():
            shutil.copytree(tiny_bundle, own)
        path = tmp_path / "agent.toml"
        path.write_text(
            f'agent = "{agent}"\nbundle = "{bundle or own}"\n{extra}\n' + ("" if "[broker]" in extra else "[broker]\n")
        )
        return path

    return write


def test_the_help_says_what_it_is_and_how_to_begin() -> None:
    text = printed("--help")
    assert "exchanges KV caches with other agents over MQTT" in text
    for step in ("make prepare-model", "edge-agent config > agent.toml", "edge-agent run agent.toml"):
        assert step in text
    for command in ("run", "config", "check", "bundle"):
        assert re.search(rf"\b{command}\b", text)


def test_without_a_command_the_help_is_shown() -> None:
    done = edge_agent()
    assert "edge-agent config > agent.toml" in " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run", ["until it is stopped", "Ctrl-C", "edge-agent config", "--log", "--plain", "--json"]),
        ("config", ["commented configuration", "unit", "default"]),
        ("check", ["every byte", "without starting anything", "TOML file"]),
        ("bundle", ["what a model bundle holds", "JSON", "Directory"]),
    ],
)
def test_the_help_of_a_command_says_what_it_does(command: str, words: list[str]) -> None:
    text = printed(command, "--help")
    for word in words:
        assert word in text


def test_the_printed_configuration_is_read_back_once_its_required_fields_are_filled(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    text = edge_agent("config").stdout
    required = re.findall(r"^#(\w+) = +\(required\)$", text, flags=re.MULTILINE)
    assert required == ["agent", "bundle"]
    for field, value in zip(required, ("pi-1", str(tiny_bundle)), strict=True):
        text = re.sub(rf"^#{field} = .*$", f"{field} = {json.dumps(value)}", text, flags=re.MULTILINE)
    path = tmp_path / "agent.toml"
    path.write_text(text)
    assert load_toml(path, AgentSettings) == AgentSettings(agent="pi-1", bundle=str(tiny_bundle))


def test_every_field_of_the_printed_configuration_has_a_title() -> None:
    lines = edge_agent("config").stdout.splitlines()
    fields = [number for number, line in enumerate(lines) if re.match(r"#\w+ =", line)]
    assert len(fields) > 15
    for number in fields:
        assert re.match(r"# \S.{3,}", lines[number - 1]), lines[number]


def test_a_good_configuration_is_checked_without_starting_anything(configuration: Callable[..., Path]) -> None:
    text = printed("check", str(configuration()))
    assert "agent pi-1 of site home, broker 127.0.0.1:1883" in text
    assert "fingerprint" in text
    assert "whole" in text
    assert "ladder: float32, " in text


def test_a_bundle_is_printed_as_json(tiny_bundle: Path) -> None:
    done = edge_agent("bundle", str(tiny_bundle))
    assert done.returncode == 0
    assert json.loads(done.stdout)["kv_heads"] == 2


def _misspelt(path: Path) -> str:
    path.write_text(path.read_text() + "keepalive = 4\n")
    return "unknown field broker.keepalive; did you mean broker.keepalive_s?"


def _wrong_type(path: Path) -> str:
    path.write_text(path.read_text() + 'port = "many"\n')
    return "broker.port: expected `int`, got `str`"


def _out_of_range(path: Path) -> str:
    path.write_text(path.read_text() + "port = 70000\n")
    return "broker.port: expected `int` <= 65535"


def _no_agent(path: Path) -> str:
    path.write_text(path.read_text().replace("agent =", "# agent ="))
    return "missing field agent"


def _bad_agent_id(path: Path) -> str:
    path.write_text(path.read_text().replace("pi-1", "Pi 1"))
    return "agent: expected `str` matching regex"


def _no_toml(path: Path) -> str:
    path.write_text("agent = pi-1")
    return "no valid TOML"


def _no_file(path: Path) -> str:
    path.unlink()
    return "No such file or directory"


def _no_bundle(path: Path) -> str:
    shutil.rmtree(path.parent / "bundle")
    return "manifest.json is missing; run `make prepare-model`"


def _truncated_bundle(path: Path) -> str:
    model = path.parent / "bundle" / "model.onnx"
    model.write_bytes(model.read_bytes()[:1_000])
    return "is truncated: model.onnx has 1000 bytes of"


def _no_password_file(path: Path) -> str:
    path.write_text(path.read_text() + f'username = "pi-1"\npassword_file = "{path.parent / "password"}"\n')
    return "can't read password_file"


MISTAKES = (
    _misspelt,
    _wrong_type,
    _out_of_range,
    _no_agent,
    _bad_agent_id,
    _no_toml,
    _no_file,
    _no_bundle,
    _truncated_bundle,
    _no_password_file,
)


@pytest.mark.parametrize(
    ("command", "spoil"),
    [("check", spoil) for spoil in MISTAKES]
    + [("run", spoil) for spoil in (_misspelt, _no_bundle, _truncated_bundle, _no_password_file)],
)
def test_a_mistake_is_one_line_on_standard_error(
    configuration: Callable[..., Path], command: str, spoil: Callable[[Path], str]
) -> None:
    path = configuration()
    line = spoil(path)
    done = edge_agent(command, str(path), *(["--log", "warning"] if command == "run" else []))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("edge-agent: ")
    assert done.stderr.count("\n") == 1
    assert line in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_bundle_is_found_by_check(configuration: Callable[..., Path]) -> None:
    path = configuration()
    model = path.parent / "bundle" / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(bytes(data))
    done = edge_agent("check", str(path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("model.onnx is damaged; prepare it again\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_agent_without_a_broker_waits_for_it_and_stops_when_told(
    configuration: Callable[..., Path], number: signal.Signals
) -> None:
    path = configuration("[broker]\nport = 1\nbackoff_cap_s = 0.1\n")
    with subprocess.Popen(
        [*COMMAND, "run", str(path), "--json"], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stderr is not None
        lines = []
        for line in running.stderr:
            lines.append(json.loads(line))
            if "127.0.0.1:1" in lines[-1]["message"]:
                break
        running.send_signal(number)
        rest = running.stderr.read()
        assert running.wait(timeout=20) == 0
    assert any(entry["message"].startswith("ready: prefill") for entry in lines)
    assert "Traceback" not in rest
    assert all(json.loads(line)["level"] in {"info", "warning", "error"} for line in rest.splitlines())
