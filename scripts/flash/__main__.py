"""`python -m scripts.flash`: put agents on devices, look after them, take them off again."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from getpass import getpass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from broker_config.errors import BusError
from broker_config.settings import BrokerSettings
from broker_config.users import users as names_in
from coordinator.credentials import DEFAULT_USERS, add_agent
from scripts.flash import bundle as bundles
from scripts.flash.card import customise
from scripts.flash.device import DEFAULT_PORT, DEFAULT_SITE, Device, agent_named, device
from scripts.flash.errors import BundleFailed, FlashError, HostUnfit
from scripts.flash.flasher import PROOF_S, TRIAL_S, Flashed, Flasher, Orders
from scripts.flash.fleet import AT_ONCE, Ended, roll_out
from scripts.flash.host import KNOWN_HOSTS, Host
from scripts.flash.keeping import Keeper, Kept
from scripts.flash.keys import DEFAULT_KEY, site_key
from scripts.flash.wheels import PYTHONS, Target
from scripts.prepare_model import default_bundle
from scripts.provenance import machine, versions

T = TypeVar("T")

OWN_USER = "flash"
"""At the broker: who asks an agent for its proof."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True)
progress = Console(stderr=True, highlight=False)

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
    machine_name: Annotated[str, typer.Option("--machine", help="Processor, as `uname -m` says it.")] = "aarch64",
    model: Model = None,
    folder: Folder = bundles.DEFAULT_FOLDER,
    key: SiteKeyFile = DEFAULT_KEY,
    json: Json = None,
) -> None:
    """Build everything that devices need, to be flashed without internet: packages, agent, model; signed."""
    wanted = python or list(PYTHONS)
    unknown = [each for each in wanted if each not in PYTHONS]
    if unknown:
        _fail(BundleFailed(f"no bundle for Python {unknown[0]}: kvbus runs on {', '.join(PYTHONS)}"))
    made = []
    with _bars() as bars:
        try:
            for each in wanted:
                shown = _Shown(bars, f"Python {each}")
                made.append(
                    bundles.build(
                        folder,
                        Target(python=each, machine=machine_name),
                        model=model or default_bundle(),
                        key=site_key(key),
                        requirements=packages,
                        say=shown.bytes,
                    )
                )
                shown.end("ready")
        except (FlashError, OSError) as error:
            _fail(error)
    table = Table("Python", "release", "layer", "sent, MB", "on disk, MB", "SHA-256", box=None, pad_edge=False)
    for bundle in made:
        release = bundle.release
        for name, layer in release.layers.items():
            sizes = (f"{layer.size_bytes / 1e6:.1f}", f"{layer.unpacked_bytes / 1e6:.1f}")
            table.add_row(release.python, release.version, name, *sizes, layer.sha256[:16])
        packages_mb = release.layers[bundles.RUNTIME].unpacked_bytes / 1e6
        table.add_row(release.python, "", f"{len(bundle.wheels)} packages", "", f"{packages_mb:.0f}", "")
    console.print(table)
    console.print(f"in {folder}; flash it: make flash HOST=pi@raspberrypi.local")
    _write(json, {"releases": [msgspec.json.decode(each.release.to_bytes()) for each in made]})


