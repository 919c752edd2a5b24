"""One device over SSH, by fabric: commands, root's too, and files that are sent on from where a cut link left them."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import paramiko
import psutil
from fabric import Connection
from invoke.exceptions import CommandTimedOut, ThreadException
from paramiko.hostkeys import HostKeyEntry, InvalidHostKey

from broker_config.files import alone
from scripts.flash.errors import HostDistrusted, HostFailed, HostUnreachable

KNOWN_HOSTS = Path("~/.ssh/known_hosts")
CONNECT_S, COMMAND_S = 15.0, 120.0
ALIVE_S = 10
"""Between two signs of life. Two that stay out are a link that went away."""
PATIENCE_S = 75.0
"""Until a device has noticed that a link went away."""
ATTEMPTS, PAUSE_S = 5, 3.0
"""To take up a transfer again."""
BLOCK_BYTES = 1 << 18
SILENT_MS = 30_000
"""Without a word from the other side though something was sent: the link has gone without anybody saying so."""
SFTP_S = 60.0
"""Longest between two answers about files."""
ON_THE_WAY_BYTES = 1 << 18
"""Of what is sent, so that signs of life aren't stuck behind minutes of it on a slow link."""

logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # it logs tracebacks of what we say in a line

Line = Callable[[dict[str, Any]], None]


