"""`python -m scripts.replay` as its users type it, and what they are told when they mistype it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from scripts.replay.__main__ import app
from scripts.replay.results import read_results
from scripts.traces import write_trace
from tests.scripts.test_replay_virtual import TRACE

SITE = """
duration_s = 60
[requests]
count = 3
[[agents]]
name = "a"
contexts = [200]
[[agents]]
name = "b"
contexts = [200]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a site and a trace; the commands are given there."""
    (tmp_path / "site.toml").write_text(SITE)
    write_trace(tmp_path / "walk.csv", TRACE)
    (tmp_path / "packets").write_text("\n".join(str(at) for at in range(0, 20_000, 3)) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: str) -> Result:
    return CliRunner().invoke(app, words)


def failed(*words: str) -> str:
    """The one line that says why."""
    done = call(*words)
    assert done.exit_code == 1, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("replay: ")]
    assert len(lines) == 1
    return lines[0]


def test_run_report_and_compare(folder: Path) -> None:
    words = ("run", "site.toml", "--trace", "walk.csv", "--trace", "packets", "--policy", "optimum", "--policy", "kv")
    done = call(*words, "--jobs", "1", "--output", "one", "--record", "sessions", "--json", "all.json")
    assert done.exit_code == 0, done.output
    assert "| walk | " in done.stdout
    results = read_results(folder / "one" / "results.jsonl")
    assert [(each.trace, each.policy) for each in results] == [
        ("walk", "optimum"),
        ("walk", "kv"),
        ("packets", "optimum"),
        ("packets", "kv"),
    ]
    assert (folder / "all.json").stat().st_size > 1_000
    sessions = sorted(path.name for path in (folder / "sessions").iterdir())
    assert sessions == sorted(
        f"site-{trace}-{policy}-0.mcap" for trace in ("walk", "packets") for policy in ("optimum", "kv")
    )
    again = call("plans", "sessions/site-walk-optimum-0.mcap")
    assert again.exit_code == 0, again.output
    assert "3 of 3 plans are the same" in again.stdout
    assert call(*words, "--jobs", "1", "--output", "two", "--device", "pi-4").exit_code == 0
    done = call("report", "one/results.jsonl", "--against", "one/results.jsonl", "--output", "page", "--no-pictures")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (folder / "page").iterdir()) == ["report.html", "report.json"]


def test_a_recorded_session_makes_a_report_too_up_to_where_it_was_cut(folder: Path) -> None:
    words = ("run", "site.toml", "--trace", "walk.csv", "--policy", "kv", "--jobs", "1", "--record", "sessions")
    assert call(*words, "--output", "one").exit_code == 0
    (session,) = (folder / "sessions").iterdir()
    whole = session.read_bytes()
    (folder / "cut.mcap").write_bytes(whole[: len(whole) // 3])
    done = call("report", str(session), "cut.mcap", "--output", "page", "--no-pictures")
    assert done.exit_code == 0, done.output
    assert "cut.mcap: " in done.stderr
    assert "shown up to there" in done.stderr
    assert "recorded" in (folder / "page" / "report.html").read_text(encoding="utf-8")


def test_a_trace_can_be_taken_from_a_session(folder: Path) -> None:
    words = ("run", "site.toml", "--trace", "walk.csv", "--policy", "token", "--jobs", "1", "--record", "sessions")
    assert call(*words, "--output", "one").exit_code == 0
    session = "sessions/site-walk-token-0.mcap"
    done = call("run", "site.toml", "--trace", f"{session}:a", "--policy", "token", "--jobs", "1", "--output", "two")
    assert done.exit_code == 0, done.output
    assert read_results(folder / "two" / "results.jsonl")[0].trace == "site-walk-token-0-a"
    assert "say whose link" in failed("run", "site.toml", "--trace", session)
    assert "tells nothing of nobody" in failed("run", "site.toml", "--trace", f"{session}:nobody")


def test_a_policy_that_raises_is_told_and_the_others_are_kept(folder: Path) -> None:
    raising = "tests.scripts.test_replay_virtual:Raising"
    done = call("run", "site.toml", "--trace", "walk.csv", "--policy", "kv", "--policy", raising, "--jobs", "1")
    assert done.exit_code == 1
    assert "walk, raising, seed 0, virtual: ZeroDivisionError: of its own" in done.stdout
    assert [bool(each.error) for each in read_results(folder / "build/replay/results.jsonl")] == [False, True]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "none.toml"), "none.toml can't be read: No such file or directory"),
        (("run", "walk.csv"), "walk.csv: "),
        (("run", "site.toml", "--trace", "none.csv"), "none.csv: can't be read"),
        (("run", "site.toml", "--trace", "site.toml"), "line 1"),
        (("run", "site.toml", "--trace", "walk.csv", "--policy", "best"), "no policy is called best"),
        (("run", "site.toml", "--trace", "walk.csv", "--output", "walk.csv"), "walk.csv can't be written"),
        (("run", "site.toml", "--trace", "walk.csv", "--json", "no/x.json"), "there is no directory"),
        (("report", "none.jsonl"), "none.jsonl can't be read"),
        (("report", "walk.csv"), "walk.csv, line 1"),
        (("plans", "walk.csv"), "walk.csv"),
        (("live", "none.toml"), "none.toml can't be read"),
    ],
)
def test_what_is_mistyped_is_one_line(folder: Path, words: tuple[str, ...], said: str) -> None:
    assert said in failed(*words)


def test_a_device_that_is_none_is_told_before_anything_runs(folder: Path) -> None:
    assert "no device cray" in failed("run", "site.toml", "--trace", "walk.csv", "--device", "cray", "--jobs", "1")
