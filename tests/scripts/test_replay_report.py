"""The report: one file that needs no network, whose figures a browser draws in both themes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import structlog
import vl_convert

from scripts.replay.report import charts, write_report
from scripts.replay.results import Result
from tests.scripts.replays import agent, place, replayed
from tests.scripts.test_replay_findings import question, result
from tests.scripts.test_replay_virtual import TRACE

PNG = b"\x89PNG\r\n\x1a\n"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def results() -> tuple[Result, ...]:
    """Two runs, and one that failed."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    where = place(*(agent(f"agent-{number}", mbps=None) for number in (1, 2, 3)))
    runs = [replayed(where, policy, trace=TRACE, trace_name="walk") for policy in ("optimum", "kv")]
    return (*runs, result("token", trace="walk", error="ValueError: <script>alert(1)</script>"))


@pytest.fixture(scope="module")
def report(results: tuple[Result, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    against = [result("kv", 1.0, site="test", trace="walk")]
    written = write_report(results, folder, command="the command", against=against)
    assert {path.name for path in written} == {path.name for path in folder.iterdir()}
    return folder


class _Page(HTMLParser):
    """What a page asks for from elsewhere, and its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asked += [value or "" for name, value in attributes if name in {"src", "href", "srcset", "data"}]


def test_the_page_needs_nothing_from_elsewhere(report: Path) -> None:
    page = _Page()
    text = (report / "report.html").read_text(encoding="utf-8")
    page.feed(text)
    assert page.asked == []
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert "@import" not in text
    assert len(text) < 3_000_000


def test_what_comes_from_a_run_can_t_become_code(report: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_tables_come_first_and_hold_the_figures(report: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r"<h2>(.*?)</h2>", text.partition("<body>")[2])
    assert titles[:2] == ["Two replays, paired", "By trace"]
    assert titles[-1] == "Policies"
    for chart in ("E2E by policy", "A run over time", "Bytes by medium", "Deadlines missed", "Prediction and outcome"):
        assert chart in titles
    record = json.loads((report / "report.json").read_bytes())
    (walk,) = record["by_trace"]
    assert f"{walk['figures'][0]['mean_s']:.2f} / {walk['figures'][0]['p95_s']:.2f}" in text
    assert record["compared"][0]["name"] == "all"


def test_every_figure_is_a_picture_too(report: Path) -> None:
    pictures = sorted(report.glob("*.png"))
    assert {path.stem for path in pictures} == {
        *("differences", "e2e", "timeline", "sent", "misses", "predictions", "rungs"),
    }
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 3_000 for path in pictures)


@pytest.mark.parametrize(
    "rows",
    [
        [result("kv", 1.0)],
        [result("kv", None, None)],
        [result("a policy of mine", 1.0), result("other", 2.0)],
        [result("kv", questions=(question(0, None, links=(), state="refused", predicted_s=None),))],
    ],
)
def test_odd_results_make_figures_as_well(rows: list[Result]) -> None:
    for chart in (charts.e2e, charts.sent, charts.misses, charts.predictions, charts.rungs):
        assert vl_convert.vegalite_to_vega(json.dumps(chart(rows)))
    assert vl_convert.vegalite_to_vega(json.dumps(charts.timeline(rows[0])))


def test_without_a_good_run_the_page_says_why(tmp_path: Path) -> None:
    write_report([result("kv", error="it broke")], tmp_path, command="x")
    assert "it broke" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_draws_every_figure(report: Path, theme: str) -> None:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no chromium here to open the page with (Debian's package chromium has one)")
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"),
            *("--enable-logging=stderr", "--v=0", "--dump-dom", f"file://{report / 'report.html'}?theme={theme}"),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert f'data-theme="{theme}" data-drawn="{theme}"' in done.stdout
    assert done.stdout.count('class="chart vega-embed"') == 7
    assert done.stdout.count('class="marks"') == 7
    assert "CONSOLE" not in done.stderr
