"""`python installer.pyz COMMAND`: what a laptop has root do on a device. Answers are JSON, one object a line."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import select
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_agent.release import system, trial
from edge_agent.release.errors import DeviceBusy, LayerDamaged, ReleaseError, SystemFailed
from edge_agent.release.install import Package, describe, install
from edge_agent.release.place import Place
from edge_agent.release.units import TRIAL

LOCK = Path("/run/kvbus-flash.lock")
REACHED_WITHIN_S = 5.0
SILENCE_S = 45.0
"""After which whoever holds the device is taken for gone."""


def main(words: list[str] | None = None) -> int:
    """Do it; a ReleaseError is one line on standard error and code 1."""
    arguments = _parser().parse_args(words)
    try:
        arguments.work(Place(arguments.root), arguments)
    except ReleaseError as error:
        return _failed(str(error))
    except PermissionError as error:
        return _failed(f"only root may do this: {error}")
    except OSError as error:
        return _failed(f"{error.filename or 'the system'}: {error.strerror or error}")
    return 0


def _failed(why: str) -> int:
    print(f"kvbus: {why}", file=sys.stderr)  # noqa: T201
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="installer.pyz", description=__doc__)
    parser.add_argument("--root", type=Path, default=Place().root)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, work: object, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text)
        made.set_defaults(work=work)
        return made

    facts = command("facts", _facts, "what a laptop asks before it sends anything")
    facts.add_argument("--broker", default="", help="HOST:PORT to be reached from here")
    facts.add_argument("--staging", type=Path, default=Path("/"), help="where what is sent will lie")
    hold = command("hold", _hold, "keep others from flashing until standard input ends")
    hold.add_argument("--who", default="")
    put = command("install", _install, "unpack a release and make it ready")
    put.add_argument("--package", type=Path, required=True)
    put.add_argument("--keep", action="store_true", help="use it at once, without a trial: nobody is there to end one")
    for name, work, text in (
        ("activate", _activate, "use a release on trial"),
        ("confirm", _confirm, "keep the release on trial"),
    ):
        command(name, work, text).add_argument("release")
    command("back", _back, "put the earlier release on trial")
    command("undo", _undo, "end a trial with what was in use before").add_argument("--why", required=True)
    command("watch", _watch, "end a trial when its time is over")
    command("settle", _settle, "end a trial that began before the device was restarted")
    command("status", _status, "what is installed")
    command("remove", _remove, "uninstall").add_argument("--state", action="store_true")
    for name in ("activate", "back"):
        commands.choices[name].add_argument("--within", type=float, default=900.0, help="seconds until it must be kept")
    return parser


def _say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)  # noqa: T201


def _facts(place: Place, arguments: argparse.Namespace) -> None:
    host, _, port = arguments.broker.rpartition(":")
    existing = next(path for path in (place.root, *place.root.parents) if path.exists())
    apart = existing.stat().st_dev != arguments.staging.stat().st_dev
    _say(
        machine=platform.machine(),
        python=platform.python_version(),
        free_bytes=shutil.disk_usage(existing).free,
        staging_free_bytes=shutil.disk_usage(arguments.staging).free if apart else None,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        cores=os.cpu_count(),
        time_s=time.time(),
        systemd=Path("/run/systemd/system").is_dir(),
        broker_error=_unreachable(host.strip("[]"), int(port)) if host else "",
        **describe(place),
    )


def _unreachable(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), REACHED_WITHIN_S).close()
    except OSError as error:
        return str(error.strerror or error)
    return ""


def _hold(_: Place, arguments: argparse.Namespace) -> None:
    with _held(arguments.who):
        _say(held=True)
        while select.select([sys.stdin], [], [], SILENCE_S)[0] and os.read(sys.stdin.fileno(), 64):
            pass  # a sign of life; who is silent for long has lost the link


@contextmanager
def _held(who: str) -> Iterator[None]:
    """Nobody else changes what is installed. Raises DeviceBusy."""
    number = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.read(number, 200).decode(errors="replace")
            raise DeviceBusy(f"another flash is at work on this device{f', from {other}' if other else ''}") from None
        os.ftruncate(number, 0)
        os.pwrite(number, who.encode()[:200], 0)
        yield
    finally:
        os.close(number)


def _install(place: Place, arguments: argparse.Namespace) -> None:
    told = ""

    def say(layer: str, share: float) -> None:
        nonlocal told
        now = f"{layer} {int(share * 20)}"
        if now != told:
            told = now
            _say(layer=layer, share=round(share, 2))

    package = Package(folder=arguments.package)
    if arguments.keep:  # nobody is there who holds the device, or to whom a trial would mean anything
        with _held("its card"):
            name = install(place, package, Path(sys.executable), say)
            if name != place.current():
                trial.begin(place, name, system.SystemdService(), within_s=60)
                trial.confirm(place, name)
    else:
        try:
            name = install(place, package, Path(sys.executable), say)
        except LayerDamaged as error:
            if error.archive is not None:
                error.archive.unlink(missing_ok=True)  # or what has arrived so would be taken for what was sent
            raise
    _say(release=name, in_use=name == place.current() and place.trial() is None)


def _activate(place: Place, arguments: argparse.Namespace) -> None:
    trial.begin(place, arguments.release, system.SystemdService(), within_s=arguments.within)
    _say(release=arguments.release)


def _back(place: Place, arguments: argparse.Namespace) -> None:
    _say(release=trial.back(place, system.SystemdService(), within_s=arguments.within))


def _confirm(place: Place, arguments: argparse.Namespace) -> None:
    trial.confirm(place, arguments.release)
    system.run("systemctl", "stop", TRIAL, allowed=True)
    _say(release=arguments.release)


def _undo(place: Place, arguments: argparse.Namespace) -> None:
    _say(release=trial.undo(place, system.SystemdService(), arguments.why))


def _watch(place: Place, _: argparse.Namespace) -> None:
    trial.watch(place, system.SystemdService())


def _settle(place: Place, _: argparse.Namespace) -> None:
    _say(undone=trial.settle(place, system.SystemdService()))


def _status(place: Place, _: argparse.Namespace) -> None:
    _say(**describe(place))


def _remove(place: Place, arguments: argparse.Namespace) -> None:
    if not place.root.exists():
        raise SystemFailed("nothing of kvbus is installed here")
    system.remove_all(place.root, state=arguments.state)
    _say(removed=True)
