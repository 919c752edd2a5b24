"""`python -m scripts.link`: put an emulated link between one agent and the broker."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from scripts.link.bucket import Bucket
from scripts.link.emulated import EmulatedLink
from scripts.link.errors import AddressInvalid, LinkError
from scripts.link.following import follow
from scripts.traces import Trace, TraceError, read_trace

_MBIT = 1e6
_LARGEST_PORT = 65_535

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Driven(StrEnum):
    """Which direction a trace drives."""

    BOTH = "both"
    UPLINK = "uplink"
    DOWNLINK = "downlink"

    def literal(self) -> Literal["both", "uplink", "downlink"]:
        """The same as the type `follow` takes."""
        return self.value


@dataclass(frozen=True, slots=True)
class Setup:
    """What the command was asked for."""

    listen: tuple[str, int]
    broker: tuple[str, int]
    uplink_bps: float
    downlink_bps: float
    delay_s: float
    trace: Trace | None
    driven: Driven


@app.command()
def link(
    *,
    listen: Annotated[
        str, typer.Option(help="HOST:PORT the agent connects to; port 0 takes a free one.")
    ] = "127.0.0.1:1884",
    broker: Annotated[str, typer.Option(help="HOST:PORT of the broker.")] = "127.0.0.1:1883",
    uplink_mbps: Annotated[float, typer.Option(min=0, help="Agent to broker, Mbit/s; 0 is an outage.")] = 5.0,
    downlink_mbps: Annotated[float, typer.Option(min=0, help="Broker to agent, Mbit/s; 0 is an outage.")] = 5.0,
    delay_ms: Annotated[float, typer.Option(min=0, help="Delay each way, ms; a round trip takes twice that.")] = 10.0,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="CSV with the columns time_s,bandwidth_bps[,rtt_ms,rssi_dbm,loss] that drives rate and delay."
        ),
    ] = None,
    trace_direction: Annotated[Driven, typer.Option(help="Which direction the trace drives.")] = Driven.BOTH,
    trace_loop: Annotated[
        bool,
        typer.Option("--trace-loop/--trace-hold", help="At the end of the trace: start again, or hold the last row."),
    ] = True,
) -> None:
    """Put an emulated link between one agent and the broker, until interrupted.

    It is a TCP proxy: start it, then point the agent at the --listen address instead of the broker's. Each direction
    has the given rate, shared fairly by all connections, and the given delay. Start one for each agent.

    Example: python -m scripts.link --listen 127.0.0.1:1884 --broker 127.0.0.1:1883 --uplink-mbps 2 --delay-ms 20
    """
    try:
        setup = Setup(
            listen=address(listen),
            broker=address(broker),
            uplink_bps=uplink_mbps * _MBIT,
            downlink_bps=downlink_mbps * _MBIT,
            delay_s=delay_ms / 1000,
            trace=None if trace is None else read_trace(trace, loop=trace_loop),
            driven=trace_direction,
        )
        asyncio.run(run(setup))
    except (LinkError, TraceError) as error:
        _say(str(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        _say("stopped")


async def run(setup: Setup) -> None:
    """Serve until cancelled. Raises ListenRefused."""
    emulated = EmulatedLink(
        host=setup.listen[0],
        port=setup.listen[1],
        broker_host=setup.broker[0],
        broker_port=setup.broker[1],
        uplink=Bucket(setup.uplink_bps),
        downlink=Bucket(setup.downlink_bps),
        uplink_delay_s=setup.delay_s,
        downlink_delay_s=setup.delay_s,
        log=_say,
    )
    async with emulated:
        _say(f"listening on {emulated.host}:{emulated.port}, {_described(setup)}")
        try:
            if setup.trace is not None:
                await follow(emulated, setup.trace, direction=setup.driven.literal())
            await asyncio.get_running_loop().create_future()
        finally:
            _say(f"carried {emulated.uplink_bytes} bytes up, {emulated.downlink_bytes} bytes down")


def address(text: str) -> tuple[str, int]:
    """Split HOST:PORT. Raises AddressInvalid."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > _LARGEST_PORT:
        raise AddressInvalid(text)
    return host.removeprefix("[").removesuffix("]"), int(port)


def _described(setup: Setup) -> str:
    rates = f"{setup.uplink_bps / _MBIT:g} Mbit/s up, {setup.downlink_bps / _MBIT:g} down"
    text = f"broker {setup.broker[0]}:{setup.broker[1]}, {rates}, {setup.delay_s * 1000:g} ms each way"
    if setup.trace is not None:
        text += f", {setup.driven} driven by a trace of {setup.trace.duration_s:g} s"
    return text


def _say(line: str) -> None:
    print(f"link: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    app(prog_name="python -m scripts.link")
