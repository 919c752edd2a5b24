"""A user of the broker for each agent: the hash of its password goes into the users file, the password into its own."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from broker_config.errors import ConfigurationError
from broker_config.files import alone, ready_to_replace
from broker_config.users import add_user, remove_user
from broker_config.users import users as names_in

DEFAULT_USERS = Path("~/.config/kvbus/users")


def add_agent(users: Path, name: str, *, password_file: Path | None = None, password: str | None = None) -> Path:
    """Add a user, or give one a new password; the file that holds it (default: NAME.password beside the users).

    password: made at random if none is given. Raises ConfigurationError; what was there is there still.
    """
    target = password_file or _beside(users, name)
    secret = password if password is not None else secrets.token_urlsafe(24)
    with _changing(users, target):
        _add(users, name, secret, target)
    return target


def known_password_file(users: Path, name: str) -> Path | None:
    """The file beside the users that holds a user's password, None if there is no such user. Waits for who adds one.

    Raises ConfigurationError for a user whose password isn't there: whoever has it would be shut out by a new one.
    """
    kept = _beside(users, name)
    if not users.parent.exists():
        return None  # looking makes no folder
    try:
        with alone(users.parent):
            there, held = name in names_in(users), kept.exists()
    except OSError as error:
        raise ConfigurationError(f"can't read the users in {users}: {error.strerror or error}") from None
    if not there:
        return None
    if not held:
        raise ConfigurationError(
            f"{name} is a user in {users}, but its password is not in {kept}: put it there, or give it another "
            f"(coordinator add-agent {name} --users {users}), which shuts out who has the old one"
        )
    return kept


def password_file_of(users: Path, name: str) -> Path:
    """The same; a user that isn't there is added, once, whoever else asks for it. Raises ConfigurationError."""
    target = _beside(users, name)
    with _changing(users, target):
        kept = known_password_file(users, name)
        if kept is None:
            _add(users, name, secrets.token_urlsafe(24), target)
    return target


def remove_agent(users: Path, name: str) -> None:
    """Take a user away, and the file beside the users that holds its password. Raises ConfigurationError, also for a
    user that is not there.
    """
    kept = _beside(users, name)
    if name not in names_in(users):
        raise ConfigurationError(f"{users} has no user {name}")
    with _changing(users, kept):
        remove_user(users, name)
        kept.unlink(missing_ok=True)


def _beside(users: Path, name: str) -> Path:
    return users.parent / f"{name}.password"


def _add(users: Path, name: str, secret: str, target: Path) -> None:
    with ready_to_replace(target, f"{secret}\n".encode()):  # a full disk must not leave a user whom nobody can be
        add_user(users, name, secret)


@contextmanager
def _changing(users: Path, target: Path) -> Iterator[None]:
    """Alone with the users and their passwords, which change together."""
    try:
        with alone(users.parent):
            if not os.access(target.parent, os.W_OK):
                raise ConfigurationError(f"can't write {target}: no such folder, or it is not ours")
            yield
    except OSError as error:
        raise ConfigurationError(f"can't write {target}: {error.strerror or error}") from None
