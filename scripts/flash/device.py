"""What is one device's alone: its agent's configuration, and its own user at the broker."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker_config.errors import BusError
from broker_config.settings import convert, read_toml, write_toml
from coordinator.credentials import known_password_file, password_file_of
from edge_agent.release.place import CONFIGURATION, PASSWORD, Place
from edge_agent.release.units import STATE
from edge_agent.settings import AgentSettings
from scripts.flash.errors import BundleFailed

DEFAULT_SITE = "home"


@dataclass(frozen=True, kw_only=True)
class Device:
    """One agent on one device. users: the broker's users file, None if the broker wants no users."""

    settings: AgentSettings
    configuration: bytes
    users: Path | None

    def own(self) -> dict[str, bytes]:
        """agent.toml and password, as they are put there. Its user at the broker is added now, unless it has one.

        Raises BundleFailed.
        """
        files = {CONFIGURATION: self.configuration}
        if self.users is not None:
            try:
                kept = password_file_of(self.users, self.settings.agent)
                files[PASSWORD] = kept.read_bytes()
            except (BusError, OSError) as error:
                raise BundleFailed(f"no password for {self.settings.agent}: {error}") from None
        return files


def device(
    agent: str, *, host: str, port: int, site: str, users: Path | None, configuration: Path | None = None
) -> Device:
    """The configuration of an agent: a file's, or the defaults, with what a device needs put in. Nothing is written.

    host, port: the broker as the device reaches it. users: the broker's users file; None: the broker wants no users.
    Raises BundleFailed, also for a user whose password nobody here has.
    """
    users = users.expanduser() if users else None
    try:
        given = read_toml(configuration) if configuration else {}
        values = _merged(_defaults(), given)
        values = _merged(values, _forced(agent, host=host, port=port, site=site, secured=users is not None))
        settings = convert(values, AgentSettings, configuration or Path(CONFIGURATION))
        if users is not None:
            known_password_file(users, agent)
    except BusError as error:
        raise BundleFailed(str(error)) from None
    return Device(settings=settings, configuration=write_toml(values).encode(), users=users)


def agent_named(host: str) -> str:
    """An agent's id out of a host's name. Raises BundleFailed for an address, which names nobody."""
    name = host.rpartition("@")[2].partition(":")[0]
    if re.fullmatch(r"[\d.]+|\[?[0-9a-fA-F:]+\]?", name) or name == "localhost":
        raise BundleFailed(f"{name} says nothing of who it is; give the agent's id: AGENT=kitchen")
    found = re.sub(r"[^a-z0-9_-]+", "-", name.partition(".")[0].lower()).strip("-_")[:32]
    if not found:
        raise BundleFailed(f"no agent's id can be made of {name!r}; give one: AGENT=kitchen")
    return found


def one_each(hosts: Iterable[str]) -> None:
    """Raises BundleFailed if two hosts would be the same agent, or one's name gives none: each would prove the other's
    work.
    """
    found: dict[str, str] = {}
    for host in hosts:
        other = found.setdefault(agent_named(host), host)
        if other != host:
            raise BundleFailed(f"{other} and {host} would both be agent {agent_named(host)}; flash one with AGENT=")


def _defaults() -> dict[str, Any]:
    """Of a device that has nothing else to do."""
    return {
        "contexts_folder": str(STATE / "contexts"),
        "compute": {"threads": 0},
        "memory": {"spill_folder": str(STATE / "caches")},
    }


def _forced(agent: str, *, host: str, port: int, site: str, secured: bool) -> dict[str, Any]:
    """Whatever a file says."""
    current = Place().root / "current"
    broker: dict[str, Any] = {"host": host, "port": port}
    if secured:
        broker |= {"username": agent, "password_file": str(current / PASSWORD)}
    return {"agent": agent, "site": site, "bundle": str(current / "model"), "broker": broker}


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """With the other's values where both have one."""
    found = dict(one)
    for name, value in other.items():
        kept = found.get(name)
        found[name] = _merged(kept, value) if isinstance(kept, Mapping) and isinstance(value, Mapping) else value
    return found
