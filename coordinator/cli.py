"""The command `coordinator`."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import logging
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import structlog
import typer
from rich.console import Console

from broker_config.broker import EmbeddedBroker, is_loopback
from broker_config.discovery import Announcement, own_addresses
from broker_config.errors import BrokerRefusedToStart, BusError
from broker_config.messages import DEFAULT_QUALITY_FLOOR, Ended, Piece, Planned, RoundEvent, RoundReport
from broker_config.mosquitto import render
from broker_config.settings import describe, load_toml
from broker_config.users import users as names_in
from coordinator.client import Client
from coordinator.credentials import DEFAULT_USERS
from coordinator.credentials import add_agent as make_credentials
from coordinator.credentials import remove_agent as remove_credentials
from coordinator.errors import CoordinatorError
from coordinator.service import Coordinator
from coordinator.settings import CoordinatorSettings
from coordinator.show import error_lines, fleet_table, outcome_lines, plan_lines

app = typer.Typer(
    help="Plans what travels between the agents of a site (text tokens or KV cache, at how many bits, with what share "
    "of the channel), and asks them questions.\n\n"
    "On one machine: `coordinator broker` starts an embedded MQTT broker, `coordinator run` the coordinator, "
    '`edge-agent run agent.toml` each agent; then `coordinator ask "…" --from pi-1 --to jetson-1`.',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False, soft_wrap=True)

Configuration = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="TOML file; `coordinator config` prints one. Without it: the defaults."),
]
USERS_HELP = f"Users file, as `coordinator add-agent` makes it (default: none on loopback, beyond it {DEFAULT_USERS})."


@app.command()
def run(
    configuration: Configuration = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Record the session to this new file, or in this folder to one named by site and time."),
    ] = None,
) -> None:
    """Run the coordinator of a site until it is stopped (Ctrl-C or SIGTERM)."""
    _set_up_logs()
    settings = _settings(configuration)

    async def work() -> None:
        await Coordinator(settings, record).run()

    _do(_until_stopped(work()))


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    sources: Annotated[
        str,
        typer.Option(
            "--from", help="Who holds what it is asked of: pi-1,pi-2, or one context of it: pi-1:site-report."
        ),
    ],
    receiver: Annotated[str, typer.Option("--to", help="The agent that is to answer.")],
    configuration: Configuration = None,
    policy: Annotated[
        str | None, typer.Option(help="optimum, jmsra, token or kv (default: the coordinator's).")
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds to the first answer token; what is left of them goes into quality.")
    ] = None,
    quality: Annotated[
        float, typer.Option(help="Largest mean KL divergence, in nats, that compression may cost.")
    ] = DEFAULT_QUALITY_FLOOR,
    rung: Annotated[
        str | None,
        typer.Option(help="Send caches at this rung of the model's ladder, whatever its loss: q6, qkvcomm-6, ..."),
    ] = None,
    facts: Annotated[
        int, typer.Option(help="Tokens of facts (keywords, names, numbers) that come with each cache.")
    ] = 0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 32,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there as JSON.")] = None,
) -> None:
    """Ask a question; prints the plan, the answer as it is generated, and what it took."""
    settings = _settings(configuration)

    def show(event: RoundEvent) -> None:
        match event:
            case Planned(report=report):
                for line in plan_lines(report):
                    console.print(line, style="dim", markup=False)
            case Piece(text=text):
                console.print(text, end="", markup=False)
            case Ended(report=report):
                console.print()
                for line in outcome_lines(report):
                    console.print(line, style="dim", markup=False)

    async def work() -> None:
        async with Client(broker=settings.broker, site=settings.site) as client:
            report = await client.ask(
                question,
                sources=[source.strip() for source in sources.split(",") if source.strip()],
                receiver=receiver,
                policy=policy,
                deadline_s=deadline,
                quality_floor=quality,
                rung=rung,
                facts_tokens=facts,
                max_new_tokens=max_tokens,
                on_event=show,
            )
        if json_file:
            _write_json(json_file, report)
        if report.state != "answered":
            typer.echo(f"coordinator: {report.state}: {report.reason}", err=True)
            raise typer.Exit(1)

    _do(work())


@app.command()
def status(configuration: Configuration = None) -> None:
    """Show the agents of the site: memory, links, speeds, contexts; and how well rounds were predicted."""
    settings = _settings(configuration)

    async def work() -> None:
        async with Client(broker=settings.broker, site=settings.site) as client:
            console.print(fleet_table(await client.fleet()))
            for line in error_lines(await client.errors()):
                console.print(line, style="dim", markup=False)

    _do(work())


@app.command()
def give(
    agent: Annotated[str, typer.Argument(help="The agent that is to hold the text.")],
    file: Annotated[Path, typer.Argument(help="A text file.")],
    name: Annotated[str | None, typer.Option(help="Name of the context (default: the file's name).")] = None,
    configuration: Configuration = None,
) -> None:
    """Give an agent a text to hold, prefill and answer from."""
    settings = _settings(configuration)

    async def work() -> None:
        try:
            text = await asyncio.to_thread(file.read_text, encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else "not UTF-8 text"
            raise CoordinatorError(f"can't read {file}: {why}") from None
        async with Client(broker=settings.broker, site=settings.site) as client:
            held = await client.give(agent, name or file.stem, text)
        console.print(f"{agent} holds " + ", ".join(f"{context.name} ({context.tokens} tokens)" for context in held))

    _do(work())


@app.command()
def remove(
    agent: Annotated[str, typer.Argument(help="The agent.")],
    name: Annotated[str, typer.Argument(help="Name of the context.")],
    configuration: Configuration = None,
) -> None:
    """Have an agent forget a context, its text and its cache."""
    settings = _settings(configuration)

    async def work() -> None:
        async with Client(broker=settings.broker, site=settings.site) as client:
            held = await client.remove(agent, name)
        console.print(f"{agent} holds " + (", ".join(context.name for context in held) or "no context"))

    _do(work())


@app.command()
def broker(
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback only with users.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port.")] = 1883,
    users: Annotated[Path | None, typer.Option(help=USERS_HELP)] = None,
    announce: Annotated[
        str | None, typer.Option(help='Announce it by mDNS under this site\'s name, for agents with host = "mdns".')
    ] = None,
) -> None:
    """Run the embedded MQTT broker (for one machine, or a few; for more use Mosquitto)."""
    _set_up_logs()

    async def work() -> None:
        async with EmbeddedBroker(host, port, _users(host, users)):
            structlog.get_logger().info("broker listens", host=host, port=port)
            await _announced(announce, host, port)

    async def _announced(site: str | None, host: str, port: int) -> None:
        if site is None:
            await asyncio.Event().wait()
        addresses = own_addresses() if host in {"0.0.0.0", "::"} else [host]  # noqa: S104
        async with Announcement(str(site), port, addresses):
            structlog.get_logger().info("broker is announced", site=site, addresses=addresses)
            await asyncio.Event().wait()

    _do(_until_stopped(work()))


@app.command("mosquitto-config")
def mosquitto_config(
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback only with users.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port.")] = 1883,
    users: Annotated[Path | None, typer.Option(help=USERS_HELP)] = None,
    persistence: Annotated[Path | None, typer.Option(help="Folder in which the broker keeps sessions.")] = None,
) -> None:
    """Print a mosquitto.conf for this system: `coordinator mosquitto-config > kvbus.conf; mosquitto -c kvbus.conf`."""
    try:
        typer.echo(render(host, port, _users(host, users), persistence), nl=False)
    except BusError as error:
        _fail(error)


@app.command("add-agent")
def add_agent(
    name: Annotated[str, typer.Argument(help="The agent's id; the coordinator needs a user too, called coordinator.")],
    users: Annotated[Path, typer.Option(help="Users file of the broker (embedded or Mosquitto).")] = DEFAULT_USERS,
    password_file: Annotated[
        Path | None,
        typer.Option(help="Where to write the new password (default: NAME.password beside the users file)."),
    ] = None,
    ask_password: Annotated[bool, typer.Option("--ask", help="Type a password instead of having one made.")] = False,
) -> None:
    """Add a user to the broker: writes the users file, and the password to a file for the agent's configuration."""
    users = users.expanduser()
    password = getpass.getpass(f"password of {name}: ") if ask_password else None
    try:
        target = make_credentials(
            users, name, password_file=password_file and password_file.expanduser(), password=password
        )
    except BusError as error:
        _fail(error)
    typer.echo(f"user {name} added to {users}; password in {target}")
    typer.echo(f'in the agent\'s configuration: [broker] username = "{name}", password_file = "{target}"')


