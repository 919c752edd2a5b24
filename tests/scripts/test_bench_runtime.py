"""The runtime bench: ratios are paired, tables say what was measured, workers work, absent peers are named."""

from __future__ import annotations

import io
import statistics
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from edge_agent.model.manifest import read_manifest
from scripts.bench.runtime.child import Child, WorkerEnded, WorkerFailed
from scripts.bench.runtime.engines import OptimumExport
from scripts.bench.runtime.measured import (
    LLAMA,
    LOAD,
    MASS,
    OPTIMUM,
    PEAK,
    Absent,
    Row,
    RuntimeBench,
    mass_cost,
    ratio,
)
from scripts.bench.runtime.plot import plot
from scripts.bench.runtime.report import sections
from scripts.bench.runtime.run import DECODE, PAST, PREFILL, STEPS, Variant, jobs, measure, room, steps
from scripts.bench.runtime.shown import Steps
from scripts.bench.runtime.worker import Worker, peak_bytes
from tests import tiny

FIGURES = st.lists(st.floats(0.1, 1e4), min_size=1, max_size=9)


def _row(name: str, **figures: tuple[float, ...]) -> Row:
    named = {"prefill": PREFILL, "decode": DECODE, "load": LOAD, "peak": PEAK, "mass": MASS}
    return Row(name=name, version="onnxruntime 1", file_mb=146.3, figures={named[k]: v for k, v in figures.items()})


def _bench(*rows: Row, absent: tuple[Absent, ...] = ()) -> RuntimeBench:
    return RuntimeBench(model="Tiny", threads=2, jobs=(LOAD, PREFILL, DECODE, PEAK), rows=rows, absent=absent)


def _ours(bundle: Path, name: str = "int8") -> Variant:
    return Variant(name=name, engine="ours", path=bundle, weights=bundle / "model.onnx", python=sys.executable)


def _load(child: Child, bundle: Path, tokens: int = 700) -> dict[str, object]:
    ids = [1 + at % 99 for at in range(tokens)]
    return child.answer("load", engine="ours", path=str(bundle), threads=1, room=tokens, ids=ids)


# Ratios


def test_a_machine_that_slows_for_all_changes_no_ratio() -> None:
    found = ratio(_row("int8", prefill=(200.0, 100.0, 50.0)), _row(LLAMA, prefill=(100.0, 50.0, 25.0)), PREFILL)
    assert found is not None
    assert (found.median, found.least, found.most) == (2, 2, 2)


def test_ratios_are_taken_in_each_round_before_the_median() -> None:
    found = ratio(_row("int8", prefill=(10.0, 40.0, 90.0)), _row(LLAMA, prefill=(10.0, 80.0, 30.0)), PREFILL)
    assert found is not None
    assert (found.median, found.least, found.most) == (1, 0.5, 3)  # medians first would have said 40 / 30


@given(own=FIGURES, data=st.data())
def test_a_ratio_lies_within_its_spread_and_is_the_inverse_of_the_other_way_round(
    own: list[float], data: st.DataObject
) -> None:
    other = data.draw(st.lists(st.floats(0.1, 1e4), min_size=len(own), max_size=len(own)))
    rows = _row("int8", decode=tuple(own)), _row(LLAMA, decode=tuple(other))
    found, inverse = ratio(*rows, DECODE), ratio(rows[1], rows[0], DECODE)
    assert found is not None
    assert inverse is not None
    assert found.least <= found.median <= found.most
    assert found.median == statistics.median(one / two for one, two in zip(own, other, strict=True))
    assert inverse.most == pytest.approx(1 / found.least)


def test_there_is_no_ratio_where_one_side_was_not_measured() -> None:
    assert ratio(_row("int8", prefill=(1.0,)), _row(LLAMA, decode=(1.0,)), PREFILL) is None


