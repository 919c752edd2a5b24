"""The emulated device, running: its power can be cut, and it starts again with the disk it had."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.guest.image import USER, Image

MEMORY_MB, CORES = 1_024, 2
BOOT_S = 400.0
HOST = "10.0.2.2"
"""Under which the guest reaches us."""


class Machine:
    """One guest with a disk of its own over the image's; ssh on a port of 127.0.0.1. Emulated, so 10 to 50 times slower
    than the host.
    """

    def __init__(self, image: Image, folder: Path, *, boot: Path | None = None) -> None:
        """boot: an image that is its second disk."""
        self._image, self._folder, self._boot = image, folder, boot
        self._disk = folder / "disk.qcow2"
        self.console = folder / "console.log"
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(image.disk), str(self._disk)], check=True
        )

    def __enter__(self) -> Self:
        self.power_on()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.pull_plug()

    def power_on(self) -> None:
        """Start it, until ssh answers. Raises RuntimeError with the console's last lines."""
        with self.console.open("ab") as console:
            self._process = subprocess.Popen(
                [
                    "qemu-system-aarch64",
                    *("-M", "virt", "-cpu", "cortex-a72", "-accel", "tcg,thread=multi"),
                    *("-smp", str(CORES), "-m", str(MEMORY_MB)),
                    *("-kernel", str(self._image.kernel), "-initrd", str(self._image.ramdisk)),
                    *("-append", "root=/dev/vda rw console=ttyAMA0 quiet systemd.show_status=false"),
                    *("-drive", f"if=none,id=disk,format=qcow2,file={self._disk}"),
                    *("-device", "virtio-blk-pci,drive=disk"),
                    *(
                        (
                            "-drive",
                            f"if=none,id=boot,format=raw,file={self._boot}",
                            "-device",
                            "virtio-blk-pci,drive=boot",
                        )
                        if self._boot
                        else ()
                    ),
                    *("-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{self.port}-:22"),
                    *("-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci"),
                    *("-display", "none", "-monitor", "none", "-serial", "stdio", "-no-reboot"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + BOOT_S
        while self.ssh("true", timeout_s=20, check=False).returncode:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.pull_plug()
                raise RuntimeError(f"the guest does not start:\n{self.console.read_text(errors='replace')[-2000:]}")
            time.sleep(1)

    def pull_plug(self) -> None:
        """As when the power goes."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def ssh(self, command: str, *, timeout_s: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
        """What a command gives there. Raises RuntimeError if it fails and that matters."""
        try:
            done = subprocess.run(
                ["ssh", *self.options, "-p", str(self.port), f"{USER}@127.0.0.1", command],
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            done = subprocess.CompletedProcess(command, 255, "", f"no end within {timeout_s:g} s")
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.stderr.strip()[-1000:]}")
        return done

    @property
    def key(self) -> Path:
        """What lets us in."""
        return self._image.key

    @property
    def options(self) -> list[str]:
        """Of ssh."""
        settings = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=10")
        return ["-i", str(self._image.key), *(word for each in settings for word in ("-o", each))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
