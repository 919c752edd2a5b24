"""`python -m scripts.evaluate` as a person meets it: some questions on the real model, one line for every mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.shared_data import shared_data

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "scripts" / "evaluate" / "questions" / "site.jsonl"
METHODS = "text,none,fp16,q6,qkvcomm-6,qkvcomm-6+facts"


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "scripts.evaluate", *map(str, arguments)]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False, timeout=110)


def refused(*arguments: str | Path) -> str:
    """The one line with which the command refuses."""
    found = run(*arguments)
    assert found.returncode == 1
    assert found.stdout == ""
    line = found.stderr.strip()
    assert line.startswith("evaluate: ")
    assert "\n" not in line
    return line


@pytest.mark.bundle
@pytest.mark.usefixtures("bundle")
def test_a_few_questions_give_tables_figures_and_curves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run("--items", "3", "--methods", METHODS, "--output", out, "--json", tmp_path / "all.json")
    assert first.returncode == 0, first.stderr
    for words in ("**Quality**", "**Costs**", "**What facts add**", "qkvcomm-6+facts", "site"):
        assert words in first.stdout
    assert (out / "evaluate.md").read_text(encoding="utf-8").strip() == first.stdout.strip()
    report = json.loads((out / "evaluate.json").read_bytes())
    assert json.loads((tmp_path / "all.json").read_bytes()) == report
    rows = {row["method"]: row for row in report["rows"]}
    assert set(rows) == set(METHODS.split(","))
    assert {row["items"] for row in rows.values()} == {3}
    assert rows["text"]["kl"]["mean"] < 1e-5
    assert rows["fp16"]["kl"]["mean"] < 0.05 < rows["none"]["kl"]["mean"]
    assert 15.9 < rows["fp16"]["bits_per_element"] < 16.2
    assert 4.1 < rows["qkvcomm-6"]["bits_per_element"] < 4.4 < rows["q6"]["bits_per_element"]
    assert rows["text"]["bits_per_element"] is None
    assert (out / "rate-quality.png").stat().st_size > 10_000
    results = (out / "results.jsonl").read_bytes()
    again = run("--items", "3", "--methods", METHODS, "--output", out)
    assert "3 of 3 questions were done before" in again.stderr
    assert (out / "results.jsonl").read_bytes() == results
    assert "another run" in refused("--items", "3", "--facts-tokens", "8", "--output", out)


@pytest.mark.slow
@pytest.mark.bundle
@pytest.mark.usefixtures("bundle")
def test_public_question_sets_are_asked_in_their_own_words(tmp_path: Path) -> None:
    data = shared_data()
    files = [data / f"{name}.jsonl" for name in ("squad", "hotpotqa", "narrativeqa")]
    found = run(*files, "--items", "1", "--methods", "fp16,qkvcomm-8", "--output", tmp_path)
    assert found.returncode == 0, found.stderr
    rows = json.loads((tmp_path / "evaluate.json").read_bytes())["rows"]
    assert {(row["dataset"], row["items"]) for row in rows} == {("squad", 1), ("hotpotqa", 1), ("narrativeqa", 1)}
    assert "**Q-KVComm's Table I** and ours" in found.stdout


@pytest.mark.bundle
@pytest.mark.usefixtures("bundle")
def test_a_bad_line_is_named_counted_and_skipped(tmp_path: Path) -> None:
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()[:2]
    data = tmp_path / "mixed.jsonl"
    data.write_text("\n".join([lines[0], "{broken", lines[1]]) + "\n", encoding="utf-8")
    found = run(data, "--methods", "none", "--output", tmp_path / "out")
    assert found.returncode == 0, found.stderr
    assert "mixed.jsonl, line 2" in found.stderr
    assert "**Skipped**: 1" in found.stdout
    report = json.loads((tmp_path / "out" / "evaluate.json").read_bytes())
    assert [each["place"] for each in report["skipped"]] == ["line 2"]
    assert [row["items"] for row in report["rows"]] == [2]


@pytest.mark.bundle
@pytest.mark.usefixtures("bundle")
def test_ctrl_c_is_one_line_and_what_is_done_is_kept(tmp_path: Path) -> None:
    arguments = command("--items", "0", "--methods", "text,none,q4", "--output", tmp_path)
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        results = tmp_path / "results.jsonl"
        until = time.monotonic() + 100
        while not (results.exists() and results.stat().st_size):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("evaluate: interrupted; what is done is kept")
    assert "Traceback" not in err
    kept = [json.loads(line) for line in results.read_text().splitlines()]
    assert kept
    assert len({(each["item"], each["method"]) for each in kept}) == len(kept)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing.jsonl",), "missing.jsonl"),
        (("--methods", "q9"), "q9"),
        (("--methods", " , "), "names none"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    assert words in refused(*arguments, "--output", tmp_path)


def test_two_files_of_one_name_are_one_line(tmp_path: Path) -> None:
    other = tmp_path / SHIPPED.name
    other.write_bytes(SHIPPED.read_bytes())
    assert "two files are called site" in refused(SHIPPED, other, "--output", tmp_path / "out")


@pytest.mark.bundle
@pytest.mark.usefixtures("bundle")
def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "can't be written" in refused("--methods", "none", "--output", tmp_path / "file" / "out")


def test_help_says_what_is_asked_and_what_is_written() -> None:
    shown = subprocess.run(
        command("--help"), cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"}
    ).stdout
    for words in ("--methods", "--items", "--receiver", "--jobs", "evaluate.md", "goes on"):
        assert words in shown
