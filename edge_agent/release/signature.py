"""Whether a manifest is signed by the site that a device belongs to (Ed25519)."""

from __future__ import annotations

import sys
from pathlib import Path

from edge_agent.release.errors import SignatureWrong, SystemFailed

KEY_BYTES = 32
SIGNATURE_BYTES = 64


def check_signature(content: bytes, signature: bytes, key: bytes) -> None:
    """Raises SignatureWrong unless the signature of these bytes was made with the private half of this public key.

    Raises SystemFailed where `cryptography` is not installed.
    """
    try:
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415  not there before the first release is
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415
    except ImportError as error:
        raise SystemFailed(
            f"can't check the signature ({error}): the Python of the release in use is gone; unflash the device "
            "and flash it anew"
        ) from None
    if len(key) != KEY_BYTES:
        raise SignatureWrong(f"the site's key on this device is damaged ({len(key)} bytes); unflash it and flash anew")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, content)
    except InvalidSignature:
        raise SignatureWrong(
            "the release is not signed by the site that this device belongs to; "
            "flash it from the laptop that flashed it first, or unflash it there"
        ) from None


def add_packages(runtime: Path) -> None:
    """Make the packages of an installed runtime importable. The program must run on that runtime's Python."""
    sys.path.append(str(runtime))
