"""Each thing that keeps an agent from working is named in one line, with what to do."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import time
from collections import namedtuple
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from broker_config import topics
from broker_config.broker import EmbeddedBroker
from broker_config.bus import MqttBus
from broker_config.messages import Health, LinkQuality, Memory, Telemetry, new_id
from broker_config.settings import BrokerSettings
from broker_config.users import add_user
from edge_agent import doctor, health
from edge_agent.doctor import Finding, examine
from scripts.demo.processes import free_port

Available = namedtuple("Available", "total available")


class Patient:
    """A device's configuration, to be made ill."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.folder, self.bundle, self.port = folder, bundle, free_port()
        self.broker = ""

    @property
    def path(self) -> Path:
        return self.folder / "agent.toml"

    def write(self) -> None:
        self.path.write_text(
            f'agent = "pi"\nsite = "test"\nbundle = "{self.bundle}"\n'
            f"[broker]\nport = {self.port}\nconnect_timeout_s = 2.0\n{self.broker}"
        )

    async def findings(self) -> dict[str, Finding]:
        self.write()
        return {finding.what: finding async for finding in examine(self.path, listen_s=0.3)}


@pytest.fixture
def patient(tmp_path: Path, tiny_bundle: Path) -> Patient:
    return Patient(tmp_path, tiny_bundle)


@pytest.fixture
async def healthy(patient: Patient) -> AsyncIterator[Patient]:
    async with EmbeddedBroker("127.0.0.1", patient.port):
        yield patient


def telemetry(instance: str, note: str = "") -> Telemetry:
    memory = Memory(
        pressure=0.1, cache_bytes=0, cache_budget_bytes=1, available_bytes=1, total_bytes=1, resident_bytes=1
    )
    return Telemetry(
        agent="pi", instance=instance, sequence=1, uptime_s=1, memory=memory, link=LinkQuality(), speed=None, note=note
    )


async def report(patient: Patient, *told: Telemetry) -> None:
    settings = BrokerSettings(port=patient.port)
    async with MqttBus(settings=settings, site="test", client_id=new_id()) as bus:
        for each in told:
            await bus.publish(topics.TELEMETRY, each, agent="pi")
            await asyncio.sleep(0.02)


async def test_nothing_is_wrong_with_a_device_that_is_well(healthy: Patient) -> None:
    await report(healthy, telemetry(new_id()))
    found = await healthy.findings()
    assert [each for each in found.values() if each.state == "wrong"] == []
    for what in ("configuration", "model", "memory", "disk", "broker", "agent's id"):
        assert found[what].state == "ok", str(found[what])


async def test_a_broker_that_is_not_there_and_one_that_does_not_know_us(patient: Patient) -> None:
    found = (await patient.findings())["broker"]
    assert (found.state, f"port {patient.port}" in found.advice) == ("wrong", True)
    users = patient.folder / "users"
    add_user(users, "pi", "right")
    (patient.folder / "password").write_text("wrong\n")
    patient.broker = f'username = "pi"\npassword_file = "{patient.folder}/password"\n'
    async with EmbeddedBroker("127.0.0.1", patient.port, users):
        found = (await patient.findings())["broker"]
        assert (found.state, "add-agent" in found.advice) == ("wrong", True)
        (patient.folder / "password").write_text("right\n")
        assert (await patient.findings())["broker"].state == "ok"


async def test_a_port_that_speaks_tls_is_named(patient: Patient, tmp_path: Path) -> None:
    key, name = generate_private_key(SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker")])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "both.pem").write_bytes(pem + made.sign(key, SHA256()).public_bytes(Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", patient.port, ssl=context)
    async with server:
        found = (await patient.findings())["broker"]
    assert (found.state, f"port {patient.port} speaks TLS" in found.advice) == ("wrong", True)


async def test_two_agents_of_one_id_and_none(healthy: Patient) -> None:
    assert (await healthy.findings())["agent's id"].state == "doubtful"

    async def both() -> None:
        one, other = new_id(), new_id()
        for _ in range(30):
            await report(healthy, telemetry(one), telemetry(other))

    reporting = asyncio.create_task(both())
    found = (await healthy.findings())["agent's id"]
    reporting.cancel()
    assert (found.state, "2 agents call themselves pi" in found.text) == ("wrong", True)
    await report(healthy, telemetry(new_id(), note="another agent with id pi is running"))
    assert "another agent" in (await healthy.findings())["agent's id"].text


