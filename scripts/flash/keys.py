"""The site's key (Ed25519): with its private half releases are signed; devices keep the public one."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from broker_config.files import alone, write_whole
from scripts.flash.errors import BundleFailed

DEFAULT_KEY = Path("~/.config/kvbus/site-key.pem")


class SiteKey:
    """Signs manifests of releases."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

    def sign(self, content: bytes) -> bytes:
        """64 bytes."""
        return self._private.sign(content)

    @property
    def public(self) -> bytes:
        """32 bytes, as devices keep them."""
        return self._private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def site_key(path: Path) -> SiteKey:
    """Read the key, or make one that only its owner may read. Raises BundleFailed."""
    path = path.expanduser()
    try:
        with alone(path.parent):  # of two first flashes one makes it
            if not path.exists():
                private = Ed25519PrivateKey.generate()
                write_whole(path, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
                return SiteKey(private)
        found = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise BundleFailed(f"can't use the site's key {path}: {error.strerror or error}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BundleFailed(f"{path} is no private key: {error}") from None
    if not isinstance(found, Ed25519PrivateKey):
        raise BundleFailed(f"{path} is no Ed25519 key")
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise BundleFailed(f"others may read {path}; `chmod 600` it")
    return SiteKey(found)
