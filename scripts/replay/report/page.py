"""The page: tables first, then figures; everything it needs is in the one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import vl_convert
from markupsafe import Markup

from scripts.provenance import machine, versions
from scripts.replay.findings import Paired, agreement, by_name, replays_compared
from scripts.replay.report import charts
from scripts.replay.report.charts import Spec
from scripts.replay.results import Result
from scripts.replay.tables import errors_of, run_name, tables_of, trace_name

TEMPLATE = Path(__file__).with_name("page.html")
PNG_SCALE = 2.0
MOST_TIMELINES = 12
"""On one page; of more, those of the first policy."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Chart:
    """A figure; with several specs, one of them is chosen on the page."""

    name: str
    title: str
    text: str
    specs: tuple[Spec, ...]
    choices: tuple[str, ...] = ()


def write_report(
    results: Sequence[Result],
    folder: Path,
    *,
    command: str,
    against: Sequence[Result] = (),
    pictures: bool = True,
    say: Say = lambda _: None,
) -> list[Path]:
    """report.html, report.json and, for each figure, a PNG. against: another replay to compare with.

    Returns what was written. Raises OSError.
    """
    good = [result for result in results if not result.error]
    compared = replays_compared(against, good) if against else ()
    drawn = _charts(good, compared)
    html, record = folder / "report.html", folder / "report.json"
    say("the page …")
    html.write_text(_page(results, good, compared, drawn, command), encoding="utf-8")
    record.write_bytes(msgspec.json.format(msgspec.json.encode(_record(good, compared, command))))
    written = [html, record]
    for chart in drawn if pictures else ():
        say(f"{chart.name}.png …")
        path = folder / f"{chart.name}.png"
        path.write_bytes(
            vl_convert.vegalite_to_png(json.dumps(chart.specs[0] | {"background": "white"}), scale=PNG_SCALE)
        )
        written.append(path)
    return written


def _charts(results: Sequence[Result], compared: Sequence[Paired]) -> list[Chart]:
    if not any(result.questions for result in results):
        return []
    shown = [result for result in results if result.agents]
    if len(shown) > MOST_TIMELINES:
        shown = [result for result in shown if result.policy == results[0].policy][:MOST_TIMELINES]
    found = []
    if compared:
        text = "Mean E2E of the second replay over that of the first, on questions that both answered; 95 % intervals."
        found.append(Chart("differences", "Two replays", text, (charts.differences(compared),)))
    text = "Share of the questions answered within so many seconds of acceptance. Further left is better."
    found.append(Chart("e2e", "E2E by policy", text, (charts.e2e(results),)))
    if shown:
        text = (
            "Links as they were (solid) and as agents had measured them (dashed); questions, with what travelled for "
            "them and at which rungs; memory pressure; how the caches of all agents are kept."
        )
        specs = tuple(charts.timeline(result) for result in shown)
        found.append(Chart("timeline", "A run over time", text, specs, tuple(map(run_name, shown))))
    found += [
        Chart(
            "sent",
            "Bytes by medium",
            "What travelled in all questions, repeats and envelopes counted.",
            (charts.sent(results),),
        ),
        Chart("misses", "Deadlines missed", "Of the questions that had one.", (charts.misses(results),)),
        Chart(
            "predictions",
            "Prediction and outcome",
            "On the dashed line a question took as long as was predicted.",
            (charts.predictions(results),),
        ),
        Chart(
            "rungs",
            "Quality",
            "At which rungs links went; each has its measured loss, tokens have none.",
            (charts.rungs(results),),
        ),
    ]
    return found


def _page(
    results: Sequence[Result], good: Sequence[Result], compared: Sequence[Paired], drawn: Sequence[Chart], command: str
) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    specs = json.dumps({chart.name: chart.specs for chart in drawn}, separators=(",", ":")).replace("</", "<\\/")
    where = machine()
    known = versions(("kvbus", "numpy"))
    return template.render(
        title=f"kvbus replay: {', '.join(dict.fromkeys(result.site for result in results))}",
        summary=_summary(good),
        command=command,
        provenance=f"kvbus {known['kvbus']}, Python {where['python']}, {where['system']}",
        vega=_script(_javascript()),
        tables=tables_of(good, compared),
        details=("Policies",),
        errors=errors_of(results),
        charts=drawn,
        specs=Markup(specs),  # noqa: S704  JSON without an end tag in it
    )


def _javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed, as window.vegaEmbed."""
    bundle: Any = vl_convert.javascript_bundle  # its stub demands what may be left out
    found: str = bundle()
    return found


def _script(source: str) -> Markup:
    """A script that can't end its element."""
    return Markup(source.replace("</script", "<\\/script"))  # noqa: S704  a library's own


def _summary(results: Sequence[Result]) -> str:
    questions = sum(len(result.questions) for result in results)
    hours = sum(result.duration_s for result in results) / 3600
    modes = ", ".join(dict.fromkeys(result.mode for result in results))
    policies = ", ".join(dict.fromkeys(result.policy for result in results))
    return f"{len(results)} runs ({modes}), {questions:,} questions, {hours:.1f} h of traces; policies {policies}."


def _record(results: Sequence[Result], compared: Sequence[Paired], command: str) -> dict[str, Any]:
    return {
        "command": command,
        "machine": machine(),
        "versions": versions(("kvbus", "numpy", "vl-convert-python")),
        "by_trace": by_name(results, trace_name),
        "by_device": by_name(results, lambda result: result.device or "site"),
        "all": by_name(results, lambda _: "all"),
        "agreement": agreement(results),
        "compared": compared,
    }
