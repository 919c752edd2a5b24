"""Agents of the next protocol version work with those of this one, as they do while a fleet is being updated."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from broker_config.messages import PROTOCOL_VERSION
from tests.integration.conftest import SITE, Site, text

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]


def edited(path: Path, pattern: str, replacement: str) -> None:
    content, count = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.MULTILINE)
    assert count == 1, f"{pattern} is not in {path}"
    path.write_text(content)


@pytest.fixture
def next_version(tmp_path: Path) -> Path:
    """This code as its successor may be: it knows a version more, says more in its reports, and takes more orders."""
    folder = tmp_path / "next"
    for room in ("broker_config", "edge_agent"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    messages = folder / "broker_config" / "messages"
    edited(messages / "base.py", r"^PROTOCOL_VERSION = \d+$", f"PROTOCOL_VERSION = {PROTOCOL_VERSION + 1}")
    edited(messages / "agents.py", r"^    queued: Count = 0$", "    queued: Count = 0\n    mood: Reason = 'new'")
    edited(messages / "agents.py", r"^    software: ", "    colour: Reason = 'blue'\n    software: ")
    edited(messages / "orders.py", r"^    wire_bytes: Bytes = 0$", "    wire_bytes: Bytes = 0\n    hops: Count = 7")
    return folder


async def start_next(site: Site, folder: Path, agent: str, contexts: dict[str, str]) -> None:
    """An agent that runs that code."""
    own = site.folder / f"{agent}-contexts"
    own.mkdir()
    for title, content in contexts.items():
        (own / f"{title}.txt").write_text(content)
    path = site.folder / f"{agent}.toml"
    path.write_text(
        f'agent = "{agent}"\nsite = "{SITE}"\nbundle = "{site.bundle}"\ncontexts_folder = "{own}"\n'
        f"[broker]\nport = {site.port}\n[telemetry]\ninterval_s = 0.2\nprobe_interval_s = 0.2\n"
    )
    program = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "import broker_config.messages, edge_agent\n"
        f"assert broker_config.messages.PROTOCOL_VERSION == {PROTOCOL_VERSION + 1}\n"
        f"sys.argv[1:] = ['run', {str(path)!r}, '--plain']\n"
        "from edge_agent.cli import app; app()"
    )
    await site.programs.start_program(agent, [sys.executable, "-c", program])
    site.agents.append(agent)


async def test_a_round_between_two_versions_ends_well_both_ways(amqtt_site: Site, next_version: Path) -> None:
    site = amqtt_site
    await site.start_agent("old", texts={"north": text(1)})
    await start_next(site, next_version, "new", {"south": text(2)})
    await site.until_ready()
    for policy in ("kv", "token", "optimum"):
        for sender, receiver in (("old", "new"), ("new", "old")):
            report = await site.client.ask("Which valve?", sources=[sender], receiver=receiver, policy=policy)
            assert report.state == "answered", report.reason
            assert report.fallbacks == 0
    state = await site.state("new")
    assert state is not None
    assert state.presence is not None
    assert state.presence.protocol == PROTOCOL_VERSION + 1
