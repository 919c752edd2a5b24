"""What is wrong with an agent on this device, in plain lines: what was looked at, how it is, and what to do."""

from __future__ import annotations

import asyncio
import platform
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from broker_config import topics
from broker_config.bus import MqttBus
from broker_config.errors import BrokerUnreachable, BusError
from broker_config.messages import Telemetry, new_id
from broker_config.settings import load_toml
from edge_agent import health
from edge_agent.errors import AgentError
from edge_agent.model.manifest import Manifest, read_manifest, verify_digests
from edge_agent.settings import AgentSettings

MEGA = 1_000_000
BESIDE_MODEL_MB = 150
"""Python, the runtime and the buffers of a run, as measured with SmolLM2-135M."""
LEAST_DISK_MB = 100
HOT_C = 80.0
"""At which a Raspberry Pi begins to slow down."""
LISTEN_S = 3.5
"""Three reports of an agent, and a little."""
TLS_S = 3.0
"""Longest for a broker to say that it speaks TLS."""

State = Literal["ok", "doubtful", "wrong", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at. advice: what to do about it, if it isn't ok."""

    what: str
    state: State
    text: str
    advice: str = ""

    def __str__(self) -> str:
        mark = {"ok": "ok      ", "doubtful": "doubtful", "wrong": "WRONG   ", "unknown": "unknown "}[self.state]
        return f"{mark}  {self.what}: {self.text}" + (f"; {self.advice}" if self.advice else "")


async def examine(configuration: Path, *, listen_s: float = LISTEN_S) -> AsyncIterator[Finding]:
    """Look at everything in turn; what can't be looked at, since something before it is wrong, is left out."""
    yield _device()
    try:
        settings = load_toml(configuration, AgentSettings)
        settings.broker.password()
    except BusError as error:
        yield Finding(what="configuration", state="wrong", text=str(error), advice=_if_root_only(error))
        return
    broker = settings.broker.address
    words = f"agent {settings.agent} of site {settings.site}, broker {broker}"
    yield Finding(what="configuration", state="ok", text=words)
    manifest, found = await asyncio.to_thread(_model, settings.bundle_path)
    yield found
    if manifest is not None:
        yield _memory(manifest)
    yield _disk(settings)
    yield _clock()
    yield _strain()
    yield _service()
    async for found in _broker(settings, listen_s):
        yield found


def _device() -> Finding:
    try:
        system = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        system = platform.system()
    words = f"{platform.machine()}, {psutil.cpu_count()} cores, {system}, Python {platform.python_version()}"
    return Finding(what="device", state="ok", text=words)


def _if_root_only(error: BusError) -> str:
    return "only root and the agent may read it: sudo edge-agent doctor" if "Permission denied" in str(error) else ""


def _model(bundle: Path) -> tuple[Manifest | None, Finding]:
    try:
        manifest = read_manifest(bundle)
        verify_digests(bundle, manifest)
    except AgentError as error:
        return None, Finding(
            what="model", state="wrong", text=str(error), advice="unflash the device and flash it again"
        )
    text = f"{manifest.name}, {manifest.weight_precision}, whole"
    return manifest, Finding(what="model", state="ok", text=text)


def _memory(manifest: Manifest) -> Finding:
    weights_mb = sum(entry.size_bytes for entry in manifest.files) / MEGA
    needed_mb = weights_mb + BESIDE_MODEL_MB
    memory = psutil.virtual_memory()
    total_mb, free_mb = memory.total / MEGA, memory.available / MEGA
    text = f"{free_mb:.0f} of {total_mb:.0f} MB available; the model needs about {needed_mb:.0f} MB"
    if total_mb < needed_mb:
        advice = "this board is too small for the model: one of fewer weights, or `--weights int4`"
        return Finding(what="memory", state="wrong", text=text, advice=advice)
    if not _is_running() and free_mb < needed_mb:
        hungry = max(psutil.process_iter(["name", "memory_info"]), key=_resident, default=None)
        who = f"most has {hungry.info['name']} ({_resident(hungry) / MEGA:.0f} MB)" if hungry else ""
        return Finding(what="memory", state="wrong", text=text, advice=who)
    state: State = "doubtful" if free_mb < 0.1 * total_mb else "ok"
    return Finding(what="memory", state=state, text=text, advice="" if state == "ok" else "caches will be kept small")


def _is_running() -> bool:
    """An agent has its memory already."""
    return any(
        "edge-agent" in " ".join(process.info["cmdline"] or ()) and "run" in (process.info["cmdline"] or ())
        for process in psutil.process_iter(["cmdline"])
    )


def _resident(process: psutil.Process) -> int:
    info = process.info["memory_info"]
    return int(info.rss) if info else 0


def _disk(settings: AgentSettings) -> Finding:
    folder = settings.memory.spill_path or settings.folder_path or Path("/")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_mb = shutil.disk_usage(existing).free / MEGA
    text = f"{free_mb:.0f} MB free for {folder}"
    if free_mb < LEAST_DISK_MB:
        return Finding(what="disk", state="wrong", text=text, advice="make room; logs and texts can't be written soon")
    return Finding(what="disk", state="ok", text=text)


def _clock() -> Finding:
    """Whether it is set by the network, and at least later than this program."""
    made_s = Path(__file__).stat().st_ctime
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if time.time() < made_s - 1:
        text = f"{now}, before this was installed"
        return Finding(what="clock", state="wrong", text=text, advice="`timedatectl` says why")
    said = _said("timedatectl", "show", "--property=NTPSynchronized", "--value")
    if said is None:
        return Finding(what="clock", state="unknown", text=f"{now}; timedatectl is not here to say whether it is set")
    if said != "yes":
        advice = "sudo timedatectl set-ntp true (a board without a battery begins each time where it ended)"
        return Finding(what="clock", state="doubtful", text=f"{now}, not set by the network", advice=advice)
    return Finding(what="clock", state="ok", text=f"{now}, set by the network")


def _strain() -> Finding:
    found = health.measure()
    if found is None:
        return Finding(what="heat and power", state="unknown", text="this machine does not tell")
    warm = f"{found.temperature_c:.0f} °C" if found.temperature_c is not None else "temperature unknown"
    advice = {
        "undervoltage": "the power supply or its cable is too weak",
        "frequency-capped": "it is slowed down",
        "throttled": "it is too hot or its supply too weak: a fan, a better supply",
        "soft-temperature-limit": "a fan or a heat sink helps",
        "over-current": "the supply can't give what it takes",
    }
    if found.now:
        text = f"{warm}, {', '.join(found.now)}"
        return Finding(what="heat and power", state="wrong", text=text, advice=advice[found.now[0]])
    if found.earlier:
        text = f"{warm}; since its start there was {', '.join(found.earlier)}"
        return Finding(what="heat and power", state="doubtful", text=text, advice=advice[found.earlier[0]])
    state: State = "doubtful" if found.temperature_c is not None and found.temperature_c > HOT_C else "ok"
    return Finding(what="heat and power", state=state, text=warm, advice=advice["throttled"] if state != "ok" else "")


def _service() -> Finding:
    said = _said("systemctl", "show", "kvbus-agent.service", "--property=LoadState,ActiveState,NRestarts,StatusText")
    fields = dict(line.split("=", 1) for line in (said or "").splitlines() if "=" in line)
    if fields.get("LoadState") != "loaded":
        return Finding(what="service", state="unknown", text="kvbus-agent is not installed as a service here")
    active, restarts = fields.get("ActiveState", ""), fields.get("NRestarts", "0")
    text = f"{active}; {fields.get('StatusText') or 'says nothing'}"
    if active != "active":
        return Finding(what="service", state="wrong", text=text, advice="journalctl -u kvbus-agent -e")
    if restarts not in {"", "0"}:
        advice = "journalctl -u kvbus-agent says why"
        return Finding(what="service", state="doubtful", text=f"{text}; restarted {restarts} times", advice=advice)
    return Finding(what="service", state="ok", text=text)


async def _broker(settings: AgentSettings, listen_s: float) -> AsyncIterator[Finding]:
    """Whether it lets this agent's user in, and who there calls itself as this agent does."""
    broker = settings.broker
    seen: dict[str, str] = {}

    def told(telemetry: Telemetry, _: Mapping[str, str]) -> None:
        seen[telemetry.instance] = telemetry.note

    bus = MqttBus(settings=broker, site=settings.site, client_id=f"{settings.site}-doctor-{new_id()}")
    began_s = time.monotonic()
    async with bus:
        try:
            await bus.connected(broker.connect_timeout_s + 1)
        except BrokerUnreachable as error:
            if "not authorized" in str(error):
                advice = "`coordinator add-agent` makes a user; then flash again"
            elif await _speaks_tls(broker.host, broker.port):
                advice = f"port {broker.port} speaks TLS, agents plain MQTT: take its plain port (as a rule 1883)"
            else:
                advice = f"is it running there, on all addresses, and does a firewall let port {broker.port} through?"
            yield Finding(what="broker", state="wrong", text=str(error), advice=advice)
            return
        took_ms = 1000 * (time.monotonic() - began_s)
        user = f" as {broker.username}" if broker.username else ", which wants no user"
        yield Finding(what="broker", state="ok", text=f"{broker.address} let us in within {took_ms:.0f} ms{user}")
        await bus.subscribe(topics.TELEMETRY, told, agent=settings.agent)
        await asyncio.sleep(listen_s)
    note = next((text for text in seen.values() if text), "")
    if note or len(seen) > 1:
        text = note or f"{len(seen)} agents call themselves {settings.agent}"
        yield Finding(what="agent's id", state="wrong", text=text, advice="give each device an id of its own")
    elif seen:
        yield Finding(what="agent's id", state="ok", text=f"{settings.agent} is used once")
    else:
        yield Finding(what="agent's id", state="doubtful", text=f"no {settings.agent} reports", advice="is it running?")


async def _speaks_tls(host: str, port: int) -> bool:
    """Whoever it is: no certificate is looked at, and nothing is sent."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(TLS_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except OSError:  # of ssl, too; and TimeoutError
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
