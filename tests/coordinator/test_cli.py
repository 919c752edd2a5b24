"""The command `coordinator`: help that explains, mistakes that are one line, files that are safe."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from broker_config.messages import Ask, Message, RoundReport
from broker_config.settings import load_toml
from broker_config.users import verify
from coordinator import cli, client
from coordinator.errors import CoordinatorError, RequestImpossible
from coordinator.settings import CoordinatorSettings
from scripts.demo.processes import free_port
from tests.coordinator.builders import instance

COMMANDS = (
    "run",
    "ask",
    "status",
    "give",
    "remove",
    "broker",
    "mosquitto-config",
    "add-agent",
    "remove-agent",
    "config",
)
WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
PROCESS_S = 30.0


def call(*arguments: str | Path) -> Result:
    """The command in this process."""
    return CliRunner(env=WIDE).invoke(cli.app, [str(argument) for argument in arguments])


def words(text: str) -> str:
    """Without the frames and line breaks of a help page."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def refused(result: Result) -> str:
    """The one line of a mistake, which is all there is."""
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("coordinator: ")
    return line


@contextmanager
def process(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The command as a process of its own, ended whatever happens."""
    command = [sys.executable, "-m", "coordinator.cli", *(str(argument) for argument in arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test waits for a broker that is not there, or touches the home of who runs it or the logs of other tests."""
    monkeypatch.setattr(client, "CONNECT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(cli, "_set_up_logs", lambda: None)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def nobody(tmp_path: Path) -> Path:
    """A configuration whose broker is not there."""
    path = tmp_path / "coordinator.toml"
    path.write_text(f'state_folder = "{tmp_path}/state"\n[broker]\nport = {free_port()}\n')
    return path


def test_the_help_names_every_command_and_how_to_begin() -> None:
    shown = words(call("--help").output)
    assert all(re.search(rf"\b{command}\b", shown) for command in COMMANDS)
    assert 'coordinator ask "…" --from pi-1 --to jetson-1' in shown
    assert call().output.startswith(call("--help").output[:40])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_says_what_it_does_and_what_everything_it_takes_is(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    described: Any = get_command(cli.app)
    own = described.commands[command]
    assert len(own.help.split()) >= 5
    for parameter in own.params:
        assert parameter.help, f"{parameter.name} of {command} is not explained"
        assert words(parameter.help.split(";")[0])[:30] in words(result.output)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("ask", "Seconds to the first answer token"),
        ("ask", "in nats"),
        ("ask", "Longest answer, in tokens"),
        ("ask", "whatever its loss"),
        ("ask", "Tokens of facts"),
        ("ask", "pi-1,pi-2"),
        ("broker", "TCP port"),
        ("broker", "beyond loopback only with users"),
        ("mosquitto-config", "mosquitto -c kvbus.conf"),
        ("config", "every field, its unit and its default"),
        ("run", "Ctrl-C or SIGTERM"),
    ],
)
def test_the_help_names_units_and_conditions(command: str, said: str) -> None:
    assert said in words(call(command, "--help").output)


def test_the_printed_configuration_is_the_defaults_with_a_title_and_a_unit_each(tmp_path: Path) -> None:
    printed = call("config")
    path = tmp_path / "coordinator.toml"
    path.write_text(printed.stdout)
    assert load_toml(path, CoordinatorSettings) == CoordinatorSettings()
    assert "# a question that is not answered by then ends expired [s]" in printed.stdout
    for line, after in zip(printed.stdout.splitlines(), printed.stdout.splitlines()[1:], strict=False):
        if re.match(r"#\w+ =", after):
            assert line.startswith("# ")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('sitte = "home"\n', "unknown field sitte; did you mean site?"),
        (
            "[planning]\nround_timeout = 3\n",
            "unknown field planning.round_timeout; did you mean planning.round_timeout_s?",
        ),
        ("[planning]\nround_timeout_s = -1\n", "planning.round_timeout_s: expected `float` > 0.0"),
        ("[planning\n", "no valid TOML"),
    ],
)
@pytest.mark.parametrize("command", [("run",), ("status",), ("ask", "Which?", "--from", "a", "--to", "b")])
def test_a_mistake_in_the_configuration_is_one_line_with_file_and_field(
    tmp_path: Path, command: tuple[str, ...], content: str, line: str
) -> None:
    path = tmp_path / "mistaken.toml"
    path.write_text(content)
    told = refused(call(*command, "--config", path))
    assert str(path) in told
    assert line in told


