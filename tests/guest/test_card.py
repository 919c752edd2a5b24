"""A card that was customised offline: the device that starts from it is on the bus without anybody touching it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from scripts.flash.card import UNIT
from scripts.prepare_model.cache import cache_root
from tests.guest.conftest import AGENT, Log
from tests.guest.image import USER, Image, image, missing
from tests.guest.machine import HOST, Machine
from tests.integration.conftest import SITE, Site, ready, running_site

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1_800)]


def copied(folder: Path) -> Image:
    """The guest's image with a disk of its own."""
    found, own = image(), folder / "card"
    own.mkdir()
    for path in (found.kernel, found.ramdisk, found.key):
        (own / path.name).symlink_to(path)
    subprocess.run(["cp", "--sparse=always", str(found.disk), str(own / found.disk.name)], check=True)
    return Image(own)


@dataclass
class Bench:
    """A site that waits for a device, and what makes its card."""

    site: Site
    folder: Path
    log: Log

    async def customise(self, card: Path, python: str) -> None:
        """As `make image` does."""
        done = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "scripts.flash", "image", str(card), "--agent", AGENT, "--site", SITE),
            *("--broker", f"{HOST}:{self.site.port}", "--open-broker", "--python", python),
            *("--model", str(self.site.bundle), "--site-key", str(self.folder / "site-key.pem")),
            *("--folder", str(cache_root() / "tests" / "device-bundle")),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await done.communicate()
        assert done.returncode == 0, said.decode()
        self.log(said.decode().splitlines()[-1].replace(str(self.folder), "~"))

    async def joins(self, machine: Machine) -> None:
        """Without anybody touching it, and it answers."""
        for _ in range(8):  # the site waits a minute at a time
            try:
                state = await self.site.until(
                    AGENT, lambda state: bool(state.presence and state.presence.state == "online")
                )
                break
            except TimeoutError:
                said = machine.ssh(f"systemctl show {UNIT} -p ActiveState,SubState,Result --value").stdout
                self.log(said.replace("\n", " "))
        else:
            pytest.fail(machine.ssh(f"sudo journalctl -u {UNIT} -u kvbus-agent --no-pager -o cat").stdout)
        assert state.presence is not None
        self.log(f"on the bus, software {state.presence.software}")
        await self.site.client.give(AGENT, "north", "The valve is in the north tower.")
        await self.site.until(AGENT, lambda state: ready(state) and bool(state.telemetry and state.telemetry.contexts))
        report = await self.site.client.ask("Which valve?", sources=[AGENT], receiver=AGENT)
        assert report.state == "answered", report.reason
        assert machine.ssh("systemctl is-active kvbus-agent").stdout.strip() == "active"
        left = f"ls -d /opt/kvbus-package /boot/firmware/kvbus /etc/systemd/system/{UNIT} 2>/dev/null || true"
        assert machine.ssh(left).stdout == ""
        self.log("it answered; nothing of the package is left")


@pytest.fixture
async def bench(tmp_path: Path, tiny_bundle: Path) -> AsyncIterator[Bench]:
    why = missing()
    if why:
        pytest.skip(f"{why} (see tests/guest/image.py)")
    async with running_site("amqtt", tmp_path, tiny_bundle) as site:
        yield Bench(site, tmp_path, Log())


async def test_a_root_file_system_joins_at_its_first_start(bench: Bench, tmp_path: Path) -> None:
    """As JetPack's Ubuntu is customised."""
    card = await asyncio.to_thread(copied, tmp_path)
    await bench.customise(card.disk, "3.11")
    machine = Machine(card, tmp_path)
    try:
        await asyncio.to_thread(machine.power_on)
        await bench.joins(machine)
    finally:
        machine.pull_plug()
        shutil.rmtree(tmp_path / "card")


@pytest.mark.parametrize("before", [False, True], ids=["fresh", "started before, and cut"])
async def test_a_boot_partition_joins_by_cloud_init(bench: Bench, tmp_path: Path, before: bool) -> None:
    """As Raspberry Pi OS is customised, by the cloud-init of the Debian that it is made of."""
    found = await asyncio.to_thread(image, "trixie")
    card = bootfs(tmp_path / "bootfs.img", found.key.with_suffix(".pub").read_text(encoding="ascii"))
    machine = Machine(found, tmp_path, boot=card)
    try:
        if before:
            await asyncio.to_thread(machine.power_on)
            await asyncio.to_thread(machine.ssh, "cloud-init status --wait", timeout_s=400)
            assert machine.ssh("hostname").stdout.strip() == "shed"
            machine.ssh("sudo sync")
            machine.pull_plug()
            bench.log("started once, with its owner's settings alone")
        await bench.customise(card, "3.13")
        await asyncio.to_thread(machine.power_on)
        if before:
            await until(machine, f"test $(systemctl is-active {UNIT}) = activating && ls /opt/kvbus/store/* >/dev/null")
            machine.pull_plug()
            bench.log("power cut while it was installed")
            await asyncio.to_thread(machine.power_on)
        await bench.joins(machine)
        assert machine.ssh("hostname").stdout.strip() == "shed"
        assert machine.ssh("cat /var/lib/owner").stdout == "once\n"
        await asyncio.to_thread(machine.pull_plug)
        await asyncio.to_thread(machine.power_on)
        said = machine.ssh("cloud-init status --wait --long", timeout_s=400, check=False).stdout
        assert "status: done" in said
        assert "errors: []" in said
        bench.log("started again; cloud-init has nothing to complain of")
    finally:
        machine.pull_plug()


def bootfs(path: Path, key: str) -> Path:
    """A boot partition as Imager leaves it: its owner's host name, user and commands."""
    own = {
        "hostname": "shed",
        "users": [{"name": USER, "ssh_authorized_keys": [key.strip()], "sudo": "ALL=(ALL) NOPASSWD:ALL"}],
        "runcmd": [["sh", "-c", "echo once >> /var/lib/owner"]],
        "resize_rootfs": False,  # the guest's disk has one size, and no partitions
    }
    with path.open("wb") as file:
        file.truncate(128 << 20)
    files = {
        "config.txt": "arm_64bit=1\n",
        "meta-data": "instance-id: rpi-imager-1\n",
        "user-data": "#cloud-config\n" + yaml.safe_dump(own),
    }
    subprocess.run(["mformat", "-i", str(path), "-F", "-v", "bootfs", "::"], check=True)
    for name, text in files.items():
        subprocess.run(["mcopy", "-i", str(path), "-", f"::/{name}"], input=text.encode(), check=True)
    return path


async def until(machine: Machine, command: str) -> None:
    """It succeeds there."""
    async with asyncio.timeout(300):
        while machine.ssh(command, check=False).returncode:  # noqa: ASYNC110  (there is nobody to tell us)
            await asyncio.sleep(1)
