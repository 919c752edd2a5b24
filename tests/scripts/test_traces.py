"""Traces made, brought in from elsewhere, and shown; what can't be used is refused by file and line."""

from __future__ import annotations

import itertools
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from broker_config import topics
from broker_config.messages import LinkQuality
from coordinator.recording import Event, Recording, Session
from scripts.traces import Sample, Trace, TraceInvalid, read_trace, write_trace
from scripts.traces import table as trace_file
from scripts.traces.__main__ import app
from scripts.traces.generate import BAD_SHARE, KINDS, Made, made
from scripts.traces.mahimahi import PACKET_BITS, read_mahimahi
from scripts.traces.session import read_session
from scripts.traces.trace import shifted
from tests.coordinator.builders import telemetry
from tests.shared_data import shared_data

RUN = CliRunner()
HOUR = Made(kind="walk", duration_s=3_600, median_bps=4e6, rtt_s=0.05, seed=7)


def rates(trace: Trace) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([sample.bandwidth_bps for sample in trace.samples])


def kind(name: str, seed: int = 7, **changes: float) -> Trace:
    return made(Made(**{"duration_s": 3_600, "median_bps": 4e6, "rtt_s": 0.05, **changes}, kind=name, seed=seed))


@pytest.mark.parametrize("name", KINDS)
def test_the_same_seed_makes_the_same_trace_and_another_another(name: str) -> None:
    assert kind(name) == kind(name)
    assert kind(name) != kind(name, seed=8)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("step_s", [0.1, 1.0])
def test_every_kind_has_its_length_its_median_and_rates_that_links_have(name: str, step_s: float) -> None:
    trace = kind(name, step_s=step_s)
    found = rates(trace)
    assert trace.duration_s == pytest.approx(3_600)
    assert trace.step_s == step_s
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert np.median(found[found > 0]) == pytest.approx(4e6, rel=0.1)
    rtts = np.array([sample.rtt_s for sample in trace.samples])
    assert rtts.min() == 0.05
    assert np.all(rtts[found >= 4e6] == 0.05)


def test_a_walk_wanders_slowly_and_widely() -> None:
    decades = np.log10(rates(kind("walk")))
    assert 0.2 < decades.std() < 0.4
    assert np.abs(np.diff(decades)).mean() < decades.std() / 2


def test_bursts_have_two_rates_and_their_shares_of_the_time() -> None:
    found = rates(kind("bursts", duration_s=36_000))
    assert np.mean(found == 4e6) == pytest.approx(12 / 16, abs=0.1)
    assert np.mean(np.isclose(found, 4e6 * BAD_SHARE)) == pytest.approx(4 / 16, abs=0.12)


def test_outages_cut_the_link_off_for_their_share_of_the_time() -> None:
    found = rates(kind("outages", duration_s=36_000))
    assert np.mean(found == 0) == pytest.approx(6 / 66, abs=0.03)
    out = np.flatnonzero(found == 0)
    assert any(two == one + 1 for one, two in pairwise(out.tolist()))


def test_driving_past_cells_rises_and_falls_with_their_spacing() -> None:
    found = rates(kind("drive"))
    swings = np.abs(np.fft.rfft(found - found.mean()))
    seconds = 1 / np.fft.rfftfreq(len(found), 1.0)[1:]
    assert seconds[swings[1:].argmax()] == pytest.approx(600 / 14, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kind": "fog"}, "there are walk, bursts, drive, outages"),
        ({"duration_s": 0.0}, "steps"),
        ({"duration_s": 1e12}, "steps"),
        ({"step_s": 0.0}, "steps"),
        ({"median_bps": 0.0}, "median rate"),
        ({"median_bps": 1e14}, "median rate"),
        ({"rtt_s": -1.0}, "round trip"),
    ],
)
def test_terms_that_make_no_trace_are_refused(changes: dict[str, object], why: str) -> None:
    fields = {"kind": "walk", "duration_s": 10.0, **changes}
    with pytest.raises(ValueError, match=why):
        made(Made(**fields))  # type: ignore[arg-type]


