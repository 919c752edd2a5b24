"""The runtime's tables, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.bench.runtime.measured import LOAD, PEAK, REFERENCES, Row, RuntimeBench, Spread, mass_cost, ratio
from scripts.bench.runtime.run import PREFILL

_NONE = "–"


def sections(benches: Sequence[RuntimeBench]) -> list[str]:
    """Lines for all models: what each variant does, how it compares, and what is not there."""
    return [line for bench in benches for line in (*_figures(bench), *_ratios(bench), *_mass(bench), *_absent(bench))]


def _figures(bench: RuntimeBench) -> list[str]:
    heads = ["file MB", *(_head(job) for job in bench.jobs)]
    versions = ", ".join(dict.fromkeys(row.version for row in bench.rows))
    return [
        f"Runtime, {bench.model}, {bench.threads} thread(s): medians, prefill and decode in tokens/s ({versions})\n",
        f"| variant | {' | '.join(heads)} |",
        "|---|" + "--:|" * len(heads),
        *(
            f"| {row.name} | {row.file_mb:.0f} | {' | '.join(_figure(row, job) for job in bench.jobs)} |"
            for row in bench.rows
        ),
        "",
    ]


def _ratios(bench: RuntimeBench) -> list[str]:
    references = [row for name in REFERENCES if (row := bench.row(name)) is not None]
    pairs = [(row, reference) for reference in references for row in bench.rows if row is not reference]
    if not pairs:
        return []
    speeds = [job for job in bench.jobs if job not in {LOAD, PEAK}]
    jobs = [*speeds, *(job for job in bench.jobs if job in {LOAD, PEAK})]
    return [
        (
            f"Runtime, {bench.model}: each round's ratio, median (least-most); of speeds more is better, of load and "
            "peak memory less\n"
        ),
        f"| ratio | {' | '.join(jobs)} |",
        "|---|" + "--:|" * len(jobs),
        *(
            f"| {row.name} ÷ {reference.name} | {' | '.join(_spread(ratio(row, reference, job)) for job in jobs)} |"
            for row, reference in pairs
        ),
        "",
    ]


def _mass(bench: RuntimeBench) -> list[str]:
    costs = {row.name: mass_cost(row, PREFILL) for row in bench.rows}
    found = [f"{name} {_spread(cost)}" for name, cost in costs.items() if cost is not None]
    said = f"Time of {PREFILL} with the attention mass of its last queries ÷ time without: {', '.join(found)}"
    return [said, ""] if found else []


def _absent(bench: RuntimeBench) -> list[str]:
    return [*(f"- not measured: {absent}" for absent in bench.absent), *([""] if bench.absent else [])]


def _head(job: str) -> str:
    return {LOAD: "load s", PEAK: "peak MB"}.get(job, job)


def _figure(row: Row, job: str) -> str:
    figures = row.figures.get(job)
    if not figures:
        return _NONE
    median = Spread.of(figures).median
    return f"{median:.2f}" if job == LOAD else f"{median:.1f}" if job != PEAK and median < 100 else f"{median:.0f}"


def _spread(found: Spread | None) -> str:
    return _NONE if found is None else f"{found.median:.2f} ({found.least:.2f}-{found.most:.2f})"
