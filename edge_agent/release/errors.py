"""The errors of installing releases, one tree. Each is one line for a person.

ReleaseError
├── ReleaseInvalid       a manifest can't be read, or is of a format this program does not know
├── SignatureWrong       a manifest is signed by another site's key, or by none
├── LayerDamaged         a layer is not the one that the manifest names, or holds what no layer may hold
├── DeviceUnfit          the machine, its Python or its disk is not what a release needs
├── DeviceBusy           another flash is at work on this device
├── NothingInstalled     there is no release to go back to, or none at all
└── SystemFailed         a command of the system failed, or a file could not be written
"""

from __future__ import annotations

from pathlib import Path


class ReleaseError(Exception):
    """Root of all errors of this package. str() is one line, fit for a person."""


class ReleaseInvalid(ReleaseError):
    """A manifest can't be read, or is of another format."""


class SignatureWrong(ReleaseError):
    """A manifest isn't signed by the site that this device belongs to."""


class LayerDamaged(ReleaseError):
    """A layer isn't what the manifest says. archive: the file that it isn't in."""

    def __init__(self, text: str, archive: Path | None = None) -> None:
        super().__init__(text)
        self.archive = archive


class DeviceUnfit(ReleaseError):
    """A release can't run here."""


class DeviceBusy(ReleaseError):
    """Another flash is at work."""


class NothingInstalled(ReleaseError):
    """There is no such release here."""


class SystemFailed(ReleaseError):
    """The system refused something."""
