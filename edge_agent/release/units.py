"""The units that systemd runs on a device: the agent, the watch over a trial, and what settles one at the start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

AGENT, TRIAL, SETTLE = "kvbus-agent.service", "kvbus-trial.service", "kvbus-settle.service"
USER = "kvbus"
STATE = Path("/var/lib/kvbus")

_AGENT = """# Written by kvbus; changes are lost at the next flash. For your own: systemctl edit {agent}
[Unit]
Description=kvbus agent: a small language model that exchanges KV caches over MQTT
Wants=network-online.target
After=network-online.target time-sync.target
# It tries until its broker is there; systemd must not give up on it either.
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={root}/current/edge-agent run --json {root}/current/agent.toml
# Loading a model and measuring the device takes its time on a slow card.
TimeoutStartSec=900
WatchdogSec=120
Restart=always
RestartSec=2
# From 2 s to a minute between restarts; older systemd has RestartSec alone.
RestartSteps=6
RestartMaxDelaySec=60
TimeoutStopSec=20

User={user}
Group={user}
StateDirectory=kvbus
StateDirectoryMode=0750
WorkingDirectory={state}
Environment=HOME={state} MALLOC_ARENA_MAX=2 PYTHONDONTWRITEBYTECODE=1
UMask=0077

# When memory ends, the agent goes before what keeps the device reachable. (Limits of systemd need the memory cgroup,
# which Raspberry Pi OS leaves off; the agent watches what is available by itself.)
OOMScoreAdjust=600
Nice=5

ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
{devices}
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectClock=yes
ProtectProc=default
NoNewPrivileges=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
LockPersonality=yes
CapabilityBoundingSet=
AmbientCapabilities=
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""

_TRIAL = """# Written by kvbus: puts the earlier release back unless the new one is confirmed in time.
[Unit]
Description=kvbus: watch over a release on trial
ConditionPathExists={root}/trial.json
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={python} -I {root}/installer.pyz --root {root} watch
# Going back may fail where the disk is full or systemd busy; it is tried until it is done.
Restart=on-failure
RestartSec=5
"""

_SETTLE = """# Written by kvbus: a release that was on trial when the power went is not trusted.
[Unit]
Description=kvbus: end a trial that began before the device was restarted
ConditionPathExists={root}/trial.json
Before={agent}

[Service]
Type=oneshot
ExecStart={python} -I {root}/installer.pyz --root {root} settle

[Install]
WantedBy=multi-user.target
"""


def units(root: Path, python: Path, *, groups: Sequence[str] | None = None) -> dict[str, str]:
    """Their texts by name. groups: whose devices the agent may open (a GPU's); None: no devices at all."""
    words = {
        "agent": AGENT,
        "root": root,
        "python": python,
        "user": USER,
        "state": STATE,
        "devices": "PrivateDevices=yes" if groups is None else f"SupplementaryGroups={' '.join(groups)}",
    }
    return {name: text.format(**words) for name, text in ((AGENT, _AGENT), (TRIAL, _TRIAL), (SETTLE, _SETTLE))}
