"""The runtime bench: ratios are paired, workers work, and what is not there is named in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edge_agent.model.manifest import read_manifest
from scripts.bench.runtime.child import Child, WorkerFailed
from scripts.bench.runtime.measured import LLAMA, LOAD, OPTIMUM, PEAK, Absent, Row, RuntimeBench, ratio
from scripts.bench.runtime.report import sections
from scripts.bench.runtime.run import Variant, jobs, measure, room
from tests import tiny

OURS = Row(name="int8", version="1", file_mb=10, figures={"prefill 128": (100.0, 50.0, 30.0), PEAK: (80.0, 80.0, 80.0)})
THEIRS = Row(
    name=LLAMA, version="2", file_mb=20, figures={"prefill 128": (50.0, 25.0, 10.0), PEAK: (160.0, 80.0, 40.0)}
)


def test_ratios_are_taken_within_a_round_before_the_median() -> None:
    found = ratio(OURS, THEIRS, "prefill 128")
    assert found is not None
    assert (found.median, found.least, found.most) == (2.0, 2.0, 3.0)
    assert ratio(OURS, THEIRS, LOAD) is None


def test_the_report_has_a_row_for_each_variant_and_a_line_for_each_absent_one() -> None:
    absent = Absent(name=OPTIMUM, reason="not\nthere")
    bench = RuntimeBench(model="tiny", threads=1, jobs=("prefill 128", PEAK), rows=(OURS, THEIRS), absent=(absent,))
    text = "\n".join(sections([bench]))
    assert "| int8 ÷ llama.cpp Q8_0 | 2.00 (2.00-3.00) |" in text
    assert f"{OPTIMUM}: not there" in text
    assert text.count("\n| int8 |") == 1


def test_prefills_that_do_not_fit_the_window_are_left_out() -> None:
    names = [job.name for job in jobs(tiny.WINDOW_TOKENS)]
    assert names == ["prefill 128", "prefill 512", "decode after 512"]
    assert room(tiny.WINDOW_TOKENS) == tiny.WINDOW_TOKENS
    assert [job.name for job in jobs(200)] == ["prefill 128"]


def _variant(bundle: Path, *, python: str = sys.executable, name: str = "fp32") -> Variant:
    path = bundle / read_manifest(bundle).model_file
    return Variant(name=name, engine="ours", path=bundle, weights=path, python=python)


def test_a_worker_of_ours_is_measured_and_a_missing_interpreter_is_named(tiny_bundle: Path) -> None:
    variants = [_variant(tiny_bundle), _variant(tiny_bundle, python="no-such-python", name="other")]
    ids = [1 + index % 400 for index in range(room(tiny.WINDOW_TOKENS))]
    heard: list[str] = []
    found = measure(
        variants, ids, model="tiny", window_tokens=tiny.WINDOW_TOKENS, threads=1, repeats=2, hear=heard.append
    )
    row = found.row("fp32")
    assert row is not None
    assert {job: len(figures) for job, figures in row.figures.items()} == {
        "prefill 128": 2,
        "prefill 512": 2,
        "decode after 512": 2,
        LOAD: 2,
        PEAK: 2,
    }
    assert all(figure > 0 for figures in row.figures.values() for figure in figures)
    assert [str(absent) for absent in found.absent] == [
        "other: no-such-python can't be started: No such file or directory"
    ]
    assert heard


def test_what_a_worker_cannot_do_is_one_line() -> None:
    with Child(sys.executable) as child:
        with pytest.raises(WorkerFailed) as caught:
            child.ask("load", engine="ours", path="/nowhere", threads=1, room=8, ids=[1])
        assert "\n" not in str(caught.value)
        with pytest.raises(WorkerFailed, match="nothing is loaded"):
            child.ask("prefill", tokens=4)