@app.command("remove-agent")
def remove_agent(
    name: Annotated[
        str, typer.Argument(help="The user: an agent's id, for a device that was lost or is used no more.")
    ],
    users: Annotated[Path, typer.Option(help="Users file of the broker (embedded or Mosquitto).")] = DEFAULT_USERS,
) -> None:
    """Take a user of the broker away, with the file that holds its password."""
    users = users.expanduser()
    try:
        remove_credentials(users, name)
    except BusError as error:
        _fail(error)
    typer.echo(f"user {name} is no longer in {users}; Mosquitto reads it at `kill -HUP`, the embedded broker by itself")
    typer.echo("a connection that is open stays so until the broker or the agent starts again")


@app.command()
def config() -> None:
    """Print a commented configuration with every field, its unit and its default."""
    typer.echo(describe(CoordinatorSettings), nl=False)


def _settings(path: Path | None) -> CoordinatorSettings:
    try:
        return load_toml(path, CoordinatorSettings) if path else CoordinatorSettings()
    except BusError as error:
        _fail(error)


def _users(host: str, users: Path | None) -> Path | None:
    """The users file of a broker: the one that was named, or, beyond loopback, the one that add-agent writes."""
    if users is None:
        return None if is_loopback(host) else DEFAULT_USERS.expanduser()
    if not names_in(users.expanduser()):
        raise BrokerRefusedToStart(f"{users} holds no users; run `coordinator add-agent NAME --users {users}` first")
    return users.expanduser()


def _write_json(path: Path, report: RoundReport) -> None:
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    except OSError as error:
        raise CoordinatorError(f"can't write {path}: {error.strerror or error}") from None


def _do(work: Coroutine[Any, Any, None]) -> None:
    """Run it; a mistake of a person's is one line."""
    try:
        asyncio.run(work)
    except (CoordinatorError, BusError) as error:
        _fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"coordinator: {error}", err=True)
    raise typer.Exit(1) from None


async def _until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """SIGTERM and SIGINT end the work in good order."""
    loop = asyncio.get_running_loop()
    running = asyncio.ensure_future(work)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await running


def _set_up_logs() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    renderer: Any = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),  # which outlives a disk that is full of logs
    )


if __name__ == "__main__":
    app()
