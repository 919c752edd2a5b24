"""A device's packages: the wheels of its Python and processor by pip, without what an agent never imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path

from scripts.flash.errors import BundleFailed

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.11", "3.12", "3.13")
GLIBC = ("2_28", "2_27", "2_26", "2_17")
"""Each is a platform of its own to pip; Raspberry Pi OS and Ubuntu from 2019 on have the newest of these."""

EXTRAS = ("device",)
NOT_IMPORTED = {
    "huggingface-hub": "tokenizers fetches models with it; an agent's are in its bundle",
    "protobuf": "onnxruntime's tools for preparing models",
    "flatbuffers": "onnxruntime's tools for preparing models",
    "sympy": "onnxruntime's tools for preparing models",
    "coloredlogs": "onnxruntime's tools for preparing models",
    "packaging": "onnxruntime's tools for preparing models",
    "rich": "typer prints help in colours with it, and without it plainly",
    "pycparser": "cffi compiles with it",
    "setuptools": "networkx and others once asked for it",
}
"""Packages that stay behind, with what needs only them, and why."""

UNUSED = (
    "*/tests/*",
    "*/test/*",
    "*.pyi",
    "*.pxd",
    "*.a",
    "*.h",
    "*.c",
    "*/__pycache__/*",
    "bin/*",
    "numpy/f2py/*",
    "numpy/_pyinstaller/*",
    "numpy/distutils/*",
    "onnxruntime/transformers/*",
    "onnxruntime/quantization/*",
    "onnxruntime/tools/*",
    "onnxruntime/datasets/*",
    "onnxruntime/backend/*",
    "onnxruntime/capi/libonnxruntime.so.*",
    "*.dist-info/RECORD",
    "*.dist-info/sboms/*",
    "*.dist-info/direct_url.json",
    "*.dist-info/REQUESTED",
    "*.dist-info/INSTALLER",
)
"""Files that stay behind, though not their licences. (onnxruntime's module for Python has all of libonnxruntime in it;
the library beside it is for programs in C.)"""


@dataclass(frozen=True, kw_only=True, order=True)
class Wheel:
    """One package, as pip chose it. url: where it is, if it was asked for by that, and "" if it is in an index."""

    name: str
    version: str
    sha256: str
    url: str = ""

    @property
    def pinned(self) -> str:
        """A line of requirements that nothing else can meet."""
        what = f"{self.name} @ {self.url}" if self.url else f"{self.name}=={self.version}"
        return f"{what} --hash=sha256:{self.sha256}"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What wheels are for. machine: as `uname -m` says it."""

    python: str
    machine: str = "aarch64"

    @property
    def options(self) -> list[str]:
        """Of pip."""
        platforms = [f"manylinux_{version}_{self.machine}" for version in GLIBC] + [f"manylinux2014_{self.machine}"]
        return [
            "--only-binary=:all:",
            "--implementation=cp",
            f"--python-version={self.python}",
            *(f"--platform={each}" for each in platforms),
        ]


def resolve(target: Target, requirements: Sequence[str] = ()) -> tuple[Wheel, ...]:
    """Which wheels an agent runs with there, by name, without downloading them.

    requirements: beside the project's own, to say otherwise where it matters (a build of onnxruntime for a GPU).
    Raises BundleFailed with pip's reason.
    """
    wanted, what = _requirements(requirements), f"wheels for {target.machine}, Python {target.python}"
    report = json.loads(
        _pip("install", "--dry-run", "--ignore-installed", "--report=-", "--constraint", ROOT / "constraints.txt",
             "--target", "/nonexistent", *target.options, *wanted, what=what)
    )  # fmt: skip
    found = {_plain(item["metadata"]["name"]): item for item in report["install"]}
    kept = _reached(found, wanted)
    return tuple(
        sorted(
            Wheel(
                name=name,
                version=found[name]["metadata"]["version"],
                sha256=found[name]["download_info"]["archive_info"]["hashes"]["sha256"],
                url=found[name]["download_info"]["url"] if found[name]["is_direct"] else "",
            )
            for name in kept
        )
    )


def question(target: Target, requirements: Sequence[str] = ()) -> tuple[object, ...]:
    """All that the answer of `resolve` hangs on, as long as every version is pinned."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return target.python, target.machine, _requirements(requirements), constraints, sorted(NOT_IMPORTED)


def unpack(target: Target, wheels: Sequence[Wheel], folder: Path) -> None:
    """Download wheels by their hashes and unpack them. Raises BundleFailed."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{wheel.pinned}\n" for wheel in wheels))
        file.flush()
        _pip("install", "--no-deps", "--no-compile", "--require-hashes", "--target", folder, *target.options,
             "-r", file.name, what=f"wheels for {target.machine}, Python {target.python}")  # fmt: skip


def is_unused(name: str) -> bool:
    """Whether no agent reads this file of a package."""
    return any(fnmatchcase(name, pattern) for pattern in UNUSED)


def _requirements(others: Sequence[str]) -> list[str]:
    """The project's own for a device, those replaced that `others` name."""
    named = {_name_of(each) for each in others}
    if any(name.startswith("onnxruntime-") for name in named):
        named.add("onnxruntime")  # builds for other processors have its module under names of their own
    own = []
    for line in metadata.requires("kvbus") or ():
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if (extra is None or extra[1] in EXTRAS) and _name_of(requirement) not in named:
            own.append(requirement.strip())
    return [*own, *others]


def _reached(found: dict[str, dict[str, object]], wanted: Sequence[str]) -> set[str]:
    """Names that the wanted need, not counting what only those left out need."""
    from packaging.requirements import Requirement  # noqa: PLC0415

    kept: set[str] = set()
    open_ = [_name_of(each) for each in wanted]
    while open_:
        name = open_.pop()
        if name in kept or name in NOT_IMPORTED or name not in found:
            continue
        kept.add(name)
        described = found[name]["metadata"]
        assert isinstance(described, dict)  # noqa: S101
        for line in described.get("requires_dist", ()):
            requirement = Requirement(line)
            if requirement.marker is None or "extra" not in str(requirement.marker):
                open_.append(_plain(requirement.name))
    return kept


def _name_of(requirement: str) -> str:
    return _plain(re.split(r"[\s\[<>=!~;@(]", requirement.strip(), maxsplit=1)[0])


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pip(*words: str | Path, what: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"pip ended with code {done.returncode}"
        raise BundleFailed(f"can't get {what}: {reason}")
    return done.stdout