@app.command()
def flash(
    hosts: Hosts,
    packages: Packages,
    agent: Annotated[str, typer.Option(help="Agent's id (default: the host's name).")] = "",
    broker: Annotated[
        str, typer.Option(help="The broker as devices reach it, HOST[:PORT] (default: this machine, port 1883).")
    ] = "",
    broker_here: Annotated[str, typer.Option(help="The same as this machine reaches it, if that differs.")] = "",
    site: Annotated[str, typer.Option(help="Name of the site.")] = DEFAULT_SITE,
    users: Annotated[
        Path, typer.Option(help="The broker's users file; each device gets a user there.")
    ] = DEFAULT_USERS,
    open_broker: Annotated[bool, typer.Option("--open-broker", help="The broker wants no users.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="TOML of the agent, for what `edge-agent config` lists.", show_default=False)
    ] = None,
    model: Model = None,
    folder: Folder = bundles.DEFAULT_FOLDER,
    site_key_file: SiteKeyFile = DEFAULT_KEY,
    key: Key = None,
    known_hosts: Known = KNOWN_HOSTS,
    ask_sudo: AskSudo = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look and tell; change nothing.")] = False,
    at_once: Annotated[int, typer.Option(help="Devices at the same time.", min=1, max=64)] = AT_ONCE,
    all_at_once: Annotated[bool, typer.Option("--no-stages", help="Not one, then some, then all.")] = False,
    proof_s: Annotated[float, typer.Option(help="How long an agent may take to answer.", min=5)] = PROOF_S,
    json: Json = None,
) -> None:
    """Flash or update devices. Each ends with an agent that has answered, or as it was."""
    chosen = model or default_bundle()
    building = threading.Lock()
    try:
        signing = site_key(site_key_file)
        if agent and len(set(hosts)) > 1:
            raise HostUnfit("one --agent can't be several hosts; leave it out, and hosts' names are taken")
        own = None if open_broker else users.expanduser()
        secret = getpass("sudo password: ") if ask_sudo else None
        here = _here(own, broker_here)
    except (FlashError, BusError) as error:
        _fail(error)

    with _bars() as bars:

        def one(name: str) -> Flashed:
            shown = _Shown(bars, name)

            def bundle(python: str, machine_name: str) -> bundles.Bundle:
                with building:  # once for all that need the same
                    target = Target(python=python, machine=machine_name)
                    return bundles.build(
                        folder, target, model=chosen, key=signing, requirements=packages, say=shown.bytes
                    )

            def of_host(address: str) -> Device:
                host, port = _broker(broker, address)
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
        for line in _lines(each):
            console.print(line)
    _write(json, {"hosts": [_plain(each) for each in ended]})
    _exit(ended)


@app.command("image")
def make_image(
    target: Annotated[Path, typer.Argument(help="A card's mounted boot partition (bootfs), or an image (.img).")],
    packages: Packages,
    agent: Annotated[str, typer.Option(help="Agent's id.")],
    broker: Annotated[str, typer.Option(help="The broker as the device will reach it, HOST[:PORT].")],
    python: Annotated[
        str, typer.Option(help="The system's Python: 3.13 in Raspberry Pi OS 13, 3.12 in JetPack 7's Ubuntu.")
    ] = "3.13",
    site: Annotated[str, typer.Option(help="Name of the site.")] = DEFAULT_SITE,
    users: Annotated[Path, typer.Option(help="The broker's users file; the device gets a user there.")] = DEFAULT_USERS,
    open_broker: Annotated[bool, typer.Option("--open-broker", help="The broker wants no users.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="TOML of the agent, for what `edge-agent config` lists.", show_default=False)
    ] = None,
    model: Model = None,
    folder: Folder = bundles.DEFAULT_FOLDER,
    site_key_file: SiteKeyFile = DEFAULT_KEY,
    machine_name: Annotated[str, typer.Option("--machine", help="Processor, as `uname -m` says it.")] = "aarch64",
) -> None:
    """Have a card install an agent at its first start, without any network (docs/flash.md, Cards)."""
    try:
        if python not in PYTHONS:
            raise BundleFailed(f"no bundle for Python {python}: kvbus runs on {', '.join(PYTHONS)}")
        host, port = _broker(broker, "")
        own = device(agent, host=host, port=port, site=site, users=None if open_broker else users, configuration=config)
        with _bars() as bars:
            shown = _Shown(bars, str(target))
            bundle = bundles.build(
                folder,
                Target(python=python, machine=machine_name),
                model=model or default_bundle(),
                key=site_key(site_key_file),
                requirements=packages,
                say=shown.bytes,
            )
            shown.say("writing and reading back", None)
            card = customise(target, bundle, own)
            shown.end("ready")
    except (FlashError, BusError, OSError) as error:
        _fail(error)
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
        console.print(_line(each))
    _write(json, {"hosts": [_plain(each) for each in ended]})
    _exit(ended)


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
        console.print(ended.result.text, markup=False)
    _exit((ended,), say=True)


@app.command()
def rollback(hosts: Hosts, key: Key = None, known_hosts: Known = KNOWN_HOSTS, ask_sudo: AskSudo = False) -> None:
    """Go back to the release before the current one."""
    ended = _each(hosts, Keeper.back, key, known_hosts, ask_sudo)
    for each in ended:
        console.print(_line(each))
    _exit(ended)


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
        console.print(_line(each))
    _exit(ended)


def _line(ended: Ended[Kept]) -> str:
    return f"{ended.host}: {ended.result.text}" if ended.result else str(ended.error)


def _each(
    hosts: list[str], work: Callable[[Keeper], Kept], key: Path | None, known: Path, ask_sudo: bool
) -> tuple[Ended[Kept], ...]:
    secret = getpass("sudo password: ") if ask_sudo else None

    def one(name: str) -> Kept:
        with Host(name, key=key, known_hosts=known, sudo=secret) as host:
            return work(Keeper(host))

    return roll_out(hosts, one, staged=False)


def _here(users: Path | None, address: str) -> Callable[[BrokerSettings], BrokerSettings]:
    """The broker as we reach it, with a user of our own."""
    user = password_file = None
    if users is not None:
        user, password = OWN_USER, users.parent / f"{OWN_USER}.password"
        if OWN_USER not in names_in(users) or not password.exists():
            add_agent(users, OWN_USER)
        password_file = str(password)

    def here(there: BrokerSettings) -> BrokerSettings:
        host, port = _broker(address, there.host, there.port)
        return BrokerSettings(host=host, port=port, username=user, password_file=password_file)

    return here


def _broker(address: str, default: str, port: int = DEFAULT_PORT) -> tuple[str, int]:
    """HOST[:PORT], or the default. Raises HostUnfit."""
    if not address:
        if default.startswith("127.") or default == "::1":
            raise HostUnfit("the broker's address for devices can't be told from here; give it: --broker HOST[:PORT]")
        return default, port
    host, separator, number = address.rpartition(":")
    if not separator or address.endswith("]"):
        return address.strip("[]"), port
    if not number.isdigit() or not 0 < int(number) < 1 << 16:
        raise HostUnfit(f"{address!r} is no HOST[:PORT]")
    return host.strip("[]"), int(number)


class _Shown:
    """One host's line."""

    def __init__(self, bars: Progress, name: str) -> None:
        self._bars, self._name, self._text = bars, name, ""
        self._task: TaskID = bars.add_task(f"{name}: begins", total=None)

    def say(self, text: str, share: float | None) -> None:
        """What is being done."""
        if not self._bars.console.is_terminal and text != self._text:
            self._bars.console.print(f"{self._name}: {text}")
        self._text = text
        self._bars.update(
            self._task, description=f"{self._name}: {text}", total=None if share is None else 1.0, completed=share or 0
        )

    def bytes(self, what: str, done: int, total: int) -> None:
        """The same, of a bundle being built."""
        self.say(f"building: {what}", done / total if total else None)

    def end(self, text: str) -> None:
        """It is done."""
        self.say(text, 1.0)


def _bars() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    return Progress(*columns, console=progress, disable=not progress.is_terminal)


def _lines(ended: Ended[Flashed]) -> list[str]:
    if ended.error is not None:
        return [str(ended.error)]
    if ended.result is None:
        return [f"{ended.host}: not begun, since another failed"]
    flashed = ended.result
    if flashed.proof is None:
        return [f"{ended.host}:", *(f"  {line}" for line in flashed.plan)]
    proof = flashed.proof
    change = f"sent {flashed.sent_bytes / 1e6:.1f} MB" if flashed.changed else "was there already"
    rates = f"prefill {proof.prefill_tps:.0f} and decode {proof.decode_tps:.0f} tokens/s"
    runs = f"agent {flashed.agent} runs {flashed.release} ({change}, {flashed.seconds:.0f} s)"
    return [f"{ended.host}: {runs}; it answered in {proof.first_token_s:.2f} s, {rates}"]


def _plain(ended: Ended[Any]) -> dict[str, Any]:
    return {
        "host": ended.host,
        "error": str(ended.error) if ended.error else None,
        "result": msgspec.to_builtins(ended.result) if ended.result else None,
    }


def _write(path: Path | None, content: dict[str, Any]) -> None:
    if path is None:
        return
    whole = {
        "command": sys.argv,
        "machine": machine(),
        "versions": versions(("kvbus", "fabric", "paramiko")),
        **content,
    }
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(whole)) + b"\n")
    except OSError as error:
        _fail(error)


def _exit(ended: tuple[Ended[Any], ...], *, say: bool = False) -> None:
    failed = [each for each in ended if each.result is None]
    if say:
        for each in failed:
            typer.echo(f"flash: {each.error}", err=True)
    if failed:
        raise typer.Exit(1)


def _fail(error: Exception) -> Any:
    typer.echo(f"flash: {error}", err=True)
    raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