class Host:
    """name: [user@]host[:port], or one of ~/.ssh/config. key: a private key's file; else the agent's and ~/.ssh's.

    sudo: the password that sudo asks for there, if it asks. Raises HostUnreachable, HostDistrusted wherever it talks to
    the device.
    """

    def __init__(
        self, name: str, *, key: Path | None = None, known_hosts: Path = KNOWN_HOSTS, sudo: str | None = None
    ) -> None:
        self.name = name
        self._key, self._known, self._sudo = key, known_hosts.expanduser(), sudo
        self._held: paramiko.Channel | None = None
        self._holding = ""
        self._connection = self._connect()
        self._sftp: paramiko.SFTPClient | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the device."""
        if self._held is not None:
            self._held.close()
        self._connection.close()

    @property
    def local_address(self) -> str:
        """Ours, as the device sees it; loopback's if that can't be told (through another host, say)."""
        sock = _socket(self._connection)
        return _of_ipv4(str(sock.getsockname()[0])) if sock is not None else "127.0.0.1"

    def reconnect(self) -> None:
        """After a link went away. What we hold there is held again, once the device has noticed that we were away."""
        self.close()
        self._connection = self._connect()
        self._sftp = None
        deadline_s = time.monotonic() + PATIENCE_S
        while self._holding:
            try:
                self.hold(self._holding)
            except HostFailed:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(PAUSE_S)
            else:
                break

    def run(self, command: str, *, root: bool = False, timeout_s: float = COMMAND_S, line: Line | None = None) -> str:
        """What a command prints. line: takes each JSON object of its output as it comes.

        Raises HostFailed with the last line that it said on standard error, if it ended with another code than 0.
        """
        self._still_there()
        sink = _Lines(line) if line else StringIO()
        secret = StringIO(f"{self._sudo}\n") if root and self._sudo is not None else False
        try:
            done = self._connection.run(
                self._as_root(command) if root else command,
                hide=True,
                warn=True,
                in_stream=secret,
                out_stream=sink,
                err_stream=StringIO(),
                timeout=int(timeout_s),
            )
        except CommandTimedOut:
            raise HostFailed(f"{self.name}: no answer within {timeout_s:.0f} s to `{command[:60]}`") from None
        except (OSError, EOFError, paramiko.SSHException, ThreadException) as error:
            raise HostUnreachable(f"{self.name}: the link went away: {_said(error)}") from None
        if done.exited == -1:
            raise HostUnreachable(f"{self.name}: the link went away")
        if done.exited:
            said = (done.stderr or done.stdout).strip().splitlines()
            reason = said[-1] if said else f"`{command[:60]}` ended with code {done.exited}"
            raise HostFailed(f"{self.name}: {_sudo_words(reason.removeprefix('kvbus: '))}")
        text: str = done.stdout
        return text

    def insist(self, command: str, *, timeout_s: float = COMMAND_S) -> str:
        """The same of root's, given again if its answer was lost with the link: for what may be done twice."""
        for attempt in range(ATTEMPTS):
            try:
                if attempt:
                    time.sleep(PAUSE_S * attempt)
                    self.reconnect()
                return self.run(command, root=True, timeout_s=timeout_s)
            except HostUnreachable as error:
                last = error
        raise last

    def ask(self, command: str, *, root: bool = False, timeout_s: float = COMMAND_S) -> dict[str, Any]:
        """The JSON object that a command prints last. Raises as `run` does."""
        lines = [line for line in self.run(command, root=root, timeout_s=timeout_s).splitlines() if line.strip()]
        try:
            found: dict[str, Any] = json.loads(lines[-1])
        except (IndexError, ValueError):
            raise HostFailed(f"{self.name}: no answer to `{command[:60]}`, but: {lines[-1:]}") from None
        return found

    def hold(self, command: str) -> None:
        """Keep a command of root's running that says {"held": true}, and gets a sign of life as long as we are there.

        Raises HostFailed.
        """
        transport = self._connection.transport
        assert transport is not None  # noqa: S101
        try:
            channel = transport.open_session(timeout=CONNECT_S)
            channel.settimeout(CONNECT_S * 4)
            channel.exec_command(self._as_root(command))
            if self._sudo is not None:
                channel.sendall(f"{self._sudo}\n".encode())
            said = channel.makefile("r").readline()
            if '"held"' not in said:
                reason = channel.makefile_stderr("r").read().decode(errors="replace").strip().splitlines()
                raise HostFailed(f"{self.name}: {reason[-1].removeprefix('kvbus: ') if reason else 'no answer'}")
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise HostUnreachable(f"{self.name}: the link went away: {_said(error)}") from None
        self._held, self._holding = channel, command
        threading.Thread(target=_keep_alive, args=(channel,), name="signs of life", daemon=True).start()

    def send(self, source: Path, target: str, said: Callable[[int], None], *, again: Callable[[str], None]) -> int:
        """Put a file there, on from where an earlier attempt ended; if the link is cut, some more times. Bytes sent.

        target is there only when it is whole. said: bytes that are there by now. again: hears why it has to go on.
        """
        sent = 0

        def counted(there: int, nbytes: int) -> None:
            nonlocal sent
            sent += nbytes
            said(there)

        for attempt in range(ATTEMPTS):
            try:
                self._send(source, target, counted)
            except (OSError, EOFError, paramiko.SSHException, HostUnreachable) as error:
                if isinstance(error, OSError) and not isinstance(error, TimeoutError) and self._is_there():
                    raise HostFailed(  # SFTP has no better word than "Failure" for a disk that is full
                        f"{self.name}: can't write {target} ({_said(error)}); is there room?"
                    ) from None
                if attempt + 1 == ATTEMPTS:
                    raise HostUnreachable(f"{self.name}: the link went away {ATTEMPTS} times: {_said(error)}") from None
                again(_said(error))
                time.sleep(PAUSE_S * (attempt + 1))
                try:
                    self.reconnect()
                except HostUnreachable:
                    continue
            else:
                break
        return sent

    def _send(self, source: Path, target: str, said: Callable[[int, int], None]) -> None:
        sftp = self._files()
        size = source.stat().st_size
        if _size(sftp, target) == size:
            said(size, 0)
            return
        unfinished = f"{target}.part"
        there = _size(sftp, unfinished)
        if there > size:
            sftp.remove(unfinished)
            there = 0
        with source.open("rb") as file, sftp.open(unfinished, "ab") as remote:
            remote.set_pipelined(True)
            file.seek(there)
            while block := file.read(BLOCK_BYTES):
                remote.write(block)
                there += len(block)
                said(there, len(block))
        if _size(sftp, unfinished) != size:
            sftp.remove(unfinished)
            raise OSError("not all of it arrived")  # a write failed, which is not told of those that are on their way
        sftp.posix_rename(unfinished, target)

    def write(self, content: bytes, target: str) -> None:
        """Put a small file there, for its owner alone."""
        try:
            sftp = self._files()
            with sftp.open(f"{target}.part", "wb") as remote:
                sftp.chmod(f"{target}.part", 0o600)
                remote.write(content)
            sftp.posix_rename(f"{target}.part", target)
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise HostFailed(f"{self.name}: can't write {target}: {_said(error)}") from None

    def _files(self) -> paramiko.SFTPClient:
        self._still_there()
        if self._sftp is None:
            self._sftp = self._connection.sftp()
            channel = self._sftp.get_channel()
            assert channel is not None  # noqa: S101
            channel.settimeout(SFTP_S)
        return self._sftp

    def _still_there(self) -> None:
        """A link that went while nothing was asked is taken up again with all that belongs to it; fabric by itself
        would open a bare one, and hold nothing.
        """
        if not self._is_there():
            self.reconnect()

    def _is_there(self) -> bool:
        transport = self._connection.transport
        return transport is not None and transport.is_active()

    def _as_root(self, command: str) -> str:
        if self._sudo is None:
            return f'if [ "$(id -u)" = 0 ]; then {command}; else sudo -n {command}; fi'
        return f"sudo -S -p '' {command}"

    def _connect(self) -> Connection:
        options: dict[str, Any] = {"key_filename": str(self._key.expanduser())} if self._key else {}
        options |= {"banner_timeout": CONNECT_S * 4, "auth_timeout": CONNECT_S * 2}
        self._check_key()
        try:
            connection = Connection(self.name, connect_timeout=int(CONNECT_S), connect_kwargs=options)
            self._trust(connection)
            connection.open()
        except paramiko.BadHostKeyException as error:
            raise HostDistrusted(
                f"{self.name} has another key ({_fingerprint(error.key)}) than {self._known} says; if the device was "
                f"set up anew: ssh-keygen -R '{error.hostname}'"
            ) from None
        except paramiko.PasswordRequiredException as error:
            raise HostDistrusted(f"{self.name}: the private key has a passphrase; ssh-add it first ({error})") from None
        except paramiko.AuthenticationException:
            raise HostDistrusted(f"{self.name} does not let us in; try `ssh-copy-id {self.name}`") from None
        except (socket.gaierror, ValueError) as error:
            raise HostUnreachable(f"{self.name}: no such host: {_said(error)}") from None
        except (OSError, EOFError, paramiko.SSHException) as error:
            if isinstance(error, OSError) and error.filename:  # one of ours: known_hosts, a key
                raise HostDistrusted(f"{self.name}: can't use {error.filename}: {_said(error)}") from None
            raise HostUnreachable(f"{self.name} can't be reached: {_said(error)}") from None
        assert connection.transport is not None  # noqa: S101
        connection.transport.set_keepalive(ALIVE_S)
        for each in (connection, connection.gateway):
            sock = _socket(each)
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ON_THE_WAY_BYTES)
                if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_MS)
        return connection

    def _trust(self, connection: object) -> None:
        """Whom ssh would trust; the hosts between (ProxyJump) are asked for their keys as well."""
        while isinstance(connection, Connection):
            for path in dict.fromkeys((KNOWN_HOSTS.expanduser(), self._known)):
                _take(connection.client.get_host_keys(), path)
            connection.client.set_missing_host_key_policy(_Noted(self._known))
            connection = connection.gateway

    def _check_key(self) -> None:
        if self._key is None:
            return
        try:
            content = self._key.expanduser().read_bytes()
        except OSError as error:
            raise HostDistrusted(f"can't read the private key {self._key}: {error.strerror or error}") from None
        if b"PRIVATE KEY-----" not in content:
            raise HostDistrusted(f"{self._key} is no private key")


