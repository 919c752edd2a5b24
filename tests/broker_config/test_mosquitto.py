"""Mosquitto's configuration, and what neither broker does."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_config.broker import EmbeddedBroker, is_loopback
from broker_config.errors import BrokerRefusedToStart
from broker_config.mosquitto import MAX_PACKET_BYTES, render
from broker_config.topics import TOPICS
from broker_config.users import add_user


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),  # noqa: S104  (that is the point)
        ("::", False),
        ("", False),
        ("192.168.1.4", False),
        ("laptop.local", False),
    ],
)
def test_loopback_is_told_from_the_rest(host: str, inside: bool) -> None:
    assert is_loopback(host) == inside


@pytest.mark.parametrize("with_file", [False, True])
async def test_no_broker_listens_beyond_loopback_without_users(with_file: bool, tmp_path: Path) -> None:
    users = tmp_path / "users" if with_file else None
    if users:
        users.write_text("nobody:plain\n", encoding="utf-8")
    with pytest.raises(BrokerRefusedToStart, match="run `coordinator add-agent NAME` first"):
        render("192.168.1.4", 1883, users, None)
    with pytest.raises(BrokerRefusedToStart, match="run `coordinator add-agent NAME` first"):
        async with EmbeddedBroker("192.168.1.4", 0, users):
            pass


def test_the_configuration_asks_for_passwords_where_there_are_users(tmp_path: Path) -> None:
    users = tmp_path / "users"
    add_user(users, "pi-1", "s3cret")
    text = render("192.168.1.4", 1884, users, tmp_path)
    assert "listener 1884 192.168.1.4" in text
    assert f"allow_anonymous false\npassword_file {users}" in text
    assert f"persistence_location {tmp_path}/" in text
    assert "autosave_on_changes false\nautosave_interval 1" in text


def test_the_configuration_is_open_on_loopback_only() -> None:
    text = render("127.0.0.1", 1883, None, None)
    assert "allow_anonymous true" in text
    assert "persistence false" in text
    assert "max_queued_bytes" in text


def test_every_message_fits_the_brokers_limit() -> None:
    assert max(topic.max_bytes for topic in TOPICS) + 300 < MAX_PACKET_BYTES < 2_000_000
