"""Media that files are put on without mounting anything: a folder that is mounted, FAT and ext4 inside an image.

Images need mtools (FAT) or e2fsprogs (ext4), and sfdisk, which finds the partition; no loop device, no root.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Protocol

from broker_config.files import sync
from scripts.flash.errors import CardRefused

SECTOR_BYTES = 512
ADMINISTRATORS = "/usr/sbin:/sbin"
"""Where e2fsprogs and sfdisk are, though not on everybody's path; they need no rights for a file of one's own."""
FAT_MAGIC, EXT_MAGIC = (b"FAT12", b"FAT16", b"FAT32"), b"\x53\xef"
_FAT_PLACES, _EXT_PLACE = (54, 82), 1080

Content = bytes | Path


class Medium(Protocol):
    """Files by names below its root, like kvbus/first-start.sh."""

    def read(self, name: str) -> bytes | None:
        """None if it isn't there."""

    def write(self, files: Mapping[str, Content], modes: Mapping[str, int]) -> None:
        """All of them, in place of what was there; folders are made. modes: of those that aren't 0o644."""

    def check(self) -> None:
        """Raises CardRefused if the file system is damaged."""


@dataclass(frozen=True)
class Folder:
    """A partition that is mounted (laptops do that with a card by themselves)."""

    path: Path

    def read(self, name: str) -> bytes | None:
        """See Medium; of the card, as far as the system can be told not to answer from memory."""
        try:
            with (self.path / name).open("rb") as file:
                if hasattr(os, "posix_fadvise"):  # not on macOS
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CardRefused(f"can't read {self.path / name}: {error.strerror or error}") from None

    def write(self, files: Mapping[str, Content], modes: Mapping[str, int]) -> None:
        """See Medium."""
        try:
            for name, content in files.items():
                target = self.path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    target.write_bytes(content)
                else:
                    shutil.copyfile(content, target)
                if name in modes:
                    target.chmod(modes[name])  # FAT knows none, and says nothing
                sync(target)
                sync(target.parent)
        except OSError as error:
            raise CardRefused(f"can't write to {self.path}: {error.strerror or error}") from None

    def check(self) -> None:
        """See Medium."""


@dataclass(frozen=True)
class FatImage:
    """A FAT file system at an offset in an image."""

    path: Path
    offset: int

    def read(self, name: str) -> bytes | None:
        """See Medium."""
        if not self._has(name):
            return None
        return _do(["mtype", "-i", self._where, f"::/{name}"])

    def write(self, files: Mapping[str, Content], modes: Mapping[str, int]) -> None:  # noqa: ARG002
        """See Medium; FAT knows no modes."""
        made: set[str] = set()
        with tempfile.TemporaryDirectory() as scratch:
            for name, content in files.items():
                for folder in [*reversed(PurePosixPath(name).parents)][1:]:
                    if str(folder) not in made and not self._has(str(folder)):
                        _do(["mmd", "-i", self._where, f"::/{folder}"])
                    made.add(str(folder))
                source = _as_file(content, Path(scratch))
                _do(["mcopy", "-o", "-Q", "-i", self._where, str(source), f"::/{name}"])

    def check(self) -> None:
        """See Medium."""
        _do(["minfo", "-i", self._where, "::"])

    @property
    def _where(self) -> str:
        return f"{self.path}@@{self.offset}"

    def _has(self, name: str) -> bool:
        return _run(["mdir", "-b", "-i", self._where, f"::/{name}"]).returncode == 0