def _take(keys: paramiko.HostKeys, known: Path) -> None:
    """The keys in a file. Lines that are none that we know of (comments, authorities) are passed over, as by ssh."""
    with suppress(FileNotFoundError):
        for line in known.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(paramiko.SSHException, InvalidHostKey):
                entry = HostKeyEntry.from_line(line)
                for name in entry.hostnames or () if entry is not None and not line.startswith(("#", "@")) else ():
                    keys.add(name, entry.key.get_name(), entry.key)


class _Noted(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]  # (paramiko says nothing of its types)
    """Notes a host that was never met before by one line more in known_hosts, as ssh does; all others stay."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        """hostname: [host]:port unless that is 22."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        line = f"{hostname} {key.get_name()} {key.get_base64()}\n"
        with alone(self._path.parent):
            before = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
            if line in before:
                return  # another of us was faster
            self._path.touch(mode=0o600)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line if not before or before.endswith("\n") else f"\n{line}")
        client.get_host_keys().add(hostname, key.get_name(), key)


def _socket(connection: object) -> socket.socket | None:
    """Ours to a host, None if another host is between."""
    transport = connection.transport if isinstance(connection, Connection) else None
    sock = transport.sock if transport is not None else None
    return sock if isinstance(sock, socket.socket) else None


def _of_ipv4(address: str) -> str:
    """The address of the same interface that brokers listen on, as `kitchen.local` may well be met over IPv6."""
    bare = address.partition("%")[0].removeprefix("::ffff:")
    for each in psutil.net_if_addrs().values():
        if any(known.address.partition("%")[0] == bare for known in each):
            return next((known.address for known in each if known.family == socket.AF_INET), bare)
    return bare


def _keep_alive(channel: paramiko.Channel) -> None:
    with suppress(OSError, EOFError, paramiko.SSHException):
        while not channel.closed:
            channel.sendall(b"\n")
            time.sleep(ALIVE_S)


class _Lines:
    """A stream that hands on each line of JSON."""

    def __init__(self, line: Line) -> None:
        self._line, self._rest = line, ""

    def write(self, text: str) -> int:
        *whole, self._rest = (self._rest + text).split("\n")
        for each in whole:
            with suppress(ValueError):  # half a line, or a login's greeting
                if isinstance(told := json.loads(each), dict):
                    self._line(told)
        return len(text)

    def flush(self) -> None:
        """Nothing is kept but half a line."""


def quoted(*words: str) -> str:
    """A command for a shell."""
    return shlex.join(words)


def _size(sftp: paramiko.SFTPClient, path: str) -> int:
    try:
        return sftp.stat(path).st_size or 0
    except FileNotFoundError:
        return 0


def _fingerprint(key: paramiko.PKey) -> str:
    return "SHA256:" + b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")


def _sudo_words(reason: str) -> str:
    if "a password is required" in reason or "a terminal is required" in reason:
        return "sudo asks for a password there; ARGS=--ask-sudo has you type it"
    if "incorrect password" in reason or "no password was provided" in reason:
        return "sudo does not take that password"
    return reason


def _said(error: Exception) -> str:
    if isinstance(error, ThreadException):
        error = next((each.value for each in error.exceptions if isinstance(each.value, Exception)), error)
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
