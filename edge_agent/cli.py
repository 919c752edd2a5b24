"""The command `edge-agent`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from broker_config.errors import BusError
from broker_config.settings import describe, load_toml
from edge_agent import logs
from edge_agent.agent import Agent
from edge_agent.doctor import examine
from edge_agent.errors import AgentError
from edge_agent.facts import Extractor
from edge_agent.model.manifest import read_manifest, verify_digests
from edge_agent.notify import keep_alive
from edge_agent.release.place import CONFIGURATION, Place
from edge_agent.settings import AgentSettings

app = typer.Typer(
    help="A small language model on a device that exchanges KV caches with other agents over MQTT.\n\n"
    "A first agent: `make prepare-model` on the laptop makes a model bundle; `edge-agent config > agent.toml` writes a "
    "configuration to fill in; `edge-agent run agent.toml` starts the agent, which tries until its broker is there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


PLAIN_TEXT = "The bridge over the river was closed on 4 May 2021 after the water had risen by 3.2 metres."
"""Facts are looked for in it by `check`, to see that what finds them is there."""


INSTALLED = Place().root / "current" / CONFIGURATION
"""Where a flashed device has its configuration."""


class Level(StrEnum):
    """How much is logged."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


@app.command()
def run(
    configuration: Annotated[Path, typer.Argument(help="TOML file; `edge-agent config` prints one to start from.")],
    log: Annotated[Level, typer.Option(help="How much to log, to standard error.")] = Level.info,
    plain: Annotated[
        bool | None, typer.Option("--plain/--json", help="Log lines for people or for machines (default: by terminal).")
    ] = None,
) -> None:
    """Run an agent until it is stopped (Ctrl-C or SIGTERM)."""
    logs.set_up(log.value, plain=plain)
    try:
        settings = load_toml(configuration, AgentSettings)
        settings.broker.password()  # a file that is missing now is a mistake, later it is waited for
        asyncio.run(_until_stopped(Agent(settings)))
    except (AgentError, BusError) as error:
        typer.echo(f"edge-agent: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def config() -> None:
    """Print a commented configuration with every field, its unit and its default."""
    typer.echo(describe(AgentSettings), nl=False)


@app.command()
def check(configuration: Annotated[Path, typer.Argument(help="TOML file of the agent.")]) -> None:
    """Check a configuration and its model bundle, every byte of it, without starting anything."""
    try:
        settings = load_toml(configuration, AgentSettings)
        bundle = settings.bundle_path
        manifest = read_manifest(bundle)
        verify_digests(bundle, manifest)
        settings.broker.password()
    except (AgentError, BusError) as error:
        typer.echo(f"edge-agent: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{configuration}: agent {settings.agent} of site {settings.site}, broker {settings.broker.address}")
    typer.echo(f"{bundle}: {manifest.name}, {manifest.weight_precision}, fingerprint {manifest.fingerprint}; whole")
    typer.echo("ladder: " + ", ".join(rung.name for rung in manifest.ladder))
    extractor = Extractor(spacy_model=settings.facts.spacy_model or None)
    found = extractor.extract(PLAIN_TEXT)
    typer.echo(f"facts: {len(found)} found in a sentence{f'; {extractor.note}' if extractor.note else ''}")


@app.command()
def doctor(
    configuration: Annotated[Path, typer.Argument(help="TOML file of the agent.", readable=False)] = INSTALLED,
) -> None:
    """Look for what is wrong: configuration, model, memory, disk, clock, heat, service, broker, a twin."""

    async def work() -> bool:
        well = True
        async for finding in examine(configuration):
            typer.echo(str(finding))
            well = well and finding.state != "wrong"
        return well

    logs.set_up("critical", plain=True)
    if not asyncio.run(work()):
        raise typer.Exit(1)


@app.command()
def bundle(path: Annotated[Path, typer.Argument(help="Directory of a model bundle.")]) -> None:
    """Print what a model bundle holds, as JSON."""
    try:
        manifest = read_manifest(path)
    except AgentError as error:
        typer.echo(f"edge-agent: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(msgspec.json.format(msgspec.json.encode(manifest)).decode())


async def _until_stopped(agent: Agent) -> None:
    """Run the agent; SIGTERM and SIGINT end it in good order."""
    loop = asyncio.get_running_loop()
    alive = asyncio.create_task(keep_alive(), name="signs of life")
    running = asyncio.ensure_future(agent.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await running
    finally:
        alive.cancel()


if __name__ == "__main__":
    app()