def test_what_attention_mass_costs_is_taken_in_each_round() -> None:
    row = _row("int8", prefill=(100.0, 50.0, 80.0), mass=(80.0, 50.0, 40.0))
    found = mass_cost(row, PREFILL)
    assert found is not None
    assert (found.median, found.least, found.most) == (1.25, 1, 2)
    assert mass_cost(_row("int8", prefill=(100.0,)), PREFILL) is None
    said = [line for line in sections([_bench(row, _row(LLAMA, prefill=(1.0,) * 3))]) if "attention mass" in line]
    assert len(said) == 1
    assert said[0].endswith("÷ time without: int8 1.25 (1.00-2.00)")


# Jobs


def test_decoding_follows_the_prefill_whose_cache_it_goes_on_from() -> None:
    assert [job.name for job in jobs(8192)] == ["prefill 128", MASS, PREFILL, DECODE, "prefill 2048"]
    assert room(8192) == 2048 + STEPS


def test_what_does_not_fit_the_window_is_not_asked_for() -> None:
    assert [job.name for job in jobs(1024)] == ["prefill 128", MASS, PREFILL, DECODE]
    assert [job.name for job in jobs(PAST)] == ["prefill 128", MASS, PREFILL]
    assert room(1024) == 1024


# Tables and picture


def test_the_tables_hold_medians_paired_ratios_and_what_is_absent() -> None:
    bench = _bench(
        _row("int8", load=(0.25,), prefill=(300.0, 500.0, 400.0), decode=(80.0, 90.0, 85.04), peak=(317.6,)),
        _row(LLAMA, load=(0.5,), prefill=(300.0, 250.0, 100.0), decode=(80.0, 90.0, 85.0), peak=(200.0,)),
        absent=(Absent(name=OPTIMUM, reason="no export\nof it"),),
    )
    lines = sections([bench])
    assert "| variant | file MB | load s | prefill 512 | decode after 512 | peak MB |" in lines
    assert "| int8 | 146 | 0.25 | 400 | 85.0 | 318 |" in lines
    assert (
        "| int8 ÷ llama.cpp Q8_0 | 2.00 (1.00-4.00) | 1.00 (1.00-1.00) | 0.50 (0.50-0.50) | 1.59 (1.59-1.59) |" in lines
    )
    assert "- not measured: optimum export: no export of it" in lines


def test_a_figure_that_is_missing_is_a_dash() -> None:
    lines = sections([_bench(_row("int8", prefill=(300.0,)), _row(OPTIMUM, prefill=(100.0,), decode=(27.0,)))])
    assert "| int8 | 146 | – | 300 | – | – |" in lines
    assert "| int8 ÷ optimum export | 3.00 (3.00-3.00) | – | – | – |" in lines


def test_without_a_reference_there_is_no_table_of_ratios() -> None:
    assert not any("÷" in line for line in sections([_bench(_row("int8", prefill=(300.0,)))]))