numbers = st.floats(0, 1e12).map(lambda value: float(f"{value:.9g}"))


@given(st.lists(numbers, min_size=1, max_size=20), st.sampled_from([0.1, 1.0, 2.5]), st.booleans(), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(tmp_path: Path, found: list[float], step_s: float, rtt: bool, loss: bool) -> None:
    rows = tuple(
        Sample(index * step_s, rate, rtt_s=0.02 if rtt else None, loss=0.25 if loss else None)
        for index, rate in enumerate(found)
    )
    write_trace(tmp_path / "a.csv", Trace(rows, step_s))
    back = read_trace(tmp_path / "a.csv")
    assert [(s.bandwidth_bps, s.rtt_s, s.loss) for s in back.samples] == [
        (s.bandwidth_bps, s.rtt_s, s.loss) for s in rows
    ]
    assert [s.time_s for s in back.samples] == pytest.approx([s.time_s for s in rows])


def test_files_that_are_no_traces_by_their_size_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.csv"
    path.write_text("time_s,bandwidth_bps\n" + "".join(f"{second},1000\n" for second in range(100)))
    monkeypatch.setattr(trace_file, "LARGEST_FILE_BYTES", 500)
    with pytest.raises(TraceInvalid, match="a trace may have 500; cut it into parts"):
        read_trace(path)
    with pytest.raises(TraceInvalid, match="a trace may have 500"):
        read_mahimahi(path)


def packets(times_ms: list[int], path: Path) -> Path:
    path.write_text("".join(f"{time_ms}\n" for time_ms in times_ms))
    return path


@given(st.lists(st.integers(1, 5_000), min_size=1, max_size=200).map(sorted), st.sampled_from([0.1, 0.5, 1.0]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([1], 1.0)
@example([1_000, 2_000, 3_000], 1.0)
def test_every_packet_of_mahimahi_is_in_its_bin(tmp_path: Path, times_ms: list[int], step_s: float) -> None:
    trace = read_mahimahi(packets(times_ms, tmp_path / "a.up"), step_s=step_s)
    whole = len(trace.samples) > 1 or times_ms[-1] >= 1000 * step_s
    for index, sample in enumerate(trace.samples):
        low, high = 1000 * index * step_s, 1000 * (index + 1) * step_s
        inside = sum(low < time_ms <= high + 1e-6 for time_ms in times_ms)
        width_s = step_s if whole else times_ms[-1] / 1000
        assert sample.bandwidth_bps == pytest.approx(inside * PACKET_BITS / width_s)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no packets"),
        ("0\n0\n", "no packets"),
        ("5\n\n3\n", "line 3: 3 ms comes after 5 ms"),
        ("5\n-3\n", "line 2: '-3' is no time"),
        ("5\n1.5\n", "line 2: '1.5' is no time"),
        ("9999999999\n", "line 1: '9999999999' is no time in milliseconds, a week at most"),
        ("1" * 5_000, "line 1: "),
        ("time_s,bandwidth_bps\n0,1\n", "line 1: 'time_s,bandwidth_bps' is no time"),
    ],
)
def test_what_is_no_trace_of_mahimahi_is_refused_by_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "bad.up"
    path.write_text(text)
    with pytest.raises(TraceInvalid, match=why) as refused:
        read_mahimahi(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def session(path: Path, uplinks: list[float | None], rtts_s: list[float | None] | None = None) -> Path:
    """One report of pi-1 a second; the uplink is not measured where there is no rate."""
    made_of = Recording(path, Session(site="home", began_s=1.7e9, clock_s=5.0))
    for second, bps in enumerate(uplinks):
        rtt_s = rtts_s[second] if rtts_s else 0.02
        message = telemetry("pi-1", 1, second, link=LinkQuality(round_trip_s=rtt_s, uplink_bps=bps))
        made_of.add(Event(5.0 + second, "heard", topics.TELEMETRY, {"agent": "pi-1"}, message))
    made_of.close()
    return path


def test_a_recorded_session_is_a_trace_of_what_an_agent_measured(tmp_path: Path) -> None:
    trace, cut = read_session(session(tmp_path / "a.mcap", [None, None, 1e6, 2e6, None, 3e6]), "pi-1", "uplink")
    assert not cut
    assert [sample.bandwidth_bps for sample in trace.samples] == [1e6, 2e6, 2e6]
    fine, _ = read_session(tmp_path / "a.mcap", "pi-1", "uplink", step_s=0.5)
    assert [sample.bandwidth_bps for sample in fine.samples] == [1e6, 1e6, 2e6, 2e6, 2e6, 2e6]


@pytest.mark.parametrize(
    ("rtts_s", "expected"),
    [([None, 0.02, None, 0.03], [0.02, 0.02, 0.02]), ([None] * 4, [None] * 3)],
)
def test_round_trips_that_are_not_known_yet_leave_no_holes(
    tmp_path: Path, rtts_s: list[float | None], expected: list[float | None]
) -> None:
    trace, _ = read_session(session(tmp_path / "a.mcap", [1e6] * 4, rtts_s), "pi-1", "uplink")
    write_trace(tmp_path / "a.csv", trace)
    assert [sample.rtt_s for sample in read_trace(tmp_path / "a.csv").samples] == expected


def test_a_session_that_was_cut_gives_a_trace_up_to_there_and_says_so(tmp_path: Path) -> None:
    whole = session(tmp_path / "a.mcap", [1e6 + second for second in range(400)])
    part = tmp_path / "part.mcap"
    part.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    done = RUN.invoke(app, ["from-session", str(part), "pi-1", str(tmp_path / "a.csv")])
    assert done.exit_code == 0, done.output
    assert "it was cut short, as by a crash; the trace goes up to there" in " ".join(done.output.split())
    assert len(read_trace(tmp_path / "a.csv").samples) < 400


def test_traces_of_one_name_and_odd_names_are_all_shown(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    files = [tmp_path / "x.csv", tmp_path / "b" / "x.csv", tmp_path / "a[red]b.csv", tmp_path / "a$^$.csv"]
    for file in files:
        write_trace(file, kind("walk", duration_s=10))
    shown = RUN.invoke(app, ["show", *map(str, files), "--picture", str(tmp_path / "t.png")])
    assert shown.exit_code == 0, shown.output
    assert [line.split()[0] for line in shown.output.splitlines()[3:7]] == ["x", "x", "a[red]b", "a$^$"]


def test_sessions_without_the_agent_or_its_rates_are_refused(tmp_path: Path) -> None:
    path = session(tmp_path / "a.mcap", [None, None])
    with pytest.raises(TraceInvalid, match="pi-1 had not measured its uplink"):
        read_session(path, "pi-1", "uplink")
    with pytest.raises(TraceInvalid, match="tells nothing of pi-2; it tells of pi-1"):
        read_session(path, "pi-2", "uplink")
    with pytest.raises(TraceInvalid, match=r"no-session\.mcap"):
        read_session(tmp_path / "no-session.mcap", "pi-1", "uplink")


def test_the_commands_make_bring_in_and_show(tmp_path: Path) -> None:
    made_path, packets_path = tmp_path / "drive.csv", packets([1, 5, 900, 1_000, 2_000], tmp_path / "a.up")
    done = RUN.invoke(app, ["make", "drive", str(made_path), "--seconds", "60", "--mbps", "3", "--seed", "1"])
    assert done.exit_code == 0, done.output
    assert f"{made_path}: 60 rows, 60 s" in done.output
    done = RUN.invoke(app, ["from-mahimahi", str(packets_path), str(tmp_path / "b.csv")])
    assert done.exit_code == 0, done.output
    session(tmp_path / "s.mcap", [1e6, 2e6, 3e6])
    done = RUN.invoke(app, ["from-session", str(tmp_path / "s.mcap"), "pi-1", str(tmp_path / "c.csv")])
    assert done.exit_code == 0, done.output
    files = [str(made_path), str(tmp_path / "b.csv"), str(tmp_path / "c.csv")]
    shown = RUN.invoke(app, ["show", *files, "--picture", str(tmp_path / "t.png")])
    assert shown.exit_code == 0, shown.output
    assert {"drive", "b", "c"} <= {line.split()[0] for line in shown.output.splitlines() if line.split()}
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["make", "walk", "there.csv"], "traces: there.csv exists already; name another file"),
        (["make", "walk", "new.csv", "--mbps", "0"], "traces: a median rate is above 0 bit/s"),
        (["make", "walk", "new.csv", "--seconds", "inf"], "traces: inf s in steps of 1 s are not"),
        (["make", "walk", "new.csv", "--seconds", "nan"], "traces: nan s in steps of 1 s are not"),
        (["make", "walk", "n" * 300], "traces: "),
        (["from-mahimahi", "week.up", "new.csv", "--step", "0.01"], "traces: week.up: would be 60,000,000 rows"),
        (["show", "good.csv", "--picture", "t.foo"], "traces: t.foo: Format 'foo' is not supported"),
        (["show", *["good.csv"] * 41, "--picture", "t.png"], "traces: a picture has room for 40 traces, not 41"),
        (["make", "walk", "none/new.csv"], "traces: none/new.csv can't be written: No such file or directory"),
        (["from-mahimahi", "there.csv", "new.csv"], "traces: there.csv, line 1: 'time' is no time"),
        (["from-session", "there.csv", "pi-1", "new.csv"], "traces: there.csv: it was cut short"),
        (["show", "none.csv"], "traces: none.csv: can't be read: No such file or directory"),
        (["show", "there.csv"], "traces: there.csv, line 1: unknown column 'time'"),
    ],
)
def test_mistakes_end_in_one_line_and_touch_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.csv").write_text("time\n1\n")
    Path("good.csv").write_text("time_s,bandwidth_bps\n0,1e6\n")
    Path("week.up").write_text("1\n600000000\n")
    done = RUN.invoke(app, arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith(why)
    assert done.stderr.count("\n") == 1
    assert sorted(os.listdir()) == ["good.csv", "there.csv", "week.up"]
    assert Path("there.csv").read_text() == "time\n1\n"


def test_every_shared_trace_is_read() -> None:
    for path in sorted((shared_data() / "traces").glob("*.csv")):
        trace = read_trace(path)
        assert len(trace.samples) >= 200


@pytest.mark.parametrize("offset_s", [0.0, 1.0, 3.4, 4.0, 11.0])
def test_a_trace_from_another_moment_on_is_the_same_one_later(offset_s: float) -> None:
    trace = Trace(tuple(Sample(float(i), 1e6 * (1 + i)) for i in range(4)), 1.0)
    late, steps_s = shifted(trace, offset_s), round(offset_s)
    for at_s in (0.0, 0.5, 1.0, 2.9, 3.0, 7.5, 100.0):
        assert late.at(at_s) == trace.at(at_s + steps_s)
        assert late.next_change_s(at_s) == pytest.approx(trace.next_change_s(at_s + steps_s) - steps_s)
    first = list(itertools.islice(late.steps(), 6))
    assert [at_s for at_s, _ in first] == pytest.approx([0, 1, 2, 3, 4, 5])
    assert [sample for _, sample in first] == [trace.at(steps_s + i) for i in range(6)]


@given(
    rates=st.lists(st.sampled_from([1e6, 1e6, 2e6, 5e6]), min_size=1, max_size=8),
    loop=st.booleans(),
    from_steps=st.integers(0, 12),
    times_s=st.lists(st.floats(0, 40) | st.integers(0, 160).map(lambda quarter: quarter / 4), min_size=1, max_size=30),
)
def test_what_a_trace_says_does_not_depend_on_what_it_was_asked_before(
    rates: list[float], loop: bool, from_steps: int, times_s: list[float]
) -> None:
    step_s = 0.5
    samples = tuple(Sample(index * step_s, rate) for index, rate in enumerate(rates))
    asked = Trace(samples, step_s, loop, from_steps * step_s)
    for at_s in times_s:
        fresh = Trace(samples, step_s, loop, from_steps * step_s)
        assert asked.at(at_s) is fresh.at(at_s)
        assert asked.next_change_s(at_s) == fresh.next_change_s(at_s)
        assert asked == fresh
