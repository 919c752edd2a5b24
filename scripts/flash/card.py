"""A boot medium whose first start installs an agent, without any network: Raspberry Pi OS, and JetPack's Ubuntu.

Raspberry Pi OS (from 2025-11 on) starts cloud-init with the files of its boot partition: what Raspberry Pi Imager has
written there, users, keys, Wi-Fi, stays, and one command is added. JetPack's Ubuntu has no cloud-init on its cards: a
unit of systemd is put into its root file system, in the image, before it is written to a card.
Either way the package of the device lies in a folder beside, which the first start installs and removes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from edge_agent.release.place import MANIFEST, PUBLIC_KEY, SIGNATURE
from scripts.flash.bundle import Bundle
from scripts.flash.device import Device
from scripts.flash.errors import CardRefused
from scripts.flash.media import Content, ExtImage, FatImage, Folder, Medium, partitions, read_back

BOOT_FOLDER = "/boot/firmware"
"""Where Raspberry Pi OS has its boot partition when it runs."""
ROOT_FOLDER = "opt/kvbus-package"
UNIT = "kvbus-first-start.service"
USER_DATA, META_DATA, KEPT = "user-data", "meta-data", "user-data.before-kvbus"
HEADER = "#cloud-config\n"
FIRMWARE_FILES = ("config.txt", "cmdline.txt")

_FIRST_START = """#!/bin/sh
# Written by kvbus: installs the agent that lies beside this file, and goes when it has.
here=$(cd "$(dirname "$0")" && pwd)
clear_up() {{
  rm -f "$here/{manifest}" && sync  # if the power goes from here on, the next start does nothing but the rest of this
  for each in "$here"/*; do
    [ "$each" = "$here/first-start.sh" ] || rm -rf "$each"  # the password, too
  done
  sync
  rm -rf "$here"
  systemctl disable --quiet {unit} 2> /dev/null
  rm -f /etc/systemd/system/{unit}
}}
if [ ! -e "$here/{manifest}" ]; then
  clear_up
  exit 0
fi
if ! python=$(command -v python{python}); then
  echo "no Python {python} on this device" | tee "$here/failed.txt" >&2
  exit 1
fi
if "$python" -I "$here/installer.pyz" install --keep --package "$here" 2> /run/kvbus-first-start; then
  clear_up
else
  tail -n 1 /run/kvbus-first-start | tee "$here/failed.txt" >&2
  exit 1
fi
"""

_UNIT = """# Written by kvbus.
[Unit]
Description=kvbus: install the agent at the first start
ConditionPathExists={folder}/first-start.sh
After=local-fs.target

[Service]
Type=oneshot
ExecStart=/bin/sh {folder}/first-start.sh
TimeoutStartSec=3600

[Install]
WantedBy=multi-user.target
"""

_BEGIN = f"""#!/bin/sh
# Written by kvbus, for cloud-init: a service installs the agent, and tries again at the next start if the power goes.
cp "$(dirname "$0")/{UNIT}" /etc/systemd/system/ && systemctl daemon-reload && systemctl enable --quiet {UNIT} &&
  systemctl start --no-block {UNIT}
"""
_COMMAND = f"test ! -e {BOOT_FOLDER}/kvbus/begin.sh || sh {BOOT_FOLDER}/kvbus/begin.sh"
"""At every start, early: what cloud-init does once (runcmd) is not done on a card that has been started before."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What was found, and what was put there. system: for people; nbytes: of all files."""

    system: str
    files: tuple[str, ...]
    nbytes: int


def customise(target: Path, bundle: Bundle, device: Device) -> Card:
    """Put an agent's installation on a mounted boot partition, or into an image; read it back.

    Raises CardRefused for anything else, and if it does not fit or reads back otherwise.
    """
    medium, raspberry = _medium(target)
    settings: dict[str, Content] = {}
    if raspberry:
        folder = "kvbus"
        settings = _cloud_init(medium)
        settings[f"{folder}/begin.sh"] = _BEGIN.encode()
        settings[f"{folder}/{UNIT}"] = _UNIT.format(folder=f"{BOOT_FOLDER}/{folder}").encode()
    else:
        folder = ROOT_FOLDER
        settings[f"etc/systemd/system/{UNIT}"] = _UNIT.format(folder=f"/{folder}").encode()
    files = {f"{folder}/{name}": content for name, content in package(bundle, device).items()}
    modes = dict.fromkeys(files, 0o600)
    files |= settings
    nbytes = sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in files.values())
    if isinstance(medium, Folder) and (free := shutil.disk_usage(medium.path).free) < nbytes:
        raise CardRefused(f"{free / 1e6:.0f} MB are free on {target}, {nbytes / 1e6:.0f} MB are needed")
    medium.write(files, modes)
    if isinstance(medium, ExtImage):
        medium.link(f"etc/systemd/system/multi-user.target.wants/{UNIT}", f"/etc/systemd/system/{UNIT}")
    read_back(medium, files)
    system = "Raspberry Pi OS (cloud-init)" if raspberry else "a root file system with systemd"
    return Card(system=system, files=tuple(files), nbytes=nbytes)


def package(bundle: Bundle, device: Device) -> dict[str, Content]:
    """All that the first start needs, by name."""
    release = bundle.release
    files: dict[str, Content] = {
        MANIFEST: release.to_bytes(),
        SIGNATURE: bundle.signature,
        PUBLIC_KEY: bundle.public_key,
        **device.own(),
        "installer.pyz": bundle.installer,
        "first-start.sh": _FIRST_START.format(python=release.python, unit=UNIT, manifest=MANIFEST).encode(),
    }
    for layer in release.layers.values():
        path = bundle.archive(layer)
        files[path.name] = path
    return files


def _medium(target: Path) -> tuple[Medium, bool]:
    """What to write to, and whether it is a Raspberry Pi's boot partition (else a root file system)."""
    if target.is_dir():
        if not any((target / name).exists() for name in FIRMWARE_FILES):
            raise CardRefused(
                f"{target} is no boot partition of Raspberry Pi OS: it has no {FIRMWARE_FILES[0]}; "
                "name the folder where the card's bootfs is mounted"
            )
        return Folder(target), True
    if not target.is_file():
        raise CardRefused(f"{target} is neither a folder (a card's mounted bootfs) nor a file (an image of a system)")
    found = partitions(target)
    for each in found:
        if isinstance(each, FatImage) and any(each.read(name) is not None for name in FIRMWARE_FILES):
            return each, True
    for each in found:
        if isinstance(each, ExtImage) and each.read("etc/os-release") is not None:
            return each, False
    raise CardRefused(f"{target} holds no boot partition of Raspberry Pi OS, and no root file system (ext4) of a Linux")


def _cloud_init(medium: Medium) -> dict[str, Content]:
    """user-data with one command more; what was there is kept beside it."""
    before = medium.read(USER_DATA)
    if before is None and medium.read(META_DATA) is None:
        raise CardRefused(
            "this Raspberry Pi OS has no cloud-init (releases before November 2025 have none): "
            "write a later one to the card, or flash over SSH"
        )
    data = _read_user_data(before or b"")
    commands = data.setdefault("bootcmd", [])
    if not isinstance(commands, list):
        raise CardRefused(f"{USER_DATA}: bootcmd is no list; mend it, or remove the file")
    files: dict[str, Content] = {}
    if _COMMAND not in commands:
        commands.append(_COMMAND)
        if before is not None:
            files[KEPT] = before
        files[USER_DATA] = (HEADER + yaml.safe_dump(data, sort_keys=False, allow_unicode=True)).encode()
    if medium.read(META_DATA) is None:
        files[META_DATA] = b"instance-id: kvbus\n"
    return files


def _read_user_data(content: bytes) -> dict[str, Any]:
    try:
        text = content.decode()
        data = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise CardRefused(f"{USER_DATA} on the card can't be read: {str(error).splitlines()[0]}") from None
    if data is None:
        return {}
    if not text.lstrip().startswith(HEADER.strip()) or not isinstance(data, dict):
        raise CardRefused(f"{USER_DATA} on the card is no cloud-config; move it away first")
    return data
