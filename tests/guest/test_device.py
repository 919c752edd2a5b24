"""A device is flashed, answers, takes part, is updated, goes back, and survives what careless people do to it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coordinator.credentials import add_agent
from scripts.demo.processes import free_port
from tests.guest.conftest import AGENT, Bench, Log
from tests.integration.conftest import ready, text

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3_600)]

QUESTION = "Which valve?"


def one_line(said: str) -> str:
    """What a failed command said last, which is no traceback."""
    assert "Traceback" not in said, said
    return said.splitlines()[-1]


async def test_a_device_from_its_first_flash_to_its_last(bench: Bench, other_tiny_bundle: Path) -> None:
    log = Log()
    await first_flash(bench, log)
    await joins_the_site(bench, log)
    await relays(bench, log)
    before = await updates_and_goes_back(bench, other_tiny_bundle, log)
    await fails_and_is_as_it_was(bench, before, log)
    await loses_power(bench, other_tiny_bundle, before, log)
    await meets_others(bench, before, log)
    await is_taken_off(bench, log)


async def first_flash(bench: Bench, log: Log) -> None:
    """On a broker that wants users; looking changes nothing, and flashing twice is flashing once."""
    secured, users = free_port(), bench.folder / "users"
    add_agent(users, "coordinator")
    await bench.site.programs.start(
        "secured broker", ["coordinator.cli", "broker", "--port", str(secured), "--users", str(users)]
    )
    planned = await bench.flash("--dry-run", broker=secured)
    log("dry run: " + "; ".join(planned["plan"]))
    assert bench.machine.ssh("ls -d /opt/kvbus /var/tmp/kvbus* 2>/dev/null || true").stdout == ""
    flashed = await bench.flash(broker=secured)
    assert flashed["changed"]
    proof = flashed["proof"]
    assert proof["answer"]
    log(f"flashed {flashed['release']}: {flashed['sent_bytes'] / 1e6:.1f} MB, {flashed['seconds']:.0f} s")
    log(f"it answered in {proof['first_token_s']:.2f} s, prefill {proof['prefill_tps']:.0f} tokens/s")
    again = await bench.flash(broker=secured)
    assert not again["changed"]
    assert again["sent_bytes"] < 50_000  # what looks
    assert again["proof"]["instance"] == proof["instance"]
    log(f"flashed again: nothing to do, {again['seconds']:.0f} s")
    code, said = await bench.run("status")
    assert code == 0
    assert "at the broker" in said
    log(f"status: {said}")
    code, said = await bench.run("logs", "--lines", "200")
    assert code == 0
    assert "ready: prefill" in said
    unit = bench.machine.ssh("systemctl show kvbus-agent -p User,WatchdogUSec,ProtectSystem,Type").stdout
    assert {"User=kvbus", "WatchdogUSec=2min", "ProtectSystem=strict", "Type=notify"} <= set(unit.split())
    assert bench.machine.ssh("sudo -u nobody cat /opt/kvbus/current/password", check=False).returncode


async def joins_the_site(bench: Bench, log: Log) -> None:
    """Another configuration is an update like any other."""
    moved = await bench.flash()
    assert moved["changed"]
    await bench.told_online()
    log(f"moved to another broker: {moved['sent_bytes'] / 1e6:.1f} MB, {moved['seconds']:.0f} s")


async def relays(bench: Bench, log: Log) -> None:
    """With an agent on this machine, whose processor is another, both ways."""
    site = bench.site
    await site.start_agent("laptop", texts={"north": text(1)})
    await site.client.give(AGENT, "south", text(2))
    for agent in ("laptop", AGENT):
        await site.until(agent, lambda state: ready(state) and any(state.telemetry.contexts if state.telemetry else ()))
    for policy in ("token", "kv"):
        answers = {}
        for sender, receiver in (("laptop", AGENT), (AGENT, "laptop")):
            report = await site.client.ask(QUESTION, sources=[sender], receiver=receiver, policy=policy)
            assert report.state == "answered", report.reason
            assert report.fallbacks == 0
            answers[sender, receiver] = report.answer
            (link,) = report.links
            log(f"relay {sender} → {receiver} as {link.medium} at {link.rung}: {report.e2e_s:.2f} s, {report.answer!r}")
    await site.kill("laptop")


async def updates_and_goes_back(bench: Bench, other: Path, log: Log) -> str:
    """Only what changed is sent. Returns what is in use at the end."""
    before = (await bench.status())["current"]
    updated = await bench.flash(bundle=other)
    assert updated["release"] != before
    assert updated["sent_bytes"] < 3e6
    log(f"updated to {updated['release']}: {updated['sent_bytes'] / 1e6:.1f} MB, {updated['seconds']:.0f} s")
    facts = await bench.status()
    assert (facts["current"], facts["previous"]) == (updated["release"], before)
    instance = await bench.told_online()
    code, said = await bench.run("rollback")
    assert code == 0, said
    log(f"rollback: {said.splitlines()[-1]}")
    facts = await bench.status()
    assert (facts["current"], facts["previous"], facts["trial"]) == (before, updated["release"], None)
    await bench.another_online(instance)
    return str(before)


async def fails_and_is_as_it_was(bench: Bench, before: str, log: Log) -> None:
    """A release whose agent ends at once; one that was signed elsewhere; a broker that isn't there."""
    broken = bench.folder / "broken.toml"
    broken.write_text('[memory]\nspill_folder = "/proc/nowhere"\n')
    code, said = await bench.run("flash", *bench.flashing("--config", str(broken)))
    assert code == 1
    assert f"{before} is back" in one_line(said)
    log(f"broken release: {one_line(said)}")
    stranger = str(bench.folder / "stranger.pem")
    code, said = await bench.run("flash", *bench.flashing("--site-key", stranger, "--config", str(broken)))
    assert code == 1
    assert "not signed by the site" in one_line(said)
    log(f"another site's key: {one_line(said)}")
    code, said = await bench.run("flash", *bench.flashing("--broker", "10.0.2.2:1"))
    assert code == 1
    assert "can't be reached from it" in one_line(said)
    log(f"no broker: {one_line(said)}")
    filled = "sudo fallocate -l $(($(df --output=avail -B1 / | tail -1) - 20000000)) /filler"
    bench.machine.ssh(filled)
    code, said = await bench.run("flash", *bench.flashing("--config", str(broken)))
    bench.machine.ssh("sudo rm /filler")
    assert code == 1
    assert "MB of disk are free" in one_line(said)
    log(f"full disk: {one_line(said)}")
    assert (await bench.status())["current"] == before
    await bench.told_online()


