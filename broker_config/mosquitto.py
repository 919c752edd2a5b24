"""Configuration of a real Mosquitto (2.0 and later), with every limit said."""

from __future__ import annotations

from pathlib import Path

from broker_config.broker import users_needed
from broker_config.topics import TOPICS

# Counts a packet's headers too. A publisher over it is cut off without a reason, so nothing of ours may come near.
MAX_PACKET_BYTES = max(topic.max_bytes for topic in TOPICS) + 4_096
# For one client, online or away. Mosquitto acknowledges what it then drops; transfers notice, orders are asked again.
MAX_QUEUED_BYTES = 64 << 20


def render(host: str, port: int, users: Path | None, persistence_dir: Path | None, *, run_as: str | None = None) -> str:
    """The text of a mosquitto.conf with one listener.

    users: a file as broker_config.users writes it. persistence_dir: where sessions and retained messages outlive a
    restart; it must exist and be writable for the broker; None keeps them in memory. run_as: the system user that
    Mosquitto, started by root, becomes (its default is `mosquitto`, which then has to own both paths).

    Raises BrokerRefusedToStart if host is reachable from other machines and there are no users.
    """
    users = users_needed(host, users)
    lines = [
        "# Made by kvbus; changes will be overwritten.",
        "per_listener_settings false",
        f"listener {port} {host.strip('[]')}".rstrip(),
        "set_tcp_nodelay true",
        "",
        *([f"allow_anonymous false\npassword_file {users.absolute()}"] if users else ["allow_anonymous true"]),
        "",
        f"max_packet_size {MAX_PACKET_BYTES}",
        "max_inflight_messages 20",
        "# 0 is no limit by number: bytes are what fills the memory",
        "max_queued_messages 0",
        f"max_queued_bytes {MAX_QUEUED_BYTES}",
        "persistent_client_expiration 1d",
        "",
        *_persistence(persistence_dir),
        "",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "log_type information",
        *([f"user {run_as}"] if run_as else []),
    ]
    return "\n".join(lines) + "\n"


def _persistence(directory: Path | None) -> list[str]:
    if directory is None:
        return ["persistence false"]
    return [
        "persistence true",
        f"persistence_location {directory.absolute()}/",
        "# saved every second, not at every change: that writes all queued chunks each time and stalls the broker",
        "autosave_on_changes false",
        "autosave_interval 1",
    ]
