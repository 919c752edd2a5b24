"""A user of the broker for each agent: the hash of its password goes into the users file, the password into its own."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from broker_config.errors import ConfigurationError
from broker_config.files import write_whole
from broker_config.users import add_user
from broker_config.users import users as names_in

DEFAULT_USERS = Path("~/.config/kvbus/users")


def add_agent(users: Path, name: str, *, password_file: Path | None = None, password: str | None = None) -> Path:
    """Add a user, or give one a new password; the file that holds it (default: NAME.password beside the users).

    password: made at random if none is given. Raises ConfigurationError; what was there is there still.
    """
    target = password_file or users.parent / f"{name}.password"
    secret = password if password is not None else secrets.token_urlsafe(24)
    try:
        users.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise ConfigurationError(f"can't write {target}: no such folder, or it is not ours")
        add_user(users, name, secret)
        write_whole(target, f"{secret}\n".encode())
    except OSError as error:
        raise ConfigurationError(f"can't write {target}: {error.strerror or error}") from None
    return target


def password_file_of(users: Path, name: str) -> Path:
    """The file beside the users that holds a user's password; both are made unless they are there.

    Raises ConfigurationError.
    """
    kept = users.parent / f"{name}.password"
    return kept if name in names_in(users) and kept.exists() else add_agent(users, name)
