"""The errors of flashing, one tree. Each is one line for a person.

FlashError
├── BundleFailed         what a device needs can't be put together: no wheel for it, no model, no key
├── HostUnreachable      no route, no such name, nothing answers, or the link went away
├── HostDistrusted       the host's key is not the one that is known, or it does not let us in
├── HostUnfit            architecture, Python, disk, memory, clock, or the broker can't be reached from there
├── HostFailed           a step failed there; says which, and that the device is as it was
└── CardRefused          a boot medium is not one that can be customised
"""

from __future__ import annotations


class FlashError(Exception):
    """Root of all errors of this package. str() is one line, fit for a person."""


class BundleFailed(FlashError):
    """What a device needs can't be put together."""


class HostUnreachable(FlashError):
    """The host can't be reached, or not any more."""


class HostDistrusted(FlashError):
    """The host is another than it was, or does not trust us."""


class HostUnfit(FlashError):
    """An agent would not run there."""


class HostFailed(FlashError):
    """A step failed on the device."""


class CardRefused(FlashError):
    """A boot medium that can't be customised."""
