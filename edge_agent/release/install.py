"""From archives to an installed release that is ready to be tried. What is in use is not touched."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_agent.release import system
from edge_agent.release.errors import DeviceUnfit, SystemFailed
from edge_agent.release.layers import unpack, write_whole
from edge_agent.release.manifest import RUNTIME_LAYER, Layer, Release, read_release
from edge_agent.release.place import COMMAND, CONFIGURATION, MANIFEST, PASSWORD, PUBLIC_KEY, SIGNATURE, Place
from edge_agent.release.signature import add_packages, check_signature
from edge_agent.release.units import AGENT

CPU = "CPUExecutionProvider"
FIRST_RUN_S = 1_800.0
SPARE_BYTES = 64_000_000
"""Of disk that stays free, so that logs and states can still be written."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A folder with what a laptop has sent: the manifest, its signature, the site's key, agent.toml, password (if the
    broker wants one), and archives named by digest.
    """

    folder: Path

    def read(self, name: str) -> bytes:
        """Raises SystemFailed."""
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise SystemFailed(f"can't read {self.folder / name}: {error.strerror or error}") from None

    def own(self) -> dict[str, bytes]:
        """What is this device's alone."""
        return {name: self.read(name) for name in (CONFIGURATION, PASSWORD) if (self.folder / name).exists()}

    def archive(self, layer: Layer) -> Path:
        """Of one layer."""
        return self.folder / layer.file_name


def install(place: Place, package: Package, python: Path, say: Callable[[str, float], None]) -> str:
    """The name of the release, now installed. say: which layer is being unpacked, and how much of it is.

    Raises ReleaseError; then the device is as it was, but for layers that were unpacked already.
    """
    content, signature = package.read(MANIFEST), package.read(SIGNATURE)
    release = read_release(content)
    _fits(release)
    place.root.mkdir(parents=True, exist_ok=True, mode=0o755)
    trusted = place.key.read_bytes() if place.key.exists() else None
    current = place.current()
    if trusted is not None and current is not None:
        add_packages(place.releases / current / RUNTIME_LAYER)
        check_signature(content, signature, trusted)
    _has_room(place, release)
    if current is None:
        write_whole(place.installer, Path(sys.argv[0]).read_bytes())  # takes off again what a failure leaves
    group = system.make_user()
    for name, layer in release.layers.items():
        unpacked = unpack(
            package.archive(layer),
            layer,
            place.store,
            lambda done, name=name, layer=layer: say(name, done / max(1, layer.unpacked_bytes)),  # type: ignore[misc]
        )
        if name == RUNTIME_LAYER and (trusted is None or current is None):
            add_packages(unpacked)
            check_signature(content, signature, package.read(PUBLIC_KEY))
    name = place.add(release, signature, package.own(), python, group)
    try:
        _first_run(place.releases / name)
    except SystemFailed:
        place.forget_unused()  # so that a layer that is damaged on this disk is sent anew
        raise
    if trusted is None or current is None:
        write_whole(place.key, package.read(PUBLIC_KEY))
    write_whole(place.installer, Path(sys.argv[0]).read_bytes())
    system.install_units(place.root, python, devices=_wants_devices(package))
    return name


def _wants_devices(package: Package) -> bool:
    """Whether the agent is told to compute on more than the processor."""
    try:
        compute = tomllib.loads(package.read(CONFIGURATION).decode()).get("compute", {})
    except ValueError as error:
        raise DeviceUnfit(f"{CONFIGURATION} can't be read: {error}") from None
    return bool(compute.get("provider", CPU) != CPU)


def _fits(release: Release) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if release.machine != platform.machine():
        raise DeviceUnfit(f"the release is for {release.machine}, this machine is {platform.machine()}")
    if release.python != here:
        raise DeviceUnfit(f"the release is for Python {release.python}, this is {here}")


def _has_room(place: Place, release: Release) -> None:
    missing = [each for each in release.layers.values() if not (place.store / each.sha256).is_dir()]
    wanted = sum(each.unpacked_bytes for each in missing) + SPARE_BYTES
    free = shutil.disk_usage(place.root).free
    if free < wanted:
        raise DeviceUnfit(f"{free / 1e6:.0f} MB are free under {place.root}, the release needs {wanted / 1e6:.0f} MB")


def _first_run(release: Path) -> None:
    """Let its Python compile what the agent imports, which the service itself may not write; and see that it starts.

    Raises SystemFailed with what it says, if it can't.
    """
    said = system.run(str(release / COMMAND), "check", str(release / CONFIGURATION), timeout_s=FIRST_RUN_S)
    if not said:
        raise SystemFailed(f"{release.name} does not start")
    os.sync()  # what was compiled is not written by whoever runs it, so half a file would stay for good


def describe(place: Place) -> dict[str, object]:
    """What is installed here, for people and laptops."""
    trial = place.trial()
    unit = system.run("systemctl", "show", AGENT, "--property=ActiveState,NRestarts,StatusText", allowed=True)
    current = place.current()
    return {
        "current": current,
        "previous": place.previous(),
        "trial": trial.release if trial else None,
        "failure": place.failure(),
        "installed": list(place.names()),
        "service": dict(line.split("=", 1) for line in unit.splitlines() if "=" in line),
        "release": json.loads(place.release(current).to_bytes()) if current and current in place.names() else None,
        "layers": sorted(path.name for path in place.store.iterdir()) if place.store.is_dir() else [],
        "root": os.geteuid() == 0,
    }
