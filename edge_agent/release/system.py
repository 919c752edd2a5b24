"""What an installation asks of the system: a user, units, the service. Commands of systemd and of Debian's passwd."""

from __future__ import annotations

import grp
import pwd
import subprocess
from pathlib import Path

from edge_agent.release.errors import SystemFailed
from edge_agent.release.layers import write_whole
from edge_agent.release.units import AGENT, SETTLE, STATE, TRIAL, USER, units

UNITS = Path("/etc/systemd/system")
COMMAND = Path("/usr/local/bin/edge-agent")
LONGEST_S = 120.0
GPU_GROUPS = ("video", "render")


class SystemdService:
    """The agent under systemd; implements trial.Service. Nothing waits for the agent to be ready."""

    def restart(self) -> None:
        run("systemctl", "enable", "--quiet", AGENT, SETTLE)
        run("systemctl", "reset-failed", AGENT, allowed=True)
        run("systemctl", "restart", "--no-block", AGENT)

    def stop(self) -> None:
        run("systemctl", "disable", "--quiet", AGENT, SETTLE, allowed=True)
        run("systemctl", "stop", AGENT, allowed=True)

    def watch_trial(self) -> None:
        """See trial.Service."""
        run("systemctl", "restart", TRIAL)


def run(*command: str, allowed: bool = False, timeout_s: float = LONGEST_S) -> str:
    """What a command printed. allowed: it may fail. Raises SystemFailed with the last line that it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemFailed(f"{command[0]}: {error}") from None
    if done.returncode and not allowed:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise SystemFailed(f"`{' '.join(command)}` failed: {said[-1] if said else f'code {done.returncode}'}")
    return done.stdout


def make_user() -> int:
    """The agent's own user and group, made if it is missing; the group's number. Raises SystemFailed."""
    try:
        pwd.getpwnam(USER)
    except KeyError:
        shell = next((path for path in ("/usr/sbin/nologin", "/sbin/nologin") if Path(path).exists()), "/bin/false")
        run("useradd", "--system", "--user-group", "--home-dir", str(STATE), "--no-create-home", "--shell", shell, USER)
    return grp.getgrnam(USER).gr_gid


def install_units(root: Path, python: Path, *, devices: bool) -> None:
    """Write the units that are new or have changed, and the command for people. Raises SystemFailed.

    devices: whether the agent computes on more than the processor.
    """
    changed, groups = (
        False,
        [each.gr_name for each in grp.getgrall() if each.gr_name in GPU_GROUPS] if devices else None,
    )
    for name, text in units(root, python, groups=groups).items():
        path = UNITS / name
        try:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                write_whole(path, text.encode())
                changed = True
        except OSError as error:
            raise SystemFailed(f"can't write {path}: {error.strerror or error}") from None
    if changed:
        run("systemctl", "daemon-reload")
    if not COMMAND.exists() and not COMMAND.is_symlink():
        try:
            COMMAND.symlink_to(root / "current" / "edge-agent")
        except OSError as error:
            raise SystemFailed(f"can't write {COMMAND}: {error.strerror or error}") from None


def remove_all(root: Path, *, state: bool) -> None:
    """Everything but, unless `state`, what the agent keeps in its state folder. Raises SystemFailed."""
    SystemdService().stop()
    run("systemctl", "stop", TRIAL, allowed=True)
    paths = [*(UNITS / name for name in units(root, Path("python3"))), root, *((STATE,) if state else ())]
    if COMMAND.is_symlink() and str(COMMAND.readlink()).startswith(str(root)):
        paths.append(COMMAND)
    run("rm", "-rf", "--", *map(str, paths))
    run("systemctl", "daemon-reload")
    if state:
        run("userdel", USER, allowed=True)
