"""The errors of the link emulator, one tree.

LinkError
├── AddressInvalid     an address is not HOST:PORT
└── ListenRefused      the emulator can't listen where it was told to
"""

from __future__ import annotations


class LinkError(Exception):
    """Root of all errors of this package. str() is one line, fit for a person."""


class AddressInvalid(LinkError):
    """An address is not HOST:PORT."""

    def __init__(self, text: str) -> None:
        super().__init__(f"{text!r} is not an address; write HOST:PORT, for example 127.0.0.1:1883")
        self.text = text


class ListenRefused(LinkError):
    """The emulator can't listen where it was told to."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(f"can't listen on {address}: {why}; choose another address or port")
        self.address, self.why = address, why