async def test_a_model_that_is_missing_or_damaged(healthy: Patient, tmp_path: Path) -> None:
    shutil.copytree(healthy.bundle, tmp_path / "bundle")
    healthy.bundle = tmp_path / "bundle"
    path = healthy.bundle / "model.onnx.weights"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = await healthy.findings()
    assert found["model"].state == "wrong"
    assert "memory" not in found
    assert found["broker"].state == "ok"
    healthy.bundle = tmp_path / "none"
    assert "none" in (await healthy.findings())["model"].text


async def test_a_configuration_that_can_not_be_read_ends_it(patient: Patient) -> None:
    patient.broker = "prot = 3\n"
    found = await patient.findings()
    assert list(found) == ["device", "configuration"]
    assert "did you mean broker.port?" in found["configuration"].text
    patient.broker = 'password_file = "/nonexistent"\n'
    assert (await patient.findings())["configuration"].state == "wrong"


@pytest.mark.parametrize(
    ("total_mb", "free_mb", "running", "expected"),
    [
        (100, 90, False, ("wrong", "too small")),
        (4_000, 20, False, ("wrong", "most has")),
        (4_000, 20, True, ("doubtful", "caches will be kept small")),
        (4_000, 3_000, False, ("ok", "")),
    ],
)
async def test_too_little_memory(  # noqa: PLR0917  a table's columns
    healthy: Patient,
    total_mb: float,
    free_mb: float,
    running: bool,
    expected: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, words = expected
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Available(total_mb * 1e6, free_mb * 1e6))
    monkeypatch.setattr(doctor, "_is_running", lambda: running)
    found = (await healthy.findings())["memory"]
    assert (found.state, words in found.advice) == (state, True)


@pytest.mark.parametrize(
    ("told", "state", "words"),
    [
        (None, "unknown", ""),
        (Health(temperature_c=50.0), "ok", ""),
        (Health(temperature_c=84.0), "doubtful", "fan"),
        (Health(temperature_c=50.0, now=("undervoltage",)), "wrong", "power supply"),
        (Health(earlier=("throttled",)), "doubtful", "supply"),
    ],
)
async def test_heat_and_power(
    healthy: Patient, told: Health | None, state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "measure", lambda: told)
    found = (await healthy.findings())["heat and power"]
    assert (found.state, words in found.advice) == (state, True)


async def test_a_clock_that_is_behind_or_not_set(
    healthy: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "timedatectl"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for said, state in (("yes", "ok"), ("no", "doubtful")):
        program.write_text(f"#!/bin/sh\necho {said}\n")
        program.chmod(0o755)
        assert (await healthy.findings())["clock"].state == state
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 10 * 365 * 86_400)
    assert (await healthy.findings())["clock"].state == "wrong"


async def test_a_service_that_does_not_run_is_told_with_where_to_look(
    healthy: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for said, state, words in (
        ("LoadState=loaded\\nActiveState=failed\\nNRestarts=3\\nStatusText=", "wrong", "journalctl"),
        ("LoadState=loaded\\nActiveState=active\\nNRestarts=3\\nStatusText=at the broker", "doubtful", "journalctl"),
        ("LoadState=loaded\\nActiveState=active\\nNRestarts=0\\nStatusText=at the broker", "ok", ""),
        ("LoadState=not-found\\nActiveState=inactive", "unknown", ""),
    ):
        (tmp_path / "systemctl").write_text(f"#!/bin/sh\nprintf '{said}\\n'\n")
        (tmp_path / "systemctl").chmod(0o755)
        found = (await healthy.findings())["service"]
        assert (found.state, words in found.advice) == (state, True)


def test_a_finding_is_one_line() -> None:
    assert (
        str(Finding(what="disk", state="wrong", text="full", advice="make room")) == "WRONG     disk: full; make room"
    )
    assert "\n" not in str(Finding(what="disk", state="ok", text="free"))
