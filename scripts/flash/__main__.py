"""`python -m scripts.flash`: put agents on devices, look after them, take them off again."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from getpass import getpass
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from broker_config.errors import BusError
from coordinator.credentials import DEFAULT_USERS
from edge_agent.errors import AgentError
from edge_agent.release.manifest import RUNTIME_LAYER
from scripts.flash import bundle as bundles
from scripts.flash.card import customise
from scripts.flash.device import DEFAULT_SITE, Device, agent_named, device, one_each
from scripts.flash.errors import BundleFailed, FlashError, HostUnfit
from scripts.flash.flasher import PROOF_S, TRIAL_S, Flashed, Flasher, Orders
from scripts.flash.fleet import AT_ONCE, AT_WORK, Ended, roll_out
from scripts.flash.host import KNOWN_HOSTS, Host
from scripts.flash.keeping import Keeper, Kept
from scripts.flash.keys import DEFAULT_KEY, site_key
from scripts.flash.shown import Shown, bars, exit_by, fail, line_of, lines_of, plain, write
from scripts.flash.sites import broker_place, here_of
from scripts.flash.wheels import PYTHONS, Target
from scripts.prepare_model import default_bundle

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(highlight=False, markup=False, soft_wrap=True)

Hosts = Annotated[list[str], typer.Argument(help="[USER@]HOST[:PORT], one or more; names of ~/.ssh/config too.")]
Key = Annotated[Path | None, typer.Option("--ssh-key", help="Private key (default: the agent's, and those in ~/.ssh).")]
Known = Annotated[Path, typer.Option(help="Where hosts' keys are kept; one never seen before is noted there.")]
AskSudo = Annotated[bool, typer.Option("--ask-sudo", help="Type the password that sudo asks for there.")]
Model = Annotated[
    Path | None,
    typer.Option(help="Model bundle (default: the one that `make prepare-model` made).", show_default=False),
]
Folder = Annotated[Path, typer.Option(help="Where the bundle is, or is made.")]
SiteKeyFile = Annotated[Path, typer.Option("--site-key", help="Signs releases; made the first time. Keep it safe.")]
Packages = Annotated[
    list[str],
    typer.Option(
        "--package",
        help="A requirement in place of the usual one, like onnxruntime==1.22.0, or a wheel's address.",
        default_factory=list,
    ),
]
Site = Annotated[str, typer.Option(help="Name of the site.")]
Users = Annotated[Path, typer.Option(help="The broker's users file; each device gets a user there.")]
OpenBroker = Annotated[bool, typer.Option("--open-broker", help="The broker wants no users.")]
Config = Annotated[
    Path | None, typer.Option(help="TOML of the agent, for what `edge-agent config` lists.", show_default=False)
]
MachineName = Annotated[str, typer.Option("--machine", help="Processor, as `uname -m` says it.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.", show_default=False)]


@app.callback()
def flash_devices() -> None:
    """Put agents on Raspberry Pi- and Jetson-class devices (docs/flash.md)."""


@app.command("bundle")
def make_bundle(
    python: Annotated[
        list[str], typer.Option(help=f"Pythons of devices: {', '.join(PYTHONS)} (default: all).", default_factory=list)
    ],
    packages: Packages,
    machine_name: MachineName = "aarch64",
    model: Model = None,
    folder: Folder = bundles.DEFAULT_FOLDER,
    key: SiteKeyFile = DEFAULT_KEY,
    json: Json = None,
) -> None:
    """Build everything that devices need, to be flashed without internet: packages, agent, model; signed."""
    wanted = python or list(PYTHONS)
    unknown = [each for each in wanted if each not in PYTHONS]
    if unknown:
        fail(BundleFailed(f"no bundle for Python {unknown[0]}: kvbus runs on {', '.join(PYTHONS)}"))
    made = []
    with bars() as shown_bars:
        try:
            for each in wanted:
                shown = Shown(shown_bars, f"Python {each}")
                made.append(
                    bundles.build(
                        folder,
                        Target(python=each, machine=machine_name),
                        model=_model(model),
                        key=site_key(key),
                        requirements=packages,
                        say=shown.bytes,
                    )
                )
                shown.end("ready")
        except (FlashError, OSError) as error:
            fail(error)
    table = Table("Python", "release", "layer", "sent, MB", "on disk, MB", "SHA-256", box=None, pad_edge=False)
    for bundle in made:
        release = bundle.release
        for name, layer in release.layers.items():
            sizes = (f"{layer.size_bytes / 1e6:.1f}", f"{layer.unpacked_bytes / 1e6:.1f}")
            table.add_row(release.python, release.version, name, *sizes, layer.sha256[:16])
        packages_mb = release.layers[RUNTIME_LAYER].unpacked_bytes / 1e6
        table.add_row(release.python, "", f"{len(bundle.wheels)} packages", "", f"{packages_mb:.0f}", "")
    console.print(table)
    console.print(f"in {folder}; flash it: make flash HOST=pi@raspberrypi.local")
    write(json, {"releases": [msgspec.json.decode(each.release.to_bytes()) for each in made]})


@app.command()
def flash(
    hosts: Hosts,
    packages: Packages,
    agent: Annotated[str, typer.Option(help="Agent's id (default: the host's name).")] = "",
    broker: Annotated[
        str, typer.Option(help="The broker as devices reach it, HOST[:PORT] (default: this machine, port 1883).")
    ] = "",
    broker_here: Annotated[str, typer.Option(help="The same as this machine reaches it, if that differs.")] = "",
    site: Site = DEFAULT_SITE,
    users: Users = DEFAULT_USERS,
    open_broker: OpenBroker = False,
    config: Config = None,
    model: Model = None,
    folder: Folder = bundles.DEFAULT_FOLDER,
    site_key_file: SiteKeyFile = DEFAULT_KEY,
    key: Key = None,
    known_hosts: Known = KNOWN_HOSTS,
    ask_sudo: AskSudo = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look and tell; the device stays as it is.")] = False,
    at_once: Annotated[int, typer.Option(help="Devices at the same time.", min=1, max=64)] = AT_ONCE,
    all_at_once: Annotated[bool, typer.Option("--no-stages", help="Not one, then some, then all.")] = False,
    proof_s: Annotated[float, typer.Option(help="How long an agent may take to answer.", min=5)] = PROOF_S,
    json: Json = None,
) -> None:
    """Flash or update devices. Each ends with an agent that has answered, or as it was."""
    building, built = threading.Lock(), dict[Target, bundles.Bundle]()
    try:
        chosen = _model(model)
        signing = site_key(site_key_file)
        if agent and len(set(hosts)) > 1:
            raise HostUnfit("one --agent can't be several hosts; leave it out, and hosts' names are taken")
        if not agent:
            one_each(hosts)
        own = None if open_broker else users.expanduser()
        secret = getpass("sudo password: ") if ask_sudo else None
        here = here_of(own, broker_here)
    except (FlashError, BusError) as error:
        fail(error)

    with bars() as shown_bars:

        def one(name: str) -> Flashed:
            shown = Shown(shown_bars, name)

            def bundle(python: str, machine_name: str) -> bundles.Bundle:
                target = Target(python=python, machine=machine_name)
                with building:  # once for all that need the same
                    if target not in built:
                        built[target] = bundles.build(
                            folder, target, model=chosen, key=signing, requirements=packages, say=shown.bytes
                        )
                    return built[target]

            def of_host(address: str) -> Device:
                host, port = broker_place(broker, address)
                return device(
                    agent or agent_named(name), host=host, port=port, site=site, users=own, configuration=config
                )

            orders = Orders(
                bundle=bundle,
                device=of_host,
                here=here,
                dry_run=dry_run,
                trial_s=max(TRIAL_S, proof_s + 300),
                proof_s=proof_s,
            )
            try:
                with Host(name, key=key, known_hosts=known_hosts, sudo=secret) as host:
                    found = Flasher(host, orders, shown.say).flash()
            except (BusError, OSError, FlashError) as error:
                shown.end("failed")
                raise error if isinstance(error, FlashError) else BundleFailed(f"{name}: {error}") from None
            shown.end("looked at" if dry_run else "answered")
            return found

        ended = roll_out(hosts, one, staged=not all_at_once, at_once=at_once)
    for each in ended:
        for line in lines_of(each):
            console.print(line)
    write(json, {"hosts": [plain(each) for each in ended]})
    exit_by(ended)


@app.command("image")
def make_image(
    target: Annotated[Path, typer.Argument(help="A card's mounted boot partition (bootfs), or an image (.img).")],
    packages: Packages,
    agent: Annotated[str, typer.Option(help="Agent's id.")],
    broker: Annotated[str, typer.Option(help="The broker as the device will reach it, HOST[:PORT].")],
    python: Annotated[
        str, typer.Option(help="The system's Python: 3.13 in Raspberry Pi OS 13, 3.12 in JetPack 7's Ubuntu.")
    ] = "3.13",
    site: Site = DEFAULT_SITE,
    users: Users = DEFAULT_USERS,
    open_broker: OpenBroker = False,
    config: Config = None,
    model: Model = None,
    folder: Folder = bundles.DEFAULT_FOLDER,
    site_key_file: SiteKeyFile = DEFAULT_KEY,
    machine_name: MachineName = "aarch64",
) -> None:
    """Have a card install an agent at its first start, without any network (docs/flash.md, Cards)."""
    try:
        if python not in PYTHONS:
            raise BundleFailed(f"no bundle for Python {python}: kvbus runs on {', '.join(PYTHONS)}")
        host, port = broker_place(broker, "")
        own = device(agent, host=host, port=port, site=site, users=None if open_broker else users, configuration=config)
        with bars() as shown_bars:
            shown = Shown(shown_bars, str(target))
            bundle = bundles.build(
                folder,
                Target(python=python, machine=machine_name),
                model=_model(model),
                key=site_key(site_key_file),
                requirements=packages,
                say=shown.bytes,
            )
            shown.say("writing and reading back", None)
            card = customise(target, bundle, own)
            shown.end("ready")
    except (FlashError, BusError, OSError) as error:
        fail(error)
    console.print(
        f"{target}: {card.system}; {len(card.files)} files, {card.nbytes / 1e6:.0f} MB, read back. "
        f"At its first start agent {agent} is installed and looks for {host}:{port}"
    )


@app.command()
def status(
    hosts: Hosts, key: Key = None, known_hosts: Known = KNOWN_HOSTS, ask_sudo: AskSudo = False, json: Json = None
) -> None:
    """What is installed on devices, and how their agents are."""
    ended = _each(hosts, Keeper.status, key, known_hosts, ask_sudo)
    for each in ended:
        console.print(line_of(each))
    write(json, {"hosts": [plain(each) for each in ended]})
    exit_by(ended)


@app.command()
def logs(
    host: Annotated[str, typer.Argument(help="[USER@]HOST[:PORT]")],
    lines: Annotated[int, typer.Option(help="How many.", min=1, max=100_000)] = 50,
    key: Key = None,
    known_hosts: Known = KNOWN_HOSTS,
    ask_sudo: AskSudo = False,
) -> None:
    """The last lines of an agent's log."""
    (ended,) = _each([host], lambda keeper: keeper.logs(lines), key, known_hosts, ask_sudo)
    if ended.result:
        console.print(ended.result.text)
    exit_by((ended,), say=True)


