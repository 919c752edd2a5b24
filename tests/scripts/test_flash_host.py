"""A device over SSH, against a real server: what goes wrong is one line, and what was sent is not sent again."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from fabric import Connection

from scripts.demo.processes import free_port
from scripts.flash import host as hosts
from scripts.flash.bundle import installer
from scripts.flash.errors import HostDistrusted, HostFailed, HostUnreachable
from scripts.flash.host import Host

pytestmark = pytest.mark.integration

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass
class Server:
    """One that lets us in by a key."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return f"{getuser()}@127.0.0.1:{self.port}"

    @property
    def key(self) -> Path:
        return self.folder / "id"

    def host(self, *, key: Path | None = None, known_hosts: Path | None = None) -> Host:
        return Host(self.name, key=key or self.key, known_hosts=known_hosts or self.folder / "known")

    def start(self) -> None:
        assert SSHD is not None
        self.process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 10
        while (
            subprocess.run(["ssh-keyscan", "-p", str(self.port), "127.0.0.1"], capture_output=True, check=False).stdout
            == b""
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def restart(self) -> None:
        """All that is connected is cut."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """It and all its connections."""
        if self.process is not None:
            subprocess.run(["pkill", "-9", "-P", str(self.process.pid)], check=False)
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    if SSHD is None or os.geteuid():
        pytest.skip("sshd is not installed, or we are not root (apt-get install openssh-server)")
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    for name in ("id", "stranger", "host", "other_host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    (tmp_path / "authorized").write_bytes((tmp_path / "id.pub").read_bytes())
    made = Server(tmp_path, free_port())
    (tmp_path / "sshd_config").write_text(
        f"Port {made.port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\n"
        f"AuthorizedKeysFile {tmp_path}/authorized\n"
        "StrictModes no\nPasswordAuthentication no\nUsePAM no\nPermitRootLogin yes\nSubsystem sftp internal-sftp\n"
        f"PidFile none\nSetEnv HOME={tmp_path}\n"
    )
    made.start()
    yield made
    made.stop()


def test_a_command_gives_what_it_prints_and_a_failure_its_last_line(server: Server) -> None:
    with server.host() as host:
        assert host.run("echo one; echo two") == "one\ntwo\n"
        assert host.ask("echo noise; echo '{\"a\": 1}'") == {"a": 1}
        told: list[object] = []
        host.run("echo '{\"b\": 1}'; echo no json; echo '{\"b\": 2}'", line=told.append)
        assert told == [{"b": 1}, {"b": 2}]
        assert host.run("id -u", root=True) == "0\n"
        with pytest.raises(HostFailed, match=r"no such device here$"):
            host.run("echo first >&2; echo kvbus: no such device here >&2; exit 3")
        with pytest.raises(HostFailed, match="ended with code 4"):
            host.run("exit 4")
        with pytest.raises(HostFailed, match="no answer to"):
            host.ask("echo nothing")
        with pytest.raises(HostFailed, match="no answer within 1 s"):
            host.run("sleep 30", timeout_s=1)
        assert host.local_address == "127.0.0.1"


def test_hosts_that_are_not_who_they_were_or_do_not_let_us_in_are_one_line(server: Server, tmp_path: Path) -> None:
    with server.host():
        assert "ssh-ed25519" in (tmp_path / "known").read_text()  # noted at the first meeting
    other = tmp_path / "known_others"
    other.write_text(f"[127.0.0.1]:{server.port} {(tmp_path / 'other_host.pub').read_text()}")
    with pytest.raises(HostDistrusted, match=r"has another key \(SHA256:.*ssh-keygen -R"):
        server.host(known_hosts=other)
    with pytest.raises(HostDistrusted, match="does not let us in; try `ssh-copy-id"):
        server.host(key=tmp_path / "stranger")
    locked = tmp_path / "locked"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(locked)], check=True)
    with pytest.raises(HostDistrusted, match=r"does not let us in|has a passphrase"):
        server.host(key=locked)
    with pytest.raises(HostUnreachable, match="can't be reached"):
        Host(f"127.0.0.1:{free_port()}", key=server.key, known_hosts=tmp_path / "known")
    with pytest.raises(HostUnreachable, match="no such host"):
        Host("nobody.invalid", key=server.key, known_hosts=tmp_path / "known")


def test_a_file_goes_on_from_where_it_was_cut(server: Server, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    content = os.urandom(3 * hosts.BLOCK_BYTES + 17)
    source.write_bytes(content)
    Path(f"{target}.part").write_bytes(content[: hosts.BLOCK_BYTES])
    told: list[int] = []
    with server.host() as host:
        sent = host.send(source, str(target), told.append, again=pytest.fail)
        assert target.read_bytes() == content
        assert sent == len(content) - hosts.BLOCK_BYTES
        assert told[-1] == len(content)
        assert not Path(f"{target}.part").exists()
        assert host.send(source, str(target), told.append, again=pytest.fail) == 0
        Path(f"{target}.part").write_bytes(content + b"more")
        target.unlink()
        assert host.send(source, str(target), told.append, again=pytest.fail) == len(content)
        assert target.read_bytes() == content


def test_a_cut_link_is_taken_up_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "PAUSE_S", 0.1)
    source, target = tmp_path / "source", tmp_path / "target"
    content = os.urandom(40 * hosts.BLOCK_BYTES)
    source.write_bytes(content)
    why: list[str] = []
    cut = False

    def said(there: int) -> None:
        nonlocal cut
        if there > len(content) // 2 and not cut:
            cut = True
            server.restart()

    with server.host() as host:
        sent = host.send(source, str(target), said, again=why.append)
    assert target.read_bytes() == content
    assert len(why) == 1
    assert sent < 2 * len(content)


def test_a_disk_that_is_full_is_said_at_once(server: Server, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 100)
    (tmp_path / "target.part").symlink_to("/dev/full")
    with server.host() as host, pytest.raises(HostFailed, match=r"can't write .*target.* is there room\?") as caught:
        host.send(tmp_path / "source", str(tmp_path / "target"), lambda _: None, again=pytest.fail)
    assert "\n" not in str(caught.value)


def test_a_server_that_falls_silent_is_left(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel still takes what we send, so nothing but its silence says that something is wrong."""
    monkeypatch.setattr(hosts, "SFTP_S", 0.5)
    monkeypatch.setattr(hosts, "PAUSE_S", 0.05)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(content := os.urandom(40 * hosts.BLOCK_BYTES))
    why: list[str] = []

    def said(there: int) -> None:
        if there > len(content) // 2 and not why:
            assert server.process is not None
            subprocess.run(["pkill", "-STOP", "-P", str(server.process.pid)], check=True)

    with server.host() as host:
        host.send(source, str(target), said, again=why.append)
    assert target.read_bytes() == content
    assert len(why) == 1


def test_an_answer_that_was_lost_is_asked_for_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "PAUSE_S", 0.05)
    with server.host() as host:
        threading.Timer(0.5, server.restart).start()
        begun = f"echo x >> {tmp_path}/begun; [ $(wc -l < {tmp_path}/begun) = 2 ] || sleep 30; echo done"
        assert host.insist(begun) == "done\n"
        with pytest.raises(HostFailed, match="code 3"):
            host.insist("exit 3")


