"""What is one device's alone, and how a fleet is gone through."""

from __future__ import annotations

import threading
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.files import alone
from broker_config.settings import describe, load_toml
from broker_config.users import add_user, verify
from coordinator.credentials import known_password_file
from edge_agent.settings import AgentSettings
from scripts.flash.device import agent_named, device, one_each
from scripts.flash.errors import BundleFailed, HostFailed, HostUnreachable
from scripts.flash.fleet import roll_out, stages


def test_a_device_gets_a_user_of_its_own_and_a_configuration_that_is_valid(tmp_path: Path) -> None:
    users = tmp_path / "users"
    made = device("kitchen", host="10.0.0.2", port=1883, site="home", users=users)
    assert not list(tmp_path.iterdir())  # looking makes no user
    own = made.own()
    values = tomllib.loads(own["agent.toml"].decode())
    assert values["broker"] == {
        "host": "10.0.0.2",
        "port": 1883,
        "username": "kitchen",
        "password_file": "/opt/kvbus/current/password",
    }
    assert values["compute"]["threads"] == 0
    assert verify(users, "kitchen", own["password"].decode().strip())
    assert device("kitchen", host="10.0.0.2", port=1883, site="home", users=users).own() == own
    other = device("hall", host="10.0.0.2", port=1883, site="home", users=users)
    assert other.own()["password"] != own["password"]
    (tmp_path / "agent.toml").write_bytes(own["agent.toml"])
    assert load_toml(tmp_path / "agent.toml", AgentSettings) == made.settings
    assert own["password"].decode().strip() not in repr(made)


def test_whoever_has_a_password_that_is_not_here_is_not_shut_out(tmp_path: Path) -> None:
    users = tmp_path / "users"
    add_user(users, "kitchen", "theirs")
    with pytest.raises(BundleFailed, match=r"its password is not in .*kitchen\.password") as caught:
        device("kitchen", host="10.0.0.2", port=1883, site="home", users=users)
    assert "\n" not in str(caught.value)
    assert verify(users, "kitchen", "theirs")


def test_devices_that_are_flashed_at_once_all_get_their_users(tmp_path: Path) -> None:
    """And who asks for the same user gets the same password."""
    users, names = tmp_path / "users", [f"pi-{number % 8}" for number in range(24)]
    with ThreadPoolExecutor(len(names)) as pool:
        made = list(
            pool.map(lambda name: device(name, host="10.0.0.2", port=1883, site="home", users=users).own(), names)
        )
    for name, own in zip(names, made, strict=True):
        assert verify(users, name, own["password"].decode().strip())


def test_who_looks_while_a_user_is_being_added_sees_it_whole(tmp_path: Path) -> None:
    """A user without a password is refused, so nobody may see one between the two files."""
    users, begun, looked = tmp_path / "users", threading.Event(), threading.Event()

    def look() -> Path | None:
        begun.wait()
        try:
            return known_password_file(users, "kitchen")
        finally:
            looked.set()

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(look)
        with alone(tmp_path):
            add_user(users, "kitchen", "secret")
            begun.set()
            assert not looked.wait(0.2)
            (tmp_path / "kitchen.password").write_text("secret\n")
        assert found.result(30) == tmp_path / "kitchen.password"


def test_what_edge_agent_config_prints_leaves_a_devices_own_defaults(tmp_path: Path) -> None:
    (tmp_path / "all.toml").write_text(describe(AgentSettings))
    plain = device("kitchen", host="10.0.0.2", port=1883, site="home", users=None)
    listed = device("kitchen", host="10.0.0.2", port=1883, site="home", users=None, configuration=tmp_path / "all.toml")
    assert listed.settings == plain.settings
    assert (plain.settings.compute.threads, plain.settings.contexts_folder) == (0, "/var/lib/kvbus/contexts")


