"""The users of a broker, in Mosquitto's password-file format, so that one file serves both brokers.

A line is `name:$7$iterations$salt$hash`, PBKDF2-HMAC-SHA512 with salt and hash in base64. Nothing but the standard
library is needed to write or to check one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from broker_config.errors import ConfigurationError
from broker_config.files import alone, write_whole

ITERATIONS = 20_000  # some 10 ms on a laptop; the passwords are random, and agents reconnect in storms
SALT_BYTES = 12  # Mosquitto 2.0 takes no other length
HASH_BYTES = 64

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LINE = re.compile(
    r"(?P<name>[^:]+):\$7\$(?P<iterations>\d{1,8})\$(?P<salt>[A-Za-z0-9+/=]+)\$(?P<hash>[A-Za-z0-9+/=]+)"
)


def add_user(path: Path, name: str, password: str) -> None:
    """Add a user, or give an existing one a new password. The file is replaced at once and readable by us only; whoever
    changes it at the same time loses nothing.

    Raises ConfigurationError for a name that can't be one, an empty password, or a file that can't be written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"{name!r} can't be a user: letters, digits, '.', '_' and '-', 64 at most")
    if not password or "\n" in password or "\0" in password:
        raise ConfigurationError(f"the password of {name} must be one line and not empty")
    salt = secrets.token_bytes(SALT_BYTES)
    digest = _hash(password, salt, ITERATIONS)
    fields = ["", "7", str(ITERATIONS), base64.b64encode(salt).decode(), base64.b64encode(digest).decode()]
    with _changing(path):
        kept = [line for line in _lines(path) if line.partition(":")[0] != name]
        _write(path, [*kept, f"{name}:{'$'.join(fields)}"])


def remove_user(path: Path, name: str) -> bool:
    """Remove a user. Returns whether there was one. Raises ConfigurationError if the file can't be written."""
    with _changing(path):
        lines = _lines(path)
        kept = [line for line in lines if line.partition(":")[0] != name]
        if len(kept) < len(lines):
            _write(path, kept)
    return len(kept) < len(lines)


def users(path: Path) -> tuple[str, ...]:
    """The names in a file, none if there is no such file. Raises ConfigurationError if it can't be read."""
    return tuple(line.partition(":")[0] for line in _lines(path) if _LINE.fullmatch(line))


def verify(path: Path, name: str, password: str) -> bool:
    """Whether this is a user's password. Takes as long for a name that isn't there; reads the file each time.

    Raises ConfigurationError if the file can't be read.
    """
    found = next((match for match in map(_LINE.fullmatch, _lines(path)) if match and match["name"] == name), None)
    try:
        salt = base64.b64decode(found["salt"], validate=True) if found else b"\0" * SALT_BYTES
        expected = base64.b64decode(found["hash"], validate=True) if found else b"\0" * HASH_BYTES
    except binascii.Error:
        return False
    digest = _hash(password, salt, int(found["iterations"]) if found else ITERATIONS)
    return hmac.compare_digest(digest, expected) and found is not None


def _hash(password: str, salt: bytes, iterations: int) -> bytes:
    return hashlib.pbkdf2_hmac("sha512", password.encode(), salt, max(1, iterations), HASH_BYTES)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"can't read the users in {path}: {error}") from None


def _write(path: Path, lines: list[str]) -> None:
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    try:
        with alone(path.parent):
            yield
    except OSError as error:
        raise ConfigurationError(f"can't write the users to {path}: {error.strerror or error}") from None