@dataclass(frozen=True)
class ExtImage:
    """An ext4 file system at an offset in an image."""

    path: Path
    offset: int

    def read(self, name: str) -> bytes | None:
        """See Medium."""
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch) / "content"
            _do(["debugfs", "-R", f'dump "/{name}" "{target}"', self._where])
            return target.read_bytes() if target.exists() else None

    def write(self, files: Mapping[str, Content], modes: Mapping[str, int]) -> None:
        """See Medium."""
        with tempfile.TemporaryDirectory() as scratch:
            folders = dict.fromkeys(
                str(each) for name in files for each in [*reversed(PurePosixPath(name).parents)][1:]
            )
            lines = {f'mkdir "/{each}"': None for each in folders if not self._has(each)}  # a second one would be lost
            for number, (name, content) in enumerate(files.items()):
                part = Path(scratch) / str(number)
                part.mkdir()
                source = _as_file(content, part)
                mode = 0o100000 | modes.get(name, 0o644)
                lines |= {f'rm "/{name}"': None, f'write "{source}" "/{name}"': None}
                lines |= {
                    f'sif "/{name}" {field} {value}': None
                    for field, value in (("mode", f"0{mode:o}"), ("uid", 0), ("gid", 0))
                }
            script = Path(scratch) / "script"
            script.write_text("\n".join(lines) + "\n", encoding="utf-8")
            _do(["debugfs", "-w", "-f", str(script), self._where])

    def link(self, name: str, target: str) -> None:
        """A symbolic link, unless there is something of that name."""
        if not self._has(name):
            _do(["debugfs", "-w", "-R", f'symlink "/{name}" "{target}"', self._where])

    def _has(self, name: str) -> bool:
        return b"Inode:" in _do(["debugfs", "-R", f'stat "/{name}"', self._where])

    def check(self) -> None:
        """See Medium."""
        done = _run(["e2fsck", "-f", "-n", self._where])
        if done.returncode:
            said = done.stdout.decode(errors="replace").strip().splitlines()
            raise CardRefused(f"the file system in {self.path} is damaged: {said[-1] if said else 'e2fsck says so'}")

    @property
    def _where(self) -> str:
        return f"{self.path}?offset={self.offset}" if self.offset else str(self.path)


def read_back(medium: Medium, files: Mapping[str, Content]) -> None:
    """Compare what is there now with what was to be. Raises CardRefused for the first file that differs."""
    for name, content in files.items():
        found = medium.read(name)
        expected = content if isinstance(content, bytes) else content.read_bytes()
        if found is None or sha256(found).digest() != sha256(expected).digest():
            raise CardRefused(f"{name} was written, but reads otherwise: the card is full, or it fails")
    medium.check()


def partitions(image: Path) -> tuple[FatImage | ExtImage, ...]:
    """The file systems in an image that files can be put on: of its partitions, or its own. Raises CardRefused."""
    try:
        with image.open("rb") as file:
            offsets = [0, *_offsets(image)]
            return tuple(
                found for offset in offsets if (found := _file_system(image, file.fileno(), offset)) is not None
            )
    except OSError as error:
        raise CardRefused(f"can't read {image}: {error.strerror or error}") from None


def _offsets(image: Path) -> list[int]:
    done = _run(["sfdisk", "--json", str(image)])
    if done.returncode:
        return []  # no partition table
    table = json.loads(done.stdout)["partitiontable"]
    sector = int(table.get("sectorsize", SECTOR_BYTES))
    return [int(each["start"]) * sector for each in table.get("partitions", ())]


def _file_system(image: Path, number: int, offset: int) -> FatImage | ExtImage | None:
    head = os.pread(number, 2_048, offset)
    if head[_EXT_PLACE : _EXT_PLACE + 2] == EXT_MAGIC:
        return ExtImage(image, offset)
    if any(head[place : place + 5] in FAT_MAGIC for place in _FAT_PLACES):
        return FatImage(image, offset)
    return None


def _as_file(content: Content, folder: Path) -> Path:
    if isinstance(content, Path):
        return content.resolve()
    path = folder / "content"
    path.write_bytes(content)
    return path


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    path = f"{os.environ.get('PATH', os.defpath)}:{ADMINISTRATORS}"
    program = shutil.which(command[0], path=path)
    if program is None:
        raise CardRefused(f"{command[0]} is not installed (apt-get install mtools e2fsprogs fdisk)")
    return subprocess.run([program, *command[1:]], capture_output=True, check=False)


def _do(command: list[str]) -> bytes:
    done = _run(command)
    said = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode:
        raise CardRefused(f"{command[0]}: {said[-1] if said else f'code {done.returncode}'}")
    return done.stdout
