"""One device, from the first look to an agent that has answered; what fails leaves the device as it was."""

from __future__ import annotations

import asyncio
import getpass
import re
import socket
import time
from collections.abc import Callable, Collection, Container, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker_config.discovery import MDNS
from broker_config.errors import BusError
from broker_config.files import file_digest
from broker_config.settings import BrokerSettings
from edge_agent.release.install import SPARE_BYTES
from edge_agent.release.manifest import MODEL_LAYER, Layer, Release
from edge_agent.release.place import MANIFEST, PUBLIC_KEY, SIGNATURE, Place
from edge_agent.release.units import AGENT
from scripts.flash.bundle import Bundle
from scripts.flash.device import Device
from scripts.flash.errors import FlashError, HostFailed, HostUnfit, HostUnreachable
from scripts.flash.host import Host, quoted
from scripts.flash.proof import Proof, Witness, bus
from scripts.flash.wheels import PYTHONS

INSTALL_S, TRIAL_S, PROOF_S = 3_600.0, 1_800.0, 1_500.0
"""Longest: unpacking on a slow card; until a device goes back by itself; until its agent has answered."""
LOOK_S, AWAY_S = 15.0, 100.0
"""How often a device on trial is looked at, and how long it may be away: a restart takes a minute."""
CONNECT_S = 15.0
CLOCK_OFF_S = 120.0
"""Certificates and logs mind more than this."""
STAGING = ".cache/kvbus-flash"
"""Below the home of the user who is let in."""
BESIDE_MODEL_BYTES = 320_000_000
"""What the runtime, its buffers, a few caches and the system take beside the weights: a board of 512 MB is too small
for SmolLM2-135M, one of 1 GB is not."""

_LOOK = quoted(
    "sh",
    "-c",
    f"""uname -m; now=$(sed -n '1s/^#!\\([^ ]*\\).*/\\1/p' {Place().root}/current/edge-agent 2>/dev/null)
echo "now $now"; for p in $now /usr/bin/python3.?? /usr/bin/python3 /usr/local/bin/python3.?? /opt/*/bin/python3.??; do
  [ -x "$p" ] && echo "python $(stat -Lc %u "$p") $p $("$p" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
done; echo end""",
)
"""The release in use runs on the first; others are root's own, since whose home a Python is in could change what root
runs, and a service reads no homes.
"""

Say = Callable[[str, float | None], None]
"""Hears what is being done, and which share of it is (None: not known)."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What is to be done, for any device.

    bundle: builds or finds what a device with this Python and machine needs. device: what is its own, by our address as
    it sees it. here: the broker as we reach it, given the device's. dry_run: look only.
    """

    bundle: Callable[[str, str], Bundle]
    device: Callable[[str], Device]
    here: Callable[[BrokerSettings], BrokerSettings]
    dry_run: bool = False
    trial_s: float = TRIAL_S
    proof_s: float = PROOF_S


@dataclass(frozen=True, kw_only=True)
class Flashed:
    """What came of it. sent_bytes: over the link; proof: None for a dry run."""

    agent: str
    release: str
    sent_bytes: int
    seconds: float
    proof: Proof | None
    changed: bool
    plan: tuple[str, ...] = ()


