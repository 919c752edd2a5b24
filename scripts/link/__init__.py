"""The link emulator: a userspace TCP proxy between one agent and the broker that shapes each direction. No root."""

from __future__ import annotations

from scripts.link.bucket import Bucket
from scripts.link.emulated import EmulatedLink
from scripts.link.errors import AddressInvalid, LinkError, ListenRefused
from scripts.link.following import follow

__all__ = [
    "AddressInvalid",
    "Bucket",
    "EmulatedLink",
    "LinkError",
    "ListenRefused",
    "follow",
]