def test_a_configuration_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert "No such file" in refused(call("status", "-c", tmp_path / "none.toml"))


def test_a_policy_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text('[planning]\npolicy = "best"\n')
    with process("run", "-c", path) as running:
        out, err = running.communicate(timeout=PROCESS_S)
    assert (running.returncode, out) == (1, "")
    assert err == "coordinator: no policy is called best: choose one of jmsra, kv, optimum, token\n"


@pytest.mark.parametrize(
    "command",
    [("ask", "Which valve?", "--from", "pi-1", "--to", "jetson-1"), ("status",), ("remove", "pi-1", "report")],
)
def test_without_a_broker_there_is_one_line_with_its_address(nobody: Path, command: tuple[str, ...]) -> None:
    line = refused(call(*command, "--config", nobody))
    assert re.fullmatch(r"coordinator: no MQTT broker at 127\.0\.0\.1:\d+: connection refused", line)


def test_a_file_that_cannot_be_given_is_one_line(tmp_path: Path, nobody: Path) -> None:
    binary = tmp_path / "photo.txt"
    binary.write_bytes(b"\xff\xd8\xff")
    assert "photo.txt: not UTF-8 text" in refused(call("give", "pi-1", binary, "-c", nobody))
    assert "none.txt: No such file or directory" in refused(call("give", "pi-1", tmp_path / "none.txt", "-c", nobody))


def test_a_state_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "coordinator.toml"
    path.write_text(f'state_folder = "{tmp_path}/file/state"\n')
    with process("run", "-c", path) as running:
        _, err = running.communicate(timeout=PROCESS_S)
    assert running.returncode == 1
    assert re.fullmatch(r"coordinator: journal \S+ can't be read: Not a directory\n", err)


@pytest.mark.parametrize("command", ["broker", "mosquitto-config"])
def test_a_broker_beyond_loopback_without_users_is_refused_and_the_line_says_how_to_make_one(command: str) -> None:
    with process(command, "--host", "0.0.0.0", "--port", str(free_port())) as running:  # noqa: S104
        out, err = running.communicate(timeout=PROCESS_S)
    assert (running.returncode, out) == (1, "")
    assert err == (
        "coordinator: a broker on 0.0.0.0 is open to other machines and has no users; "
        "run `coordinator add-agent NAME` first\n"
    )


def test_what_that_line_says_is_enough(tmp_path: Path) -> None:
    assert call("add-agent", "pi-1").exit_code == 0
    printed = call("mosquitto-config", "--host", "0.0.0.0")  # noqa: S104
    assert printed.exit_code == 0, printed.output
    assert f"password_file {tmp_path}/.config/kvbus/users" in printed.stdout
    assert "allow_anonymous false" in printed.stdout


