"""The link emulator: a userspace TCP proxy between one agent and the broker that shapes each direction. No root."""

from __future__ import annotations

from scripts.link.bucket import Bucket
from scripts.link.emulated import EmulatedLink
from scripts.link.errors import AddressInvalid, LinkError, ListenRefused, TraceInvalid
from scripts.link.trace import Sample, Trace, follow, read_trace

__all__ = [
    "AddressInvalid",
    "Bucket",
    "EmulatedLink",
    "LinkError",
    "ListenRefused",
    "Sample",
    "Trace",
    "TraceInvalid",
    "follow",
    "read_trace",
]