async def loses_power(bench: Bench, other: Path, before: str, log: Log) -> None:
    """While a release is being installed, and while it is on trial."""
    for moment in ("installing", "waiting for its presence"):
        running = await bench.start("flash", *bench.flashing(bundle=other))
        await running.until(moment)
        bench.machine.pull_plug()
        code = await running.end()
        assert code == 1
        log(f"power cut while {moment}: {one_line(chr(10).join(running.lines))}")
        await asyncio.to_thread(bench.machine.power_on)
        await bench.told_online()
        facts = await bench.status()
        assert (facts["current"], facts["trial"]) == (before, None)
        log(f"started again with {facts['current']}; {facts['failure'] or 'nothing had begun'}")


async def meets_others(bench: Bench, before: str, log: Log) -> None:
    """Two who flash at once, and a device that is not the one that it was."""
    first = await bench.start("flash", *bench.flashing("--config", str(bench.folder / "broken.toml")))
    await first.until("starting it")
    code, said = await bench.run("flash", *bench.flashing())
    assert code == 1
    assert "another flash is at work on this device, from" in one_line(said)
    log(f"two at once: {one_line(said).rpartition(', from')[0]}")
    assert await first.end() == 1
    assert (await bench.status())["current"] == before
    known = bench.folder / "other_hosts"
    key = bench.machine.key.with_suffix(".pub").read_text()
    known.write_text(f"[127.0.0.1]:{bench.machine.port} {key}")
    code, said = await bench.run("flash", *bench.flashing("--known-hosts", str(known)))
    assert code == 1
    assert "has another key" in one_line(said)
    log(f"another host's key: {one_line(said).replace(str(bench.folder), '~')}")


async def is_taken_off(bench: Bench, log: Log) -> None:
    code, said = await bench.run("unflash", "--state")
    assert code == 0, said
    left = "ls -d /opt/kvbus /var/lib/kvbus /etc/systemd/system/kvbus* /usr/local/bin/edge-agent 2>/dev/null || true"
    assert bench.machine.ssh(left).stdout == ""
    code, said = await bench.run("status")
    assert code == 1
    assert "nothing of kvbus is installed there" in said
    log("taken off; nothing is left")