@pytest.mark.parametrize("command", ["broker", "mosquitto-config"])
def test_a_users_file_that_was_named_and_holds_nobody_is_not_taken_for_an_open_broker(
    tmp_path: Path, command: str
) -> None:
    with process(command, "--users", tmp_path / "userz", "--port", str(free_port())) as running:
        out, err = running.communicate(timeout=PROCESS_S)
    assert (running.returncode, out) == (1, "")
    assert err.startswith(f"coordinator: {tmp_path}/userz holds no users; run `coordinator add-agent NAME --users")
    assert err.count("\n") == 1


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with process("broker", "--port", str(port)) as running:
            out, err = running.communicate(timeout=PROCESS_S)
    assert (running.returncode, out) == (1, "")
    assert err == (
        f"coordinator: port {port} on 127.0.0.1 is in use: another broker? Stop it, or choose another port\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_broker_stops_in_good_order(number: signal.Signals) -> None:
    with process("broker", "--port", str(free_port())) as running:
        assert running.stderr is not None
        assert "broker listens" in running.stderr.readline()
        running.send_signal(number)
        out, err = running.communicate(timeout=PROCESS_S)
    assert (running.returncode, out) == (0, "")
    assert "Traceback" not in err


def test_a_program_outlives_the_disk_that_its_log_goes_to(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "coordinator.cli", "broker", "--port", str(port)]
    with Path("/dev/full").open("w") as full, subprocess.Popen(command, stderr=full) as running:
        try:
            until_s = time.monotonic() + PROCESS_S
            while running.poll() is None and time.monotonic() < until_s:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
                    break
                time.sleep(0.02)
            with pytest.raises(subprocess.TimeoutExpired):
                running.wait(0.5)
        finally:
            running.kill()


def test_a_coordinator_without_a_broker_says_so_and_can_be_stopped(nobody: Path) -> None:
    with process("run", "-c", nobody) as running:
        assert running.stderr is not None
        assert "no MQTT broker at 127.0.0.1:" in running.stderr.readline()
        running.send_signal(signal.SIGTERM)
        out, err = running.communicate(timeout=3.0)
    assert (running.returncode, out) == (0, "")
    assert "Traceback" not in err


def test_a_new_agent_gets_a_password_that_the_users_file_knows_and_nobody_else_can_read(tmp_path: Path) -> None:
    users = tmp_path / "broker" / "users"
    result = call("add-agent", "pi-1", "--users", users)
    assert result.exit_code == 0
    secret = users.parent / "pi-1.password"
    assert (mode(users), mode(secret)) == (0o600, 0o600)
    password = secret.read_text().removesuffix("\n")
    assert len(password) >= 24
    assert password not in result.output
    assert verify(users, "pi-1", password)
    assert not verify(users, "pi-1", password + "x")
    assert 'username = "pi-1"' in result.output
    assert str(secret) in result.output


def test_an_agent_that_is_added_again_gets_a_new_password_and_the_others_keep_theirs(tmp_path: Path) -> None:
    users, secret = tmp_path / "users", tmp_path / "elsewhere"
    secret.write_text("a much longer text than any password that was there before, and for all to read\n")
    secret.chmod(0o644)
    for name in ("pi-2", "pi-1", "pi-1"):
        chosen = ("--password-file", secret) if name == "pi-1" else ()
        assert call("add-agent", name, "--users", users, *chosen).exit_code == 0
    assert mode(secret) == 0o600
    assert verify(users, "pi-1", secret.read_text().removesuffix("\n"))
    assert verify(users, "pi-2", (tmp_path / "pi-2.password").read_text().removesuffix("\n"))


def test_an_agent_that_is_removed_is_no_longer_let_in_and_the_others_are(tmp_path: Path) -> None:
    users = tmp_path / "users"
    for name in ("pi-1", "pi-2"):
        assert call("add-agent", name, "--users", users).exit_code == 0
    password = (tmp_path / "pi-1.password").read_text().removesuffix("\n")
    assert call("remove-agent", "pi-1", "--users", users).exit_code == 0
    assert not verify(users, "pi-1", password)
    assert verify(users, "pi-2", (tmp_path / "pi-2.password").read_text().removesuffix("\n"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pi-2.password", "users"]


@pytest.mark.parametrize("name", ["pi-3", "users", "../pi-2"])
def test_who_is_no_user_cannot_be_removed(tmp_path: Path, name: str) -> None:
    """Nor any file."""
    users = tmp_path / "inner" / "users"
    for agent in ("pi-1", "pi-2"):
        assert call("add-agent", agent, "--users", users).exit_code == 0
    (tmp_path / "pi-2.password").write_text("another's")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "has no user" in refused(call("remove-agent", name, "--users", users))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["../pi-1", "pi:1", "", "-"])
def test_a_name_that_cannot_be_a_user_leaves_no_file(tmp_path: Path, name: str) -> None:
    users = tmp_path / "inner" / "users"
    assert "can't be a user" in refused(call("add-agent", "--users", users, "--", name))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_password_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    users = tmp_path / "users"
    assert call("add-agent", "pi-1", "--users", users).exit_code == 0
    password = (tmp_path / "pi-1.password").read_text().removesuffix("\n")
    (tmp_path / "folder").mkdir()
    assert "Is a directory" in refused(
        call("add-agent", "pi-1", "--users", users, "--password-file", tmp_path / "folder")
    )
    assert verify(users, "pi-1", password)


def test_a_users_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refused(call("add-agent", "pi-1", "--users", tmp_path / "file" / "users"))
    assert f"{tmp_path}/file" in line


def test_a_mosquitto_configuration_is_printed_ready_for_use(tmp_path: Path) -> None:
    printed = call("mosquitto-config", "--port", "1899", "--persistence", tmp_path)
    assert printed.exit_code == 0
    lines = printed.stdout.splitlines()
    assert "listener 1899 127.0.0.1" in lines
    assert "allow_anonymous true" in lines
    assert f"persistence_location {tmp_path}/" in lines


def test_a_question_that_is_not_possible_is_one_line_though_a_broker_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    path = tmp_path / "coordinator.toml"
    path.write_text(f"[broker]\nport = {port}\n")
    with process("broker", "--port", str(port)) as broker:
        assert broker.stderr is not None
        assert "broker listens" in broker.stderr.readline()
        monkeypatch.setattr(client, "CONNECT_TIMEOUT_S", 10.0)
        monkeypatch.setattr(client, "PRESENCE_TIMEOUT_S", 0.5)
        ask = ("ask", "--to", "jetson-1", "-c", path)
        told = [
            refused(call(*ask, "", "--from", "pi-1")),
            refused(call(*ask, "Which?", "--from", " , ")),
            refused(call(*ask, "Which?", "--from", "pi-1", "--deadline", "-1")),
            refused(call(*ask, "Which?", "--from", "pi-1", "--rung", "Q 6")),
            refused(call(*ask, "Which?", "--from", "pi-1", "--facts", "1025")),
            refused(call(*ask, "Which?", "--from", "pi-1", "--facts", "-1")),
            refused(call(*ask, "Which?", "--from", "pi-1")),
        ]
    assert told == [
        "coordinator: this request is not possible: the question is empty; ask something",
        ("coordinator: this request is not possible: it names no source; name at least one agent that holds a context"),
        "coordinator: this request is not possible: deadline_s: expected `float` > 0.0, not -1.0",
        (
            "coordinator: this request is not possible: a rung's name is made of small letters, digits, '.', '-' "
            "and '_', 32 at most, not Q 6"
        ),
        "coordinator: this request is not possible: facts_tokens: expected `int` <= 1024, not 1025",
        "coordinator: this request is not possible: facts_tokens: expected `int` >= 0, not -1",
        "coordinator: no coordinator is running for site home; start one with `coordinator run`",
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), (None, 0)), (("--rung", "qkvcomm-6", "--facts", "48"), ("qkvcomm-6", 48))],
)
def test_the_rung_and_the_tokens_of_facts_reach_the_question(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], expected: tuple[str | None, int]
) -> None:
    asked: list[Message] = []

    class Connected(client.Client):
        async def __aenter__(self) -> client.Client:
            return self

        async def __aexit__(self, *_: object) -> None:
            return None

    def keep(message: Message) -> None:
        asked.append(message)
        raise RequestImpossible("it ends here")

    monkeypatch.setattr(cli, "Client", Connected)
    monkeypatch.setattr(client, "check", keep)
    assert "it ends here" in refused(call("ask", "Which?", "--from", "pi-1", "--to", "jetson-1", *options))
    (question,) = asked
    assert isinstance(question, Ask)
    assert (question.rung, question.facts_tokens) == expected


def test_reports_are_written_as_json(tmp_path: Path) -> None:
    report = RoundReport(
        request=instance(1), question="?", receiver="pi-1", policy="kv", state="answered", answer="north"
    )
    cli._write_json(tmp_path / "report.json", report)
    assert json.loads((tmp_path / "report.json").read_text())["answer"] == "north"
    with pytest.raises(CoordinatorError, match=r"can't write .*: No such file or directory"):
        cli._write_json(tmp_path / "none" / "report.json", report)