def test_a_host_is_noted_beside_what_is_known(server: Server, tmp_path: Path) -> None:
    known = tmp_path / "known"
    before = "# of my house\nold.example ssh-ed25519 !!!\n@cert-authority *.lan ssh-rsa AAAA"
    known.write_text(before)
    with ThreadPoolExecutor(3) as pool:
        for host in pool.map(lambda _: server.host(known_hosts=known), range(3)):
            host.close()
    line, *others = known.read_text().removeprefix(f"{before}\n").splitlines()
    assert known.read_text().startswith(f"{before}\n")
    assert line.startswith(f"[127.0.0.1]:{server.port} ssh-ed25519 ")
    assert others == []
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True)  # names as hashes, as Debian has them
    hashed = known.read_text()
    server.host(known_hosts=known).close()
    assert known.read_text() == hashed


def test_who_is_met_over_ipv6_is_given_our_address_of_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def address(family: socket.AddressFamily, text: str) -> SimpleNamespace:
        return SimpleNamespace(family=family, address=text)

    addresses = {
        "lo": [address(socket.AF_INET, "127.0.0.1"), address(socket.AF_INET6, "::1")],
        "eth0": [address(socket.AF_INET, "10.0.0.7"), address(socket.AF_INET6, "fe80::7%eth0")],
        "tun0": [address(socket.AF_INET6, "2001:db8::7")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    assert hosts._of_ipv4("fe80::7%eth0") == "10.0.0.7"
    assert hosts._of_ipv4("::ffff:10.0.0.7") == "10.0.0.7"
    assert hosts._of_ipv4("2001:db8::7") == "2001:db8::7"  # broker_place says that it can't be told


def test_a_link_that_stays_away_is_one_line(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "PAUSE_S", 0.05)
    (tmp_path / "source").write_bytes(b"x" * 100)
    with server.host() as host:
        server.stop()
        with pytest.raises(HostUnreachable, match="the link went away 5 times"):
            host.send(tmp_path / "source", str(tmp_path / "target"), lambda _: None, again=lambda _: None)
        with pytest.raises(HostUnreachable, match="can't be reached: "):
            host.run("true")


def test_a_link_that_went_while_nothing_was_asked_is_taken_up_whole(server: Server, tmp_path: Path) -> None:
    """With what is held; a bare link would let another flash in."""
    lock, source = tmp_path / "lock", tmp_path / "source"
    source.write_bytes(b"content")
    with server.host() as host:
        host.hold(f'flock --nonblock {lock} sh -c \'echo "{{\\"held\\": true}}"; cat\'')
        for again in (
            lambda: host.run("true"),
            lambda: host.write(b"content", str(tmp_path / "target")),
            lambda: host.send(source, str(tmp_path / "other"), lambda _: None, again=pytest.fail),
        ):
            server.restart()
            deadline = time.monotonic() + 5
            while host._is_there():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            again()
            sock = hosts._socket(host._connection)
            assert sock is not None
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == hosts.SILENT_MS
            assert subprocess.run(["flock", "--nonblock", str(lock), "true"], check=False).returncode == 1


def test_what_is_wrong_here_is_not_put_down_to_the_network(server: Server, tmp_path: Path) -> None:
    with pytest.raises(HostDistrusted, match=r"can't read the private key .*/nowhere: No such file"):
        server.host(key=tmp_path / "nowhere")
    with pytest.raises(HostDistrusted, match=r"id\.pub is no private key"):
        server.host(key=tmp_path / "id.pub")
    (tmp_path / "folder").mkdir()
    with pytest.raises(HostDistrusted, match=r"can't use .*/folder: Is a directory"):
        server.host(known_hosts=tmp_path / "folder")


def test_hosts_between_are_asked_for_their_keys_too(server: Server, tmp_path: Path) -> None:
    (tmp_path / "known").write_text(f"far.example {(tmp_path / 'other_host.pub').read_text()}")
    with server.host() as host:
        between = Connection("between.example")
        host._trust(Connection("far.example", gateway=between))
        assert isinstance(between.client._policy, hosts._Noted)
        assert between.client.get_host_keys().lookup("far.example")


def test_a_lock_is_held_as_long_as_we_are_there(server: Server, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    command = f'flock --nonblock {lock} sh -c \'echo "{{\\"held\\": true}}"; cat\''
    with server.host() as one:
        one.hold(command)
        with server.host() as other, pytest.raises(HostFailed):
            other.hold(command)
    with server.host() as third:
        deadline = time.monotonic() + 5
        while subprocess.run(["flock", "--nonblock", str(lock), "true"], check=False).returncode:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        third.hold(command)


def test_a_device_is_held_again_after_a_cut_and_by_one_alone(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "PAUSE_S", 0.1)
    monkeypatch.setattr(hosts, "PATIENCE_S", 10.0)
    pyz = tmp_path / "installer.pyz"
    pyz.write_bytes(installer())
    command = f"{sys.executable} -I {pyz} hold --who me@laptop"
    with server.host() as one:
        one.hold(command)
        with (
            server.host() as other,
            pytest.raises(HostFailed, match="another flash is at work on this device, from me@"),
        ):
            other.hold(command)
        server.restart()
        one.reconnect()
        with server.host() as other, pytest.raises(HostFailed, match="another flash is at work"):
            other.hold(command)
