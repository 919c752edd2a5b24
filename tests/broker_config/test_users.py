"""The users file."""

from __future__ import annotations

import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_config.errors import ConfigurationError
from broker_config.users import add_user, remove_user, users, verify

# from mosquitto_passwd 2.0.11: user pi-1, password "correct horse"
FROM_MOSQUITTO = (
    "pi-1:$7$101$ZjP8vMBYX/k8k4eP$CGe/lc15Sq6HUHfCg7N4PQTUVjVIlQDvoiHXIS0luAToqvaOdHL+5KdCgpdMx"
    "eNCXCBXYQC6FUyh1rFvB2+rBw=="
)


def test_a_user_is_verified_by_the_right_password_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "users"
    add_user(path, "pi-1", "s3cret")
    add_user(path, "pi-2", "other")
    assert users(path) == ("pi-1", "pi-2")
    assert verify(path, "pi-1", "s3cret")
    assert not verify(path, "pi-1", "other")
    assert not verify(path, "pi-3", "s3cret")
    assert not verify(path, "pi-1", "")


def test_a_line_of_mosquittos_own_tool_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "users"
    path.write_text(f"{FROM_MOSQUITTO}\n", encoding="utf-8")
    assert verify(path, "pi-1", "correct horse")
    assert not verify(path, "pi-1", "wrong horse")


def test_a_new_password_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "users"
    add_user(path, "pi-1", "old")
    add_user(path, "pi-1", "new")
    assert users(path) == ("pi-1",)
    assert not verify(path, "pi-1", "old")
    assert verify(path, "pi-1", "new")


def test_a_removed_user_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "users"
    add_user(path, "pi-1", "s3cret")
    assert remove_user(path, "pi-1")
    assert not remove_user(path, "pi-1")
    assert not verify(path, "pi-1", "s3cret")


def test_only_the_owner_reads_the_file_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "users"
    path.write_text("", encoding="utf-8")
    path.chmod(0o644)
    add_user(path, "pi-1", "s3cret")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_the_password_is_not_in_the_file_and_equal_ones_look_unequal(tmp_path: Path) -> None:
    path = tmp_path / "users"
    add_user(path, "pi-1", "s3cret")
    add_user(path, "pi-2", "s3cret")
    text = path.read_text(encoding="utf-8")
    assert "s3cret" not in text
    assert len({line.partition(":")[2] for line in text.splitlines()}) == 2


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", "-a", "a b", "x" * 65])
def test_a_name_that_would_break_the_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="can't be a user"):
        add_user(tmp_path / "users", name, "s3cret")


@pytest.mark.parametrize("password", ["", "two\nlines", "nul\0"])
def test_a_password_that_nobody_could_send_is_refused(password: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="must be one line"):
        add_user(tmp_path / "users", "pi-1", password)


@given(st.text(max_size=120))
@settings(max_examples=40, deadline=None)
def test_a_damaged_file_lets_nobody_in(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("users") / "users"
    path.write_text(f"{text}\npi-1:$7$1$====$AAAA\npi-1:plain\n", encoding="utf-8")
    assert not verify(path, "pi-1", "plain")


def test_a_file_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"can't write the users to .*File exists"):
        add_user(tmp_path / "file" / "users", "pi-1", "s3cret")


def test_those_who_add_users_at_once_lose_none(tmp_path: Path) -> None:
    path = tmp_path / "users"
    code = (
        "import sys, pathlib; from broker_config import users; users.add_user(pathlib.Path(sys.argv[1]), *sys.argv[2:])"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(path), f"pi-{number}", "s3cret"]) for number in range(6)
    ]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: add_user(path, f"thread-{number}", "s3cret"), range(16)))
    assert [each.wait() for each in running] == [0] * 6
    assert set(users(path)) == {f"pi-{number}" for number in range(6)} | {f"thread-{number}" for number in range(16)}