def test_the_picture_stands_models_one_below_the_other(tmp_path: Path) -> None:
    one = _bench(_row("int8", prefill=(3.0, 4.0), decode=(1.0, 1.0)), _row(LLAMA, prefill=(2.0, 2.0)))
    assert plot([one, _bench(_row("fp32", prefill=(1.0,)))], tmp_path / "runtime.png")
    assert (tmp_path / "runtime.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_draws_no_picture(tmp_path: Path) -> None:
    assert not plot([_bench()], tmp_path / "runtime.png")
    assert not list(tmp_path.iterdir())


# Workers


def test_a_worker_loads_prefills_decodes_and_tells_its_memory(tiny_bundle: Path) -> None:
    with Child(sys.executable) as child:
        loaded = _load(child, tiny_bundle)
        assert str(loaded["version"]).startswith("onnxruntime ")
        assert child.ask("prefill", tokens=512) > 0
        assert child.ask("decode", past=512, tokens=4) > 0
        assert child.ask("mass", tokens=512) > 0
        assert child.ask("decode", past=100, tokens=4) > 0
        assert 10e6 < child.ask("memory") < 10e9


def test_a_worker_goes_on_after_a_command_that_failed(tiny_bundle: Path) -> None:
    with Child(sys.executable) as child:
        _load(child, tiny_bundle, tokens=tiny.WINDOW_TOKENS + 8)
        with pytest.raises(WorkerFailed, match="do not fit the model's window") as caught:
            child.ask("prefill", tokens=tiny.WINDOW_TOKENS + 1)
        assert "\n" not in str(caught.value)
        assert child.ask("prefill", tokens=16) > 0


def test_a_worker_that_is_asked_before_it_is_loaded_says_so() -> None:
    with Child(sys.executable) as child, pytest.raises(WorkerFailed, match="nothing is loaded"):
        child.ask("prefill", tokens=1)


def test_a_runtime_that_does_not_give_its_attention_says_so() -> None:
    worker = Worker()
    worker._engine = object.__new__(OptimumExport)
    with pytest.raises(TypeError, match="does not give its attention"):
        worker.mass(tokens=512)


def test_an_interpreter_that_ends_at_once_is_one_line(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho first >&2\necho the reason >&2\nexit 3\n", encoding="utf-8")
    program.chmod(0o755)
    with (
        Child(str(program)) as child,
        pytest.raises(WorkerEnded, match=r"^the worker ended with status 3: the reason$"),
    ):
        child.ask("memory")


def test_a_worker_that_hangs_is_ended(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    program.chmod(0o755)
    with Child(str(program), answer_s=0.1) as child, pytest.raises(WorkerEnded, match="no answer to memory"):
        child.ask("memory")


def test_a_worker_that_gives_up_its_output_and_goes_on_is_ended(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60 > /dev/null\n", encoding="utf-8")
    program.chmod(0o755)
    with Child(str(program)) as child, pytest.raises(WorkerEnded, match="SIGKILL"):
        child.ask("memory")


def test_peak_memory_only_grows() -> None:
    before = peak_bytes()
    held = bytearray(64 << 20)
    held[:: 1 << 12] = b"\x01" * len(held[:: 1 << 12])
    assert peak_bytes() >= before


# A whole run


def test_variants_are_measured_in_turn_and_the_absent_named_in_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "model.gguf"
    variants = [
        _ours(tiny_bundle),
        _ours(tiny_bundle, OPTIMUM),
        _ours(tmp_path, "int4"),
        Variant(name=LLAMA, engine="llama.cpp", path=nowhere, weights=nowhere, python=sys.executable),
        Variant(name="genai", engine="genai", path=nowhere, weights=nowhere, python=str(tmp_path / "python")),
    ]
    window = read_manifest(tiny_bundle).window_tokens
    heard: list[str] = []
    found = measure(
        variants,
        [1 + at % 99 for at in range(room(window))],
        model="tiny",
        window_tokens=window,
        threads=1,
        repeats=2,
        hear=heard.append,
    )
    assert [row.name for row in found.rows] == ["int8", OPTIMUM]
    assert found.jobs == (LOAD, "prefill 128", PREFILL, DECODE, PEAK)
    assert all(len(row.figures[job]) == 2 for row in found.rows for job in (*found.jobs, MASS))
    assert found.rows[0].file_mb > 0
    assert [absent.name for absent in found.absent] == ["int4", LLAMA, "genai"]
    assert all(str(absent) and "\n" not in str(absent) and "Traceback" not in str(absent) for absent in found.absent)
    assert len(heard) <= steps(variants, window, 2)
    prefills = [line for line in heard if line.endswith("prefill 128")]
    assert prefills == ["int8: prefill 128", f"{OPTIMUM}: prefill 128"] * 3  # one round is not counted
    lines = sections([found])
    assert sum(line.startswith("- not measured: ") for line in lines) == 3


def test_progress_is_lines_where_there_is_no_terminal() -> None:
    told = io.StringIO()
    with Steps(Console(file=told, width=100)) as shown:
        shown.title("int8: prepare")
        shown.expect(30)
        for step in range(30):
            shown.next(f"job {step}")
    lines = told.getvalue().splitlines()
    assert lines[0] == "  int8: prepare"
    assert 10 <= len(lines) - 1 <= 11
