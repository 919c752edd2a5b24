"""The guest's disk, kernel and initial ramdisk, made of Debian's packages and kept in the cache.

Needs root, and of Debian: mmdebstrap arch-test qemu-user-static kmod cpio e2fsprogs. Some four minutes the first time.
`python -m tests.guest.image` makes it.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from scripts.prepare_model.cache import cache_root

MIRROR = "http://deb.debian.org/debian"
USER = "pi"
DISK_BYTES = 3_000_000_000
TOOLS = ("mmdebstrap", "arch-test", "depmod", "cpio", "mkfs.ext4", "qemu-img", "qemu-system-aarch64", "ssh-keygen")
SUITES = {"bookworm": (), "trixie": ("cloud-init",)}
"""Of Debian, and what each has beside: 13 is what Raspberry Pi OS is made of, with its way of setting cards up."""
PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "udev",
    "kmod",
    "openssh-server",
    "sudo",
    "python3",
    "iproute2",
    "busybox-static",
)
UNREAD = ("doc", "man", "locale", "info")
MODULES = (
    *("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng"),
    *("ext4", "crc32c_generic", "autofs4", "vfat", "nls_cp437", "nls_ascii", "nls_utf8"),
)
AT_START = ("virtio_pci", "virtio_mmio", "virtio_blk", "crc32c_generic", "ext4")
NETWORK = "[Match]\nName=en* eth*\n[Network]\nDHCP=ipv4\nIPv6AcceptRA=no\nLinkLocalAddressing=no\n"
INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for module in {modules}; do /bin/busybox insmod /modules/$module; done
while [ ! -b /dev/vda ]; do /bin/busybox sleep 0.2; done
/bin/busybox mount -t ext4 /dev/vda /root || exec /bin/busybox sh
exec /bin/busybox switch_root /root /sbin/init
"""


@dataclass(frozen=True)
class Image:
    """Where its files are. key: the private half of what `pi` is let in with."""

    folder: Path

    @property
    def disk(self) -> Path:
        return self.folder / "disk.img"

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def ramdisk(self) -> Path:
        return self.folder / "initrd.gz"

    @property
    def key(self) -> Path:
        return self.folder / "id_ed25519"


def missing() -> str:
    """Why it can't be made here; empty if it can."""
    if os.geteuid():
        return "an arm64 guest is made by root only"
    tools = [tool for tool in TOOLS if shutil.which(tool) is None]
    if tools:
        return f"not installed: {' '.join(tools)}"
    done = subprocess.run(["arch-test", "arm64"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else "programs for arm64 don't run here (qemu-user-static, binfmt_misc)"


def image(suite: str = "bookworm") -> Image:
    """The image of this version of the recipe, made if it isn't in the cache."""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    home = cache_root() / "tests"
    target = home / f"guest-{suite}-{recipe}"
    if not target.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=".tmp-guest-") as scratch:
            made = Path(scratch) / "guest"
            made.mkdir()
            _make(made, Path(scratch), suite)
            made.rename(target)
        for old in home.glob("guest-*"):
            if not old.name.endswith(recipe):
                shutil.rmtree(old, ignore_errors=True)
    return Image(target)


def _make(made: Path, scratch: Path, suite: str) -> None:
    out = Image(made)
    _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", out.key)
    root = scratch / "root"
    fetch = (
        f'export APT_CONFIG=$MMDEBSTRAP_APT_CONFIG; cd "{scratch}"; '
        "apt-get download $(apt-cache depends linux-image-arm64 | sed -n 's/.*Depends: //p' | head -1)"
    )
    _do(
        "mmdebstrap",
        "--quiet",
        "--mode=root",
        "--variant=minbase",
        "--architectures=arm64",
        f"--include={','.join((*PACKAGES, *SUITES[suite]))}",
        *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in UNREAD),
        '--aptopt=Acquire::Languages "none"',
        f"--customize-hook={fetch}",
        f'--customize-hook=chroot "$1" useradd --create-home --shell /bin/bash {USER}',
        suite,
        root,
        MIRROR,
    )
    (package,) = scratch.glob("linux-image-*.deb")
    (scratch / "kernel" / "usr" / "lib").mkdir(parents=True)
    (scratch / "kernel" / "lib").symlink_to("usr/lib")  # its modules are in either, by suite
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE, check=True)
    subprocess.run(
        ["tar", "-x", "--keep-directory-symlink", "-C", str(scratch / "kernel")], input=unpacked.stdout, check=True
    )
    (kernel,) = (scratch / "kernel" / "boot").glob("vmlinuz-*")
    version = kernel.name.removeprefix("vmlinuz-")
    shutil.copy(kernel, out.kernel)
    _do("depmod", "-b", scratch / "kernel", version)
    modules = scratch / "kernel" / "lib" / "modules" / version
    wanted = _with_dependencies(modules, MODULES)
    for path in wanted:
        target = root / "lib" / "modules" / version / path.relative_to(modules)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(modules / name, root / "lib" / "modules" / version)
    _do("depmod", "-b", root, version)
    _ramdisk(out.ramdisk, scratch / "ramdisk", root / "bin" / "busybox", _with_dependencies(modules, AT_START))
    _settle_in(root, out.key.with_suffix(".pub").read_text(encoding="ascii"))
    if "cloud-init" in SUITES[suite]:
        _as_raspberry_pi_os(root)
    with out.disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    _do("mkfs.ext4", "-q", "-F", "-L", "root", "-d", root, out.disk)


