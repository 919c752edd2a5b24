"""Looking after a device that has been flashed: status, logs, going back, taking kvbus off."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_agent.release.place import Place
from edge_agent.release.units import AGENT
from scripts.flash.errors import HostFailed
from scripts.flash.flasher import STAGING, ourselves
from scripts.flash.host import Host, quoted
from scripts.flash.wheels import PYTHONS

STEADY_S = 60.0
"""How long an agent may take to be active again after going back."""

_INSTALLER = (
    quoted(
        "sh",
        "-c",
        f"""now=$(sed -n '1s/^#!\\([^ ]*\\).*/\\1/p' {Place().root}/current/edge-agent 2>/dev/null)
for p in $now {" ".join(f"/usr/bin/python{each} /usr/local/bin/python{each}" for each in reversed(PYTHONS))}; do
  [ -x "$p" ] && exec "$p" -I {Place().root}/installer.pyz "$@"
done; echo "the Python of its agent is gone" >&2; exit 1""",
    )
    + " installer"
)
"""By the Python of the release in use, or by another, where a first flash has left no release."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What came of it: a line or more for people, and what it is made of."""

    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)


class Keeper:
    """Of one device."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._installer = _INSTALLER

    def status(self) -> Kept:
        """Raises HostFailed where nothing is installed."""
        facts = self._facts()
        service = facts["service"]
        state = service.get("StatusText") or service.get("ActiveState") or "unknown"
        lines = [f"{facts['current']}: {state}" if facts["current"] else "no release is in use"]
        if int(service.get("NRestarts") or 0):
            lines.append(f"restarted {service['NRestarts']} times")
        if facts["trial"]:
            lines.append("on trial")
        if facts["previous"]:
            lines.append(f"before: {facts['previous']}")
        if facts["failure"]:
            lines.append(f"last failure: {facts['failure']}")
        return Kept(text="; ".join(lines), facts=facts)

    def logs(self, lines: int) -> Kept:
        """The agent's, as the journal has them."""
        said = self._host.run(f"journalctl -u {AGENT} -n {lines} -o short-iso --no-pager", root=True)
        return Kept(text=said.rstrip("\n"))

    def back(self) -> Kept:
        """To the release before; kept when its service is up."""
        self._facts()
        self._alone()
        name = str(self._host.ask(f"{self._installer} back", root=True)["release"])
        until_s = time.monotonic() + 10 * STEADY_S
        while time.monotonic() < until_s:
            facts = self._facts()
            if facts["service"].get("ActiveState") == "active":
                self._host.insist(f"{self._installer} confirm {name}")
                return Kept(text=f"{name} runs again", facts=facts)
            time.sleep(2)
        self._host.insist(f"{self._installer} undo --why 'it did not start'")
        raise HostFailed(f"{self._host.name}: {name} does not start any more; the newer one is back")

    def remove(self, *, state: bool) -> Kept:
        """Everything of kvbus; texts and caches too, if `state`."""
        self._facts()
        self._alone()
        self._host.run(f"{self._installer} remove {'--state' if state else ''}", root=True)
        self._host.run(f'rm -rf "$HOME/{STAGING}"')  # a flash that failed leaves what it had sent
        return Kept(text="kvbus is off it" + ("" if state else "; its texts and caches are still in /var/lib/kvbus"))

    def _alone(self) -> None:
        """While we change what is installed nobody else does. Raises HostFailed."""
        self._host.hold(f"{self._installer} hold --who {quoted(ourselves())}")

    def _facts(self) -> dict[str, Any]:
        if not self._host.run(f"test -e {Place().root}/installer.pyz && echo yes || true").strip():
            raise HostFailed(f"{self._host.name}: nothing of kvbus is installed there")
        return self._host.ask(f"{self._installer} status", root=True)
