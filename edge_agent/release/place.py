"""Where releases are on a device, and which of them is in use: every change is one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

from broker_config.files import sync
from edge_agent.release.errors import NothingInstalled, ReleaseInvalid, SystemFailed
from edge_agent.release.layers import UNFINISHED, forget_others, write_whole
from edge_agent.release.manifest import Release, read_release

MANIFEST, SIGNATURE, PUBLIC_KEY, CONFIGURATION, PASSWORD, COMMAND = (
    "release.json",
    "release.sig",
    "site.pub",
    "agent.toml",
    "password",
    "edge-agent",
)

_COMMAND = """#!{python} -I
import os, sys
here = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [os.path.join(here, "agent"), os.path.join(here, "runtime")]
sys.argv[0] = "edge-agent"
os.environ.setdefault("TYPER_USE_RICH", "0")  # a package for the looks of help, which stays on the laptop
from edge_agent.cli import app
app()
"""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A release that is in use until it is confirmed, or until its time is over.

    previous: to which to go back, None if there was none. boot: in which it began; until_s: by the clock since boot.
    """

    release: str
    previous: str | None
    boot: str
    until_s: float


@dataclass(frozen=True)
class Place:
    """Everything below one folder, /opt/kvbus on a device."""

    root: Path = field(default_factory=lambda: Path("/opt/kvbus"))

    @property
    def store(self) -> Path:
        """Of layers."""
        return self.root / "store"

    @property
    def releases(self) -> Path:
        """One folder for each."""
        return self.root / "releases"

    @property
    def key(self) -> Path:
        """The site's public key."""
        return self.root / PUBLIC_KEY

    @property
    def installer(self) -> Path:
        """This package, for the units of trials."""
        return self.root / "installer.pyz"

    @property
    def _trial(self) -> Path:
        return self.root / "trial.json"

    @property
    def _failure(self) -> Path:
        return self.root / "failure.txt"

    def current(self) -> str | None:
        """The release in use."""
        return self._linked("current")

    def previous(self) -> str | None:
        """The one before it."""
        return self._linked("previous")

    def use(self, link: str, name: str | None) -> None:
        """Let `current` or `previous` be another release, or none. Raises SystemFailed."""
        path = self.root / link
        try:
            if name is None:
                path.unlink(missing_ok=True)
            else:
                unfinished = self.root / f"{UNFINISHED}{link}"
                unfinished.unlink(missing_ok=True)
                unfinished.symlink_to(Path("releases") / name)
                unfinished.rename(path)
            sync(self.root)
        except OSError as error:
            raise SystemFailed(f"can't change {path}: {error.strerror or error}") from None

    def release(self, name: str) -> Release:
        """An installed one. Raises NothingInstalled, ReleaseInvalid."""
        try:
            return read_release((self.releases / name / MANIFEST).read_bytes())
        except OSError as error:
            raise NothingInstalled(f"no release {name} here: {error.strerror or error}") from None

    def names(self) -> tuple[str, ...]:
        """Of all that are whole, in order of their names."""
        found = self.releases.iterdir() if self.releases.is_dir() else ()
        return tuple(sorted(path.name for path in found if not path.name.startswith(UNFINISHED)))

    def add(self, release: Release, signature: bytes, own: Mapping[str, bytes], python: Path, group: int | None) -> str:
        """Make the folder of a release whose layers are in the store; its name. The same is made once only.

        own: agent.toml and password, this device's; where they name a file of the current release, this release's is
        meant. group: who may read them, besides root. Raises SystemFailed.
        """
        content = release.to_bytes()
        digest = sha256(content + b"".join(own[key] + b"\0" for key in sorted(own)) + str(python).encode())
        name = f"{release.version}-{release.digest[:6]}{digest.hexdigest()[:6]}"
        target, unfinished = self.releases / name, self.releases / f"{UNFINISHED}{name}"
        try:
            if target.is_dir():
                return name
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True, mode=0o755)
            write_whole(unfinished / MANIFEST, content)
            write_whole(unfinished / SIGNATURE, signature)
            write_whole(unfinished / COMMAND, _COMMAND.format(python=python).encode(), mode=0o755)
            for key, text in own.items():
                mine = text.replace(f"{self.root}/current/".encode(), f"{target}/".encode())
                write_whole(unfinished / key, mine, mode=0o640)
                if group is not None:
                    os.chown(unfinished / key, 0, group)
            for layer, each in release.layers.items():
                (unfinished / layer).symlink_to(Path("../../store") / each.sha256)
            sync(unfinished)
            unfinished.rename(target)
            sync(self.releases)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise SystemFailed(f"can't write release {name}: {error.strerror or error}") from None
        return name

    def forget_unused(self) -> int:
        """Remove all releases and layers but those of `current`, `previous` and a trial. Returns the bytes freed."""
        trial = self.trial()
        used = {self.current(), self.previous(), trial.release if trial else None, trial.previous if trial else None}
        for path in self.releases.iterdir() if self.releases.is_dir() else ():
            if path.name not in used:
                shutil.rmtree(path, ignore_errors=True)
        layers = {layer.sha256 for name in self.names() for layer in self.release(name).layers.values()}
        return forget_others(self.store, layers)

    def trial(self) -> Trial | None:
        """The one that is going on. Raises ReleaseInvalid for a file that can't be read."""
        try:
            return Trial(**json.loads(self._trial.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ReleaseInvalid(f"{self._trial} can't be read: {error}") from None

    def begin(self, trial: Trial) -> None:
        """Note it, before anything is changed. Raises SystemFailed."""
        with _saying("note the trial"):
            write_whole(self._trial, json.dumps(asdict(trial)).encode())
            self._failure.unlink(missing_ok=True)

    def end(self, failure: str | None = None) -> None:
        """It is over; a failure is kept to be asked for, if the disk has room for it. Raises SystemFailed."""
        with _saying("end the trial"):
            if failure is not None:
                with suppress(OSError):
                    write_whole(self._failure, failure.encode())
            self._trial.unlink(missing_ok=True)
            sync(self.root)

    def failure(self) -> str | None:
        """Why the last trial failed, unless one has begun since."""
        try:
            return self._failure.read_text(encoding="utf-8")
        except OSError:
            return None

    def _linked(self, link: str) -> str | None:
        try:
            return (self.root / link).readlink().name
        except OSError:
            return None


@contextmanager
def _saying(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SystemFailed(f"can't {what}: {error.strerror or error}") from None