def _settle_in(root: Path, key: str) -> None:
    """A network, a user who may become root, no host name of the machine that made it."""
    for path, text in (
        ("etc/fstab", "/dev/vda / ext4 defaults 0 1\n"),
        ("etc/hostname", "guest\n"),
        ("etc/hosts", "127.0.0.1 localhost guest\n"),
        ("etc/systemd/network/10-wired.network", NETWORK),
        (f"etc/sudoers.d/{USER}", f"{USER} ALL=(ALL) NOPASSWD: ALL\n"),
        (f"home/{USER}/.ssh/authorized_keys", key),
    ):
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    (root / "etc/sudoers.d" / USER).chmod(0o440)
    _do("chroot", root, "systemctl", "enable", "--quiet", "systemd-networkd", "ssh")
    _do("chroot", root, "systemctl", "mask", "--quiet", "apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_reap")
    _do("chroot", root, "chown", "-R", f"{USER}:{USER}", f"/home/{USER}")


def _as_raspberry_pi_os(root: Path) -> None:
    """Its boot partition is the second disk, and cloud-init reads that, as pi-gen sets it up."""
    seed = "datasource_list: [ NoCloud, None ]\ndatasource:\n  NoCloud:\n    seedfrom: file:///boot/firmware\n"
    left_alone = "ssh_deletekeys: false\nssh_genkeytypes: []\nnetwork: {config: disabled}\n"
    for path, text in (
        ("etc/fstab", "/dev/vda / ext4 defaults 0 1\n/dev/vdb /boot/firmware vfat defaults 0 2\n"),
        ("etc/cloud/cloud.cfg.d/99_raspberry-pi.cfg", seed + left_alone),
        ("etc/systemd/system/cloud-init-local.service.d/boot.conf", "[Unit]\nRequiresMountsFor=/boot/firmware\n"),
    ):
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    (root / "boot/firmware").mkdir(parents=True, exist_ok=True)


def _with_dependencies(modules: Path, names: tuple[str, ...]) -> list[Path]:
    """Files of modules, each after those that it needs."""
    needs = {}
    for line in (modules / "modules.dep").read_text(encoding="utf-8").splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    by_name = {Path(path).name.partition(".ko")[0].replace("-", "_"): path for path in needs}
    found: dict[str, None] = {}
    for path in (by_name[name] for name in names if name in by_name):  # some are part of the kernel itself
        found.update(dict.fromkeys([*reversed(needs[path]), path]))
    return [modules / path for path in found]


def _ramdisk(target: Path, folder: Path, busybox: Path, modules: list[Path]) -> None:
    (folder / "bin").mkdir(parents=True)
    (folder / "modules").mkdir()
    shutil.copy(busybox, folder / "bin" / "busybox")
    for path in modules:
        shutil.copy(path, folder / "modules")
    (folder / "init").write_text(INIT.format(modules=" ".join(path.name for path in modules)), encoding="ascii")
    (folder / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(folder)) for path in sorted(folder.rglob("*"))).encode()
    packed = subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], input=names, cwd=folder, stdout=-1, check=True)
    target.write_bytes(gzip.compress(packed.stdout, 1))


def _do(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")


if __name__ == "__main__":
    for name in SUITES:
        print(missing() or image(name).folder)  # noqa: T201
