"""`python -m scripts.policies`: what planning is worth, computed by the coordinator's own model; no model is run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from msgspec import Struct
from rich.console import Console

from scripts.bench.runtime.shown import Steps
from scripts.policies import findings, plots, regions, scale, simulation, tables
from scripts.policies.errors import PoliciesError
from scripts.policies.profiles import profiles
from scripts.provenance import machine, versions

OUTPUT = Path("build/policies")
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
console = Console(stderr=True, highlight=False)


class Part(StrEnum):
    """What can be computed by itself, in this order."""

    FINDINGS = "findings"
    REGIONS = "regions"
    SIMULATION = "simulation"
    SCALE = "scale"


class Sizes(Struct, frozen=True, kw_only=True):
    """How much of everything."""

    curve: int
    points: int
    rounds: int
    links: tuple[int, ...]
    repeats: int
    longest_s: float

    def steps(self, part: Part) -> int:
        """Of a part."""
        return {
            Part.FINDINGS: findings.steps(self.curve),
            Part.REGIONS: regions.steps(self.points),
            Part.SIMULATION: self.rounds,
            Part.SCALE: scale.steps(self.links),
        }[part]


class Report(Struct, kw_only=True):
    """Sections of Markdown, the record behind them, and the pictures that were drawn."""

    lines: list[str]
    record: dict[str, Any]
    pictures: list[str]


@app.command()
def main(
    *,
    only: Annotated[list[Part] | None, typer.Option(help="Compute this part and no other; can be repeated.")] = None,
    curve: Annotated[int, typer.Option(min=2, help="Points of each curve.")] = 13,
    points: Annotated[int, typer.Option(min=3, help="Link rates of a map; three quarters as many prefills.")] = 26,
    rounds: Annotated[int, typer.Option(min=1, help="Random rounds.")] = 120,
    links: Annotated[
        str, typer.Option(help="Numbers of links to plan, rising, with commas.", metavar="N,N,...")
    ] = ",".join(map(str, scale.SIZES)),
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each number of links, fewer of long ones.")] = 15,
    longest: Annotated[
        float, typer.Option(min=0, help="Seconds: a stage that is expected to take longer is left out.")
    ] = 30,
    output: Annotated[Path, typer.Option(help="Directory for tables and figures.")] = OUTPUT,
    copy: Annotated[Path | None, typer.Option(help="Also copy the figures to this directory.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all of it to this file.")] = None,
) -> None:
    """Compute what planning is worth; tables to standard output and, with figures, to build/policies/."""
    try:
        sizes = Sizes(
            curve=curve, points=points, rounds=rounds, links=_numbers(links), repeats=repeats, longest_s=longest
        )
        _ready(output, copy, json_file)
        report = _computed([part for part in Part if not only or part in only], sizes, output)
        _write(report, output, copy, json_file)
    except PoliciesError as error:
        console.print(f"policies: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _numbers(text: str) -> tuple[int, ...]:
    """Rising numbers of links. Raises PoliciesError."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PoliciesError(f"--links {text}: whole numbers with commas are needed, as 100,1000") from None
    if min(found) < 1 or list(found) != sorted(set(found)):
        raise PoliciesError(f"--links {text}: they must be 1 or more, and rise")
    return found


def _ready(output: Path, copy: Path | None, json_file: Path | None) -> None:
    """Finds out before the work whether its result can be written. Raises PoliciesError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PoliciesError(f"{output} can't be made ({error.strerror})") from None
    for option, directory in (("--copy", copy), ("--json", json_file and json_file.absolute().parent)):
        if directory is not None and not directory.is_dir():
            raise PoliciesError(f"{option}: there is no directory {directory}")


def _computed(parts: Sequence[Part], sizes: Sizes, output: Path) -> Report:
    record = {
        "command": " ".join(["python -m scripts.policies", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(("kvbus", "numpy")),
        "profiles": profiles(),
    }
    report = Report(lines=[f"`{record['command']}`\n", *tables.profile_lines()], record=record, pictures=[])
    for part in parts:
        console.print(f"{part} …", markup=False)
        with Steps(console) as steps:
            steps.expect(sizes.steps(part))
            found = _compute(part, sizes, steps)
        lines, pictures = _shown(found, output)
        report.record[part.value] = found
        report.lines += lines
        report.pictures += pictures
    return report


Found = findings.Findings | regions.Regions | simulation.Simulation | tuple[scale.Timed, ...]


def _compute(part: Part, sizes: Sizes, steps: Steps) -> Found:
    if part is Part.FINDINGS:
        return findings.findings(sizes.curve, steps.next)
    if part is Part.REGIONS:
        return regions.regions(sizes.points, steps.next)
    if part is Part.SIMULATION:
        return simulation.simulation(sizes.rounds, steps.next)
    return scale.scale(sizes.links, sizes.repeats, sizes.longest_s, steps.next)


def _shown(found: Found, output: Path) -> tuple[list[str], Sequence[str]]:
    """The part's tables, and the names of the figures drawn."""
    if isinstance(found, findings.Findings):
        return tables.findings_lines(found), plots.draw_findings(found, output)
    if isinstance(found, regions.Regions):
        plots.draw_regions(found, output / "policies-regions.png")
        return tables.regions_lines(found), ["policies-regions.png"]
    if isinstance(found, simulation.Simulation):
        plots.draw_simulation(found, output / "policies-simulation.png")
        return tables.simulation_lines(found), ["policies-simulation.png"]
    plots.draw_scale(found, output / "policies-scale.png")
    return tables.scale_lines(found), ["policies-scale.png"]


def _write(report: Report, output: Path, copy: Path | None, json_file: Path | None) -> None:
    """Raises PoliciesError if something can't be written."""
    text = "\n".join(report.lines) + "\n"
    record = msgspec.json.format(msgspec.json.encode(report.record))
    try:
        (output / "policies.md").write_text(text, encoding="utf-8")
        for path in (output / "policies.json", json_file):
            if path is not None:
                path.write_bytes(record)
        if copy is not None:
            for picture in report.pictures:
                shutil.copyfile(output / picture, copy / picture)
    except OSError as error:
        raise PoliciesError(f"{error.filename} can't be written ({error.strerror})") from None
    typer.echo(text)
    typer.echo(f"in {output}: {', '.join(['policies.md', 'policies.json', *report.pictures])}")


if __name__ == "__main__":
    app()