def test_a_file_of_ones_own_is_taken_but_for_what_makes_the_device(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        'agent = "other"\ncontexts_folder = "/srv/texts"\n[broker]\nhost = "example.org"\nkeepalive_s = 7\n'
        "[compute]\nthreads = 3\n[memory]\ncache_budget_mb = 33.0\n"
    )
    made = device("kitchen", host="10.0.0.2", port=1883, site="home", users=None, configuration=own).settings
    assert (made.agent, made.broker.host, made.broker.username) == ("kitchen", "10.0.0.2", None)
    assert (made.broker.keepalive_s, made.compute.threads, made.memory.cache_budget_mb) == (7, 3, 33.0)
    assert made.contexts_folder == "/srv/texts"
    assert made.memory.spill_folder == "/var/lib/kvbus/caches"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[compute]\nthreds = 3\n", "unknown field compute.threds; did you mean compute.threads?"),
        ("[memory]\ncache_budget_mb = -1.0\n", "memory.cache_budget_mb"),
        ("[memory\n", "no valid TOML"),
    ],
)
def test_a_file_with_a_mistake_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(content)
    with pytest.raises(BundleFailed) as caught:
        device("kitchen", host="h", port=1, site="home", users=None, configuration=path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.raises(BundleFailed, match="can't read"):
        device("kitchen", host="h", port=1, site="home", users=None, configuration=tmp_path / "none")
    with pytest.raises(BundleFailed, match="agent"):
        device("Kitchen!", host="h", port=1, site="home", users=None)


@pytest.mark.parametrize(
    ("host", "agent"),
    [
        ("pi@raspberrypi.local", "raspberrypi"),
        ("Pi-4.lan:2222", "pi-4"),
        ("user@My.Host", "my"),
        ("nano", "nano"),
        ("_x y_", "x-y"),
    ],
)
def test_an_agent_is_named_after_its_host(host: str, agent: str) -> None:
    assert agent_named(host) == agent


@pytest.mark.parametrize("host", ["pi@192.168.1.7", "127.0.0.1:2222", "localhost", "[::1]", "fe80::1", "---"])
def test_an_address_names_nobody(host: str) -> None:
    with pytest.raises(BundleFailed, match="AGENT="):
        agent_named(host)


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        (["pi@node.lab", "pi@node.home"], "pi@node.lab and pi@node.home would both be agent node"),
        (["kitchen", "hall", "pi@kitchen.local"], "kitchen and pi@kitchen.local would both be agent kitchen"),
        ([f"{'x' * 32}1", f"{'x' * 32}2"], "would both be agent x"),
        (["kitchen", "10.0.0.5"], "10.0.0.5 says nothing of who it is"),
    ],
)
def test_hosts_that_would_be_one_agent_are_refused(hosts: list[str], said: str) -> None:
    with pytest.raises(BundleFailed) as caught:
        one_each(hosts)
    assert said in str(caught.value)
    one_each(["kitchen", "hall", "kitchen"])


@given(st.lists(st.sampled_from("abcdefghijklmnopqrst"), max_size=30), st.booleans())
def test_every_host_is_in_one_stage(hosts: list[str], staged: bool) -> None:
    found = list(stages(hosts, staged=staged))
    assert [host for stage in found for host in stage] == list(dict.fromkeys(hosts))
    assert all(found)
    if staged and found:
        assert len(found[0]) == 1
        assert len(found) <= 3


def test_the_first_failure_stops_what_has_not_begun() -> None:
    hosts = [f"h{number}" for number in range(12)]
    seen: list[str] = []
    together = threading.Barrier(3)

    def work(host: str) -> str:
        seen.append(host)
        if host in {"h1", "h2", "h3"} and len(seen) > 1:
            together.wait(timeout=10)
        if host == "h2":
            raise HostFailed("h2: broken")
        return host.upper()

    ended = roll_out(hosts, work)
    assert [each.host for each in ended] == hosts
    assert sorted(seen) == ["h0", "h1", "h2", "h3"]
    assert [each.result for each in ended[:4]] == ["H0", "H1", None, "H3"]
    assert str(ended[2].error) == "h2: broken"
    assert all(each.result is None and each.error is None for each in ended[4:])
    seen.clear()
    assert all(each.error for each in roll_out(["h2", "h3"], work)[:1])
    assert seen == ["h2"]


def test_the_first_failure_stops_what_waits_in_its_own_stage() -> None:
    begun = threading.Semaphore(0)

    def work(host: str) -> str:
        if host == "h0":
            begun.release()
            raise HostFailed("h0: broken")
        begun.acquire(timeout=10)
        return host

    hosts = [f"h{number}" for number in range(20)]
    ended = roll_out(hosts, work, staged=False, at_once=1)
    assert [each.host for each in ended if each.error or each.result] == ["h0"]
    for _ in hosts:
        begun.release()
    ended = roll_out(hosts, work, staged=False, at_once=4, go_on=True)  # a question harms nobody
    assert [each.host for each in ended if each.error] == ["h0"]
    assert [each.result for each in ended[1:]] == hosts[1:]


def test_several_are_at_work_at_the_same_time_but_no_more_than_said() -> None:
    inside, most, lock = 0, 0, threading.Lock()
    gate = threading.Barrier(3)

    def work(_: str) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        gate.wait(timeout=10)
        with lock:
            inside -= 1

    ended = roll_out([str(number) for number in range(9)], work, staged=False, at_once=3)
    assert most == 3
    assert not any(each.error for each in ended)


def test_what_is_no_mistake_of_a_device_is_not_hidden_and_hides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def work(host: str) -> str:
        if host == "b":
            raise ZeroDivisionError("by nothing")
        return host

    first, second = roll_out(["a", "b"], work)
    assert first.result == "a"
    assert str(second.error) == "b: a fault of kvbus itself: ZeroDivisionError: by nothing"
    assert "Traceback" in caplog.text

    def gone(_: str) -> None:
        raise HostUnreachable("a: away")

    assert isinstance(roll_out(["a"], gone)[0].error, HostUnreachable)