class Flasher:
    """Carries orders out on one host."""

    def __init__(self, host: Host, orders: Orders, say: Say) -> None:
        self._host, self._orders, self._say = host, orders, say
        self._sent_bytes = 0

    def flash(self) -> Flashed:
        """Raises FlashError; then the device is as it was, but for files that a next attempt need not send again."""
        began_s = time.monotonic()
        self._say("looking at the device", None)
        machine, pythons = self._look()
        python = self._python(machine, pythons)
        self._host.run("true", root=True)
        device = self._orders.device(self._host.local_address)
        bundle = self._orders.bundle(python, machine)
        if self._orders.dry_run:
            plan = self._planned(bundle, device, pythons[python])
            return Flashed(
                agent=device.settings.agent,
                release=bundle.release.version,
                sent_bytes=0,
                seconds=time.monotonic() - began_s,
                proof=None,
                changed=False,
                plan=plan,
            )
        staging = self._staging()
        self._host.run(f"mkdir -p -m 700 {quoted(staging)}")
        self._put_installer(bundle, staging, pythons[python])
        self._host.hold(f"{self._installer} hold --who {quoted(ourselves())}")
        facts, missing = self._facts(bundle, device, staging)
        if facts["trial"] is not None:  # whoever began it is not at work any more, or we could not hold the device
            self._host.insist(f"{self._installer} undo --why 'another flash took its place'")
        for name, layer in missing.items():
            self._put(bundle.archive(layer), f"{staging}/{layer.file_name}", title=f"sending the {name}")
        own = device.own()
        try:
            release, in_use = self._installed(bundle, own, staging)
            proof = asyncio.run(self._try(device, release, in_use=in_use))
        except BaseException:
            with suppress(FlashError):  # the layers stay, which the next attempt need not send
                self._host.run(f"rm -f {quoted(*(f'{staging}/{name}' for name in own))}")
            raise
        with suppress(FlashError):
            self._host.run(f"rm -rf {quoted(staging)}")
        return Flashed(
            agent=device.settings.agent,
            release=release,
            sent_bytes=self._sent_bytes,
            seconds=time.monotonic() - began_s,
            proof=proof,
            changed=not in_use,
        )

    def _planned(self, bundle: Bundle, device: Device, python: str) -> tuple[str, ...]:
        """What a flash would do. In a folder of its own, as another flash may be at work there."""
        folder = self._host.run('mktemp -d "$HOME/.kvbus-look-XXXXXX"').strip()
        try:
            self._put_installer(bundle, folder, python)
            facts, missing = self._facts(bundle, device, folder)
        finally:
            with suppress(FlashError):
                self._host.run(f"rm -rf {quoted(folder)}")
        return _plan(facts, bundle.release, missing, device)

    def _put_installer(self, bundle: Bundle, folder: str, python: str) -> None:
        path = f"{folder}/installer-{file_digest(bundle.installer)[:12]}.pyz"
        self._put(bundle.installer, path)
        self._installer = quoted(python, "-I", path)

    def _facts(self, bundle: Bundle, device: Device, folder: str) -> tuple[dict[str, Any], dict[str, Layer]]:
        """What the device says of itself, and the layers that it has not. Raises HostUnfit if it would not do."""
        broker = device.settings.broker
        wanted = "" if broker.host == MDNS else f"--broker {quoted(broker.address)}"  # the agent looks for it by itself
        facts = self._host.ask(f"{self._installer} facts --staging {quoted(folder)} {wanted}", root=True)
        missing = {name: each for name, each in bundle.release.layers.items() if each.sha256 not in facts["layers"]}
        self._check(facts, bundle.release, missing.values(), broker.address)
        return facts, missing

    def _look(self) -> tuple[str, dict[str, str]]:
        """Its architecture, and where its Pythons are, by version; one that a release runs on comes first."""
        said = self._host.run(_LOOK)
        machine, now, *lines = f"{said}\n".split("\n")
        found: dict[str, str] = {}
        for words in (line.split() for line in lines):
            if len(words) != 4 or words[0] != "python":
                continue  # the end; a Python that does not start tells no version
            _, owner, path, version = words
            if owner == "0" and not path.startswith(("/home/", "/root/")):
                found.setdefault(version, path)
        in_use = now.removeprefix("now ").strip()
        order = sorted(found, key=lambda version: (found[version] != in_use, -int(version.rpartition(".")[2])))
        return machine.strip(), {version: found[version] for version in order}

    def _python(self, machine: str, pythons: dict[str, str]) -> str:
        if machine not in {"aarch64", "x86_64"}:
            raise HostUnfit(
                f"{self._host.name} is {machine or 'something unknown'}; kvbus needs a 64-bit system (aarch64): "
                "choose the 64-bit image of the OS"
            )
        usable = [version for version in pythons if version in PYTHONS]
        if not usable:
            has = ", ".join(sorted(pythons)) or "no Python"
            raise HostUnfit(
                f"{self._host.name} has {has}; kvbus needs Python {PYTHONS[0]} to {PYTHONS[-1]} there, "
                "installed by root for everybody"
            )
        return usable[0]

    def _staging(self) -> str:
        """In the user's own home, where nobody else can put what root would run."""
        return self._host.run('printf %s "$HOME"').strip() + f"/{STAGING}"

    def _check(self, facts: dict[str, Any], release: Release, missing: Collection[Layer], broker: str) -> None:
        name = self._host.name
        unpacked = sum(each.unpacked_bytes for each in missing) + SPARE_BYTES
        sent = sum(each.size_bytes for each in missing)
        apart = facts["staging_free_bytes"]
        here = unpacked if apart is not None else unpacked + sent
        needed = release.layers[MODEL_LAYER].unpacked_bytes + BESIDE_MODEL_BYTES
        off_s = facts["time_s"] - time.time()
        reasons = [
            (not facts["root"], "sudo does not make us root there"),
            (not facts["systemd"], "it does not run systemd"),
            (
                facts["free_bytes"] < here,
                f"{facts['free_bytes'] / 1e6:.0f} MB of disk are free, {here / 1e6:.0f} MB are needed",
            ),
            (
                apart is not None and apart < sent,
                f"{(apart or 0) / 1e6:.0f} MB are free where homes are, {sent / 1e6:.0f} MB are to be sent there",
            ),
            (
                facts["memory_bytes"] < needed,
                f"{facts['memory_bytes'] / 1e6:.0f} MB of memory; this model needs {needed / 1e6:.0f} MB",
            ),
            (
                abs(off_s) > CLOCK_OFF_S,
                f"its clock is {abs(off_s):.0f} s {'ahead' if off_s > 0 else 'behind'}; `timedatectl` there says why",
            ),
            (
                bool(facts["broker_error"]),
                f"the broker {broker} can't be reached from it: {facts['broker_error']}",
            ),
        ]
        for wrong, reason in reasons:
            if wrong:
                raise HostUnfit(f"{name}: {reason}")

    def _put(self, source: Path, target: str, *, title: str = "sending the installer") -> None:
        size = max(1, source.stat().st_size)
        self._sent_bytes += self._host.send(
            source,
            target,
            lambda there: self._say(title, there / size),
            again=lambda why: self._say(f"{title}: {why}; again", None),
        )

    def _installed(self, bundle: Bundle, own: Mapping[str, bytes], staging: str) -> tuple[str, bool]:
        """The name of the release, and whether it is in use already."""
        for name, content in (
            (MANIFEST, bundle.release.to_bytes()),
            (SIGNATURE, bundle.signature),
            (PUBLIC_KEY, bundle.public_key),
            *own.items(),
        ):
            self._host.write(content, f"{staging}/{name}")
        try:
            return self._install(staging)
        except HostUnreachable as error:
            raise _saying(error, f"{error} while it was installed; what ran there runs on") from None

    def _install(self, staging: str) -> tuple[str, bool]:
        found: dict[str, Any] = {}

        def line(told: dict[str, Any]) -> None:
            if "layer" in told:
                self._say(f"unpacking the {told['layer']}", told["share"])
                if told["share"] >= 1 and told["layer"] == "runtime":
                    self._say("first start, which compiles it", None)
            found.update(told)

        self._say("installing", None)
        self._host.run(
            f"{self._installer} install --package {quoted(staging)}", root=True, timeout_s=INSTALL_S, line=line
        )
        return str(found["release"]), bool(found["in_use"])

    async def _try(self, device: Device, release: str, *, in_use: bool) -> Proof:
        """Start it and have it prove itself on the bus; else the release before it is back."""
        settings = self._orders.here(device.settings.broker)
        async with bus(settings, device.settings.site) as connection:
            try:
                await connection.connected(CONNECT_S)
            except BusError as error:
                raise HostUnfit(f"nobody could hear {device.settings.agent} here: {error}") from None
            witness = Witness(connection, device.settings.agent)
            await witness.listen(after_restart=not in_use)
            if in_use:
                await asyncio.to_thread(self._host.run, f"systemctl start --no-block {AGENT}", root=True)
                return await self._proven(witness, release, in_use=True)
            try:
                self._say("starting it", None)
                activate = f"{self._installer} activate {release} --within {self._orders.trial_s:.0f}"
                await asyncio.to_thread(self._host.run, activate, root=True)
                proof = await self._proven(witness, release, in_use=False)
                await asyncio.to_thread(self._host.insist, f"{self._installer} confirm {release}")
            except FlashError as error:
                raise await asyncio.to_thread(self._undone, error, release) from None
        return proof

    async def _proven(self, witness: Witness, release: str, *, in_use: bool) -> Proof:
        """Beside it, look whether the device has given it up by itself (it was restarted, say)."""
        proving = asyncio.create_task(witness.prove(self._orders.proof_s, lambda text: self._say(text, None)))
        seen_s = time.monotonic()
        restarts_before: int | None = None if in_use else 0  # it may have had its reasons before we came
        try:
            while True:
                done, _ = await asyncio.wait({proving}, timeout=LOOK_S)
                if done:
                    return proving.result()
                try:
                    state = await asyncio.to_thread(self._state)
                except HostUnreachable as error:
                    away_s = time.monotonic() - seen_s
                    if away_s > AWAY_S:
                        raise _saying(error, f"{error}, and it has been away for {away_s:.0f} s") from None
                    self._say("it is away", None)
                    continue
                seen_s = time.monotonic()
                if not in_use and state["trial"] is None and state["current"] != release:
                    raise HostFailed(f"{self._host.name}: {state['failure'] or 'the device gave the release up'}")
                restarts = int(state["service"].get("NRestarts") or 0)
                restarts_before = restarts if restarts_before is None else restarts_before
                if restarts - restarts_before >= RESTARTS:
                    raise HostFailed(f"{self._host.name}: the agent ends as soon as it starts: {self._last_words()}")
        finally:
            proving.cancel()
            with suppress(asyncio.CancelledError, FlashError):
                await proving

    def _state(self) -> dict[str, Any]:
        try:
            return self._host.ask(f"{self._installer} status", root=True, timeout_s=60)
        except (HostUnreachable, HostFailed):
            self._host.reconnect()
            return self._host.ask(f"{self._installer} status", root=True, timeout_s=60)

    def _last_words(self) -> str:
        """What the agent logged last."""
        try:
            said = self._host.run(f"journalctl -u {AGENT} -t edge-agent -n 1 -o cat --no-pager", root=True).strip()
        except FlashError as error:
            return str(error)
        found = re.search(r'"message": "([^"]*)"', said)
        return found[1] if found else said.removeprefix("edge-agent: ") or "nothing in its log"

    def _undone(self, error: FlashError, release: str) -> FlashError:
        """Go back; the error, with what came of that."""
        try:
            state = self._state()
            if state["trial"] == release:
                self._host.insist(f"{self._installer} undo --why {quoted(str(error)[:500])}")
                state = self._state()
        except FlashError as other:
            return _saying(error, f"{error}; it goes back by itself within half an hour ({other})")
        now = state["current"]
        if now == release and state["trial"] is None:
            return _saying(error, f"{error}; {release} has answered and stays")  # the device heard us, we didn't
        return _saying(error, f"{error}; {f'{now} is back' if now else 'nothing is installed there'}")


def ourselves() -> str:
    """For whoever finds the device busy."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


RESTARTS = 3
"""An agent that ends so often while it is on trial won't recover."""


def _saying(error: FlashError, text: str) -> FlashError:
    """The same kind of error with more to say."""
    return type(error)(text)


def _plan(facts: dict[str, Any], release: Release, missing: Container[str], device: Device) -> tuple[str, ...]:
    """What a flash would do, line by line."""
    lines = [
        f"{facts['machine']}, Python {facts['python']}, {facts['memory_bytes'] / 1e9:.1f} GB, {facts['cores']} cores"
    ]
    for name, layer in release.layers.items():
        sizes = f"send {layer.size_bytes / 1e6:.1f} MB, {layer.unpacked_bytes / 1e6:.1f} MB on its disk"
        lines.append(f"{name}: {sizes if name in missing else 'is there'}")
    lines.append(f"release {release.version} in place of {facts['current'] or 'nothing'}")
    settings = device.settings
    lines.append(f"agent {settings.agent} of site {settings.site}, broker {settings.broker.address}")
    return tuple(lines)
