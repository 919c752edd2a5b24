"""`python -m scripts.demo`: the play on the stage, told as it goes."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from broker_config.errors import BusError
from broker_config.messages import RoundReport
from coordinator.errors import CoordinatorError
from coordinator.show import medium, outcome_lines, plan_lines, seconds, size
from edge_agent.errors import AgentError
from scripts.demo.processes import DemoFailed
from scripts.demo.script import POLICIES, RECEIVER, SENDERS, Act, Question, acts, in_turn
from scripts.demo.stage import Stage, stage
from scripts.prepare_model import default_bundle

console = Console(highlight=False, soft_wrap=True, markup=False)
FIXED = ("token", "kv")
"""Against the faster of which each question's E2E is held."""


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """One question under one policy."""

    act: str
    policy: str
    right: bool
    report: RoundReport


def main(
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave it running afterwards, to ask questions of your own.")
    ] = False,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Ask everything so many times.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
    record: Annotated[
        Path | None,
        typer.Option("--record", help="Record the session to this new file, for `python -m scripts.replay`."),
    ] = None,
) -> None:
    """Three agents with a real model answer questions over shaped links: what travels, how big, how fast, how right."""
    logging.getLogger().addHandler(logging.NullHandler())  # what matters is printed
    if record and record.exists():
        console.print(f"demo: {record} exists already; name another file to record to")
        raise typer.Exit(1)
    try:
        asyncio.run(_run(keep, rounds, json_file, record and record.absolute()))
    except (DemoFailed, AgentError, BusError, CoordinatorError, OSError) as error:
        console.print(f"demo: {error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("stopped")
        raise typer.Exit(130) from None


async def _run(keep: bool, rounds: int, json_file: Path | None, record: Path | None) -> None:
    start = time.monotonic()
    bundle = default_bundle()
    play = acts()
    with tempfile.TemporaryDirectory(prefix="kvbus-demo-") as temporary:
        folder = Path(temporary)
        console.print("starting an embedded broker, a coordinator, and agents pi-1, pi-2 and jetson-1 …")
        async with stage(bundle, folder, play[0], lambda line: console.print(f"  {line}"), record) as running:
            console.print(f"all ready after {time.monotonic() - start:.0f} s\n")
            played: list[Played] = []
            for act in play:
                played += await _play(running, act, rounds, len(played) // len(POLICIES))
            console.print(_closing_table(played))
            if json_file:
                measured = msgspec.json.format(msgspec.json.encode(_record(played, start)))
                await asyncio.to_thread(json_file.write_bytes, measured)
                console.print(f"written to {json_file}")
            console.print(f"{len(played)} questions in {time.monotonic() - start:.0f} s, start included")
            if keep:
                await _stay(running, folder)
        if record:
            console.print(f"recorded to {record}; its plans again: python -m scripts.replay plans {record}")


async def _play(running: Stage, act: Act, rounds: int, asked: int) -> list[Played]:
    """One act: each of its questions under every policy in turn, all under the same links and memory.

    asked: questions of the acts before.
    """
    rates = ", ".join(f"{agent} {mbps:g}" for agent, mbps in act.rates_mbps.items())
    console.print(f"── {act.title} (links set to {rates} Mbit/s)")
    await running.set_links(act)
    if act.fill is not None:
        await running.fill(act.fill)
    if act.tighten:
        await running.tighten()
    if act.fill is not None or act.tighten:
        console.print(f"   {running.kept()}")
    played: list[Played] = []
    for number, question in enumerate(act.questions * rounds):
        console.print(f"   {question.question}")
        played += [await _ask(running, act, question, policy) for policy in in_turn(asked + number)]
    console.print()
    return played


async def _ask(running: Stage, act: Act, question: Question, policy: str) -> Played:
    report = await running.client.ask(
        question.question,
        sources=[f"{agent}:{SENDERS[agent]}" for agent in question.sources],
        receiver=RECEIVER,
        policy=policy,
        quality_floor=act.quality_floor,
    )
    running.programs.check()
    played = Played(act=act.title, policy=policy, right=question.right(report.answer), report=report)
    verdict = "right" if played.right else f"WRONG, expected {question.expected[0]}"
    if report.state != "answered":
        verdict = f"{report.state}: {report.reason}"
    media = ", ".join(f"{link.sender} {medium(link)}" for link in report.links)
    if policy != POLICIES[0]:
        console.print(
            f"      {policy}: E2E {seconds(report.e2e_s)} (predicted {report.predicted_e2e_s:.2f} s), {media}: "
            f"{report.answer!r} {verdict}"
        )
        return played
    for line in (*plan_lines(report), *outcome_lines(report), f"answer: {report.answer!r} ({verdict})"):
        console.print(f"      {policy}: {line}")
    return played


def _wire_bytes(report: RoundReport) -> int:
    return sum(link.wire_bytes or 0 for link in report.links)


def _closing_table(played: list[Played]) -> Table:
    table = Table(
        title="by policy: the same questions, links, memory and quality floor",
        caption="÷ fixed: E2E over the faster of token and kv; off by: |predicted/measured - 1|; medians",
    )
    columns = ("policy", "mean E2E", "worst", "÷ fixed", "off by", "splits", "sent", "right")
    for column in columns:
        table.add_column(column, justify="left" if column == "policy" else "right")
    for policy in POLICIES:
        mine = [each for each in played if each.policy == policy]
        e2e = [each.report.e2e_s for each in mine if each.report.e2e_s is not None]
        errors = [
            abs(each.report.predicted_e2e_s / each.report.e2e_s - 1) for each in mine if each.report.e2e_s is not None
        ]
        table.add_row(
            policy,
            seconds(statistics.mean(e2e)),
            seconds(max(e2e)),
            f"{statistics.median(_against_fixed(played, policy)):.2f}",
            f"{statistics.median(errors):.0%}",
            str(sum(any(link.medium == "split" for link in each.report.links) for each in mine)),
            size(sum(_wire_bytes(each.report) for each in mine)),
            f"{sum(each.right for each in mine)} of {len(mine)}",
        )
    return table


def _against_fixed(played: list[Played], policy: str) -> list[float]:
    """E2E of each question under a policy over the lower of those under the fixed ones, asked right before or after."""
    by_policy = {
        name: [each.report.e2e_s for each in played if each.policy == name] for name in dict.fromkeys((policy, *FIXED))
    }
    rows = zip(by_policy[policy], *(by_policy[name] for name in FIXED), strict=True)
    return [mine / min(fixed) for mine, *fixed in rows if mine is not None and None not in fixed]


def _record(played: list[Played], start: float) -> dict[str, Any]:
    packages = ("kvbus", "onnxruntime", "numpy", "aiomqtt", "amqtt")
    return {
        "command": " ".join(["python -m scripts.demo", *sys.argv[1:]]),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "system": platform.platform(terse=True)},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "seconds": time.monotonic() - start,
        "questions": played,
    }


async def _stay(running: Stage, folder: Path) -> None:
    console.print(
        "\nstill running; in another terminal, for example:\n"
        f"  .venv/bin/coordinator status -c {folder / 'coordinator.toml'}\n"
        f'  .venv/bin/coordinator ask "How deep is the well?" --from pi-2 --to {RECEIVER} '
        f"-c {folder / 'coordinator.toml'}\n"
        f"logs are in {folder}; Ctrl-C ends it"
    )
    while True:
        running.programs.check()
        await asyncio.sleep(1)


if __name__ == "__main__":
    typer.run(main)
