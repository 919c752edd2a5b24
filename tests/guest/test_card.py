"""A card that was customised offline: the device that starts from it is on the bus without anybody touching it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.prepare_model.cache import cache_root
from tests.guest.conftest import AGENT, Log
from tests.guest.image import Image, image, missing
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


async def test_a_device_joins_at_its_first_start(tmp_path: Path, tiny_bundle: Path) -> None:
    why = missing()
    if why:
        pytest.skip(f"{why} (see tests/guest/image.py)")
    async with running_site("amqtt", tmp_path, tiny_bundle) as site:
        await joins(site, tmp_path)


async def joins(site: Site, tmp_path: Path) -> None:
    log = Log()
    card = await asyncio.to_thread(copied, tmp_path)
    done = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scripts.flash", "image", str(card.disk), "--agent", AGENT, "--site", SITE),
        *("--broker", f"{HOST}:{site.port}", "--open-broker", "--python", "3.11"),
        *("--model", str(site.bundle), "--site-key", str(tmp_path / "site-key.pem")),
        *("--folder", str(cache_root() / "tests" / "device-bundle")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await done.communicate()
    assert done.returncode == 0, said.decode()
    log(said.decode().splitlines()[-1].replace(str(tmp_path), "~"))
    machine = Machine(card, tmp_path)
    try:
        await asyncio.to_thread(machine.power_on)
        for _ in range(8):  # the site waits a minute at a time
            try:
                state = await site.until(AGENT, lambda state: bool(state.presence and state.presence.state == "online"))
                break
            except TimeoutError:
                log(
                    machine.ssh(
                        "systemctl show kvbus-first-start -p ActiveState,SubState,Result --value"
                    ).stdout.replace("\n", " ")
                )
        else:
            pytest.fail(machine.ssh("sudo journalctl -u kvbus-first-start -u kvbus-agent --no-pager -o cat").stdout)
        assert state.presence is not None
        log(f"on the bus, software {state.presence.software}")
        await site.client.give(AGENT, "north", "The valve is in the north tower.")
        await site.until(AGENT, lambda state: ready(state) and bool(state.telemetry and state.telemetry.contexts))
        report = await site.client.ask("Which valve?", sources=[AGENT], receiver=AGENT)
        assert report.state == "answered", report.reason
        assert machine.ssh("ls -d /opt/kvbus-package 2>/dev/null || true").stdout == ""
        assert machine.ssh("systemctl is-active kvbus-agent").stdout.strip() == "active"
    finally:
        machine.pull_plug()
        shutil.rmtree(tmp_path / "card")