@app.command()
def rollback(hosts: Hosts, key: Key = None, known_hosts: Known = KNOWN_HOSTS, ask_sudo: AskSudo = False) -> None:
    """Go back to the release before the current one."""
    ended = _each(hosts, Keeper.back, key, known_hosts, ask_sudo)
    for each in ended:
        console.print(line_of(each))
    exit_by(ended)


@app.command()
def unflash(
    hosts: Hosts,
    state: Annotated[bool, typer.Option("--state", help="Also what the agent has kept: texts, caches.")] = False,
    key: Key = None,
    known_hosts: Known = KNOWN_HOSTS,
    ask_sudo: AskSudo = False,
) -> None:
    """Take kvbus off devices."""
    ended = _each(hosts, lambda keeper: keeper.remove(state=state), key, known_hosts, ask_sudo)
    for each in ended:
        console.print(line_of(each))
    exit_by(ended)


def _each(
    hosts: list[str], work: Callable[[Keeper], Kept], key: Path | None, known: Path, ask_sudo: bool
) -> tuple[Ended[Kept], ...]:
    secret = getpass("sudo password: ") if ask_sudo else None

    def one(name: str) -> Kept:
        with Host(name, key=key, known_hosts=known, sudo=secret) as host:
            return work(Keeper(host))

    return roll_out(hosts, one, staged=False, go_on=True)


def _model(chosen: Path | None) -> Path:
    try:
        return chosen or default_bundle()
    except AgentError as error:
        raise BundleFailed(str(error)) from None


def main() -> None:
    """Ctrl-C ends it at once, whatever devices are doing."""
    try:
        app()
    except SystemExit:
        if any(thread.name.startswith(AT_WORK) for thread in threading.enumerate()):
            typer.echo("flash: interrupted; a release on trial goes back by itself within half an hour", err=True)
            sys.stdout.flush()
            os._exit(130)  # they would be waited for, and they wait for devices
        raise


if __name__ == "__main__":
    main()
