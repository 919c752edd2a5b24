"""A trace must be read exactly or refused with one line and drive a link in time; the command must name mistakes."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from scripts.link import Bucket, EmulatedLink, LinkError, follow
from scripts.link.__main__ import address, app
from scripts.link.following import Direction
from scripts.traces import Sample, Trace, TraceInvalid, read_trace

pytestmark = pytest.mark.timeout(30)

traces = st.builds(
    lambda rates, step_s, loop: Trace(tuple(Sample(i * step_s, r) for i, r in enumerate(rates)), step_s, loop),
    st.lists(st.floats(0, 1e9), min_size=1, max_size=20),
    st.sampled_from([0.1, 0.25, 1.0, 3.0]),
    st.booleans(),
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "trace.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return write


class Recorded(EmulatedLink):
    """A link that carries nothing and notes what it was set to."""

    def __init__(self) -> None:
        self.set_to: list[tuple[str, float | None, float | None]] = []
        super().__init__(broker_host="127.0.0.1", broker_port=1, uplink=Bucket(1), downlink=Bucket(1))

    def set_rate(self, uplink_bps: float | None = None, downlink_bps: float | None = None) -> None:
        self.set_to.append(("rate", uplink_bps, downlink_bps))

    def set_delay(self, uplink_delay_s: float, downlink_delay_s: float | None = None) -> None:
        self.set_to.append(("delay", uplink_delay_s, downlink_delay_s))


@given(traces, st.data())
def test_every_sample_is_in_force_from_its_time_until_the_next(trace: Trace, data: st.DataObject) -> None:
    sample = data.draw(st.sampled_from(trace.samples))
    part = data.draw(st.floats(0, 0.99))
    assert trace.at(sample.time_s) == sample
    assert trace.at(sample.time_s + part * trace.step_s) == sample


@given(traces, st.floats(0, 1e5))
def test_a_trace_always_has_a_sample_and_loops_or_holds_after_its_end(trace: Trace, time_s: float) -> None:
    sample = trace.at(time_s)
    assert sample in trace.samples
    if time_s >= trace.duration_s and not trace.loop:
        assert sample == trace.samples[-1]
    if trace.loop:
        assert sample == trace.at(time_s % trace.duration_s)


@given(traces)
def test_the_steps_are_the_samples_in_order_of_time(trace: Trace) -> None:
    count = len(trace.samples)
    steps = list(islice(trace.steps(), 2 * count))
    assert [sample for _, sample in steps] == list(trace.samples) * (2 if trace.loop else 1)
    times_s = [time_s for time_s, _ in steps]
    assert times_s == sorted(times_s)
    if trace.loop:
        assert times_s[count] == trace.duration_s


@pytest.mark.parametrize("time_s", [-1.0, float("nan"), float("inf")])
def test_a_time_that_makes_no_sense_is_refused(time_s: float) -> None:
    with pytest.raises(ValueError, match="a trace has no time"):
        Trace((Sample(0, 1),), 1.0).at(time_s)


def test_all_columns_are_read_with_their_units(write: Callable[[str], Path]) -> None:
    trace = read_trace(write("time_s,bandwidth_bps,rtt_ms,rssi_dbm,loss\n0,1000,80,-89,0.5\n0.1,0,82,-90,0\n\n"))
    assert trace.samples == (Sample(0, 1000, 0.08, -89, 0.5), Sample(0.1, 0, 0.082, -90, 0))
    assert (trace.step_s, trace.loop) == (0.1, True)
    assert trace.duration_s == pytest.approx(0.2)
    assert trace.at(0.25).rtt_s == 0.08


def test_two_columns_and_one_row_are_enough(write: Callable[[str], Path]) -> None:
    trace = read_trace(write("time_s,bandwidth_bps\n0,5e6\n"), loop=False)
    assert trace.at(100) == Sample(0, 5e6)


HEADER = "time_s,bandwidth_bps\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ": is empty"),
        (HEADER, ": has a header and no rows"),
        ("time_s,rate\n0,1\n", ", line 1: unknown column 'rate'"),
        ("time_s,rtt_ms\n0,1\n", ", line 1: the column bandwidth_bps is missing"),
        ("time_s,bandwidth_bps,time_s\n0,1,0\n", ", line 1: a column stands there twice"),
        (HEADER + "0,1\n1\n", ", line 3: 1 fields, the header has 2"),
        (HEADER + "0,1\n\n1,fast\n", ", line 4: bandwidth_bps is 'fast', not a number"),
        (HEADER + "0,-5\n", ", line 2: bandwidth_bps is -5; allowed is 0 to 1e+15"),
        (HEADER + "0,nan\n", ", line 2: bandwidth_bps is nan; allowed is 0 to 1e+15"),
        ("time_s,bandwidth_bps,loss\n0,1,1.5\n", ", line 2: loss is 1.5; allowed is 0 to 1"),
        (HEADER + "1,1\n2,1\n", ", line 2: time_s starts at 1, not at 0"),
        (HEADER + "0,1\n0,1\n", ", line 3: time_s 0 is not one step after 0"),
        (HEADER + "0,1\n1,1\n3,1\n", ", line 4: time_s 3 is not one step after 1"),
    ],
)
def test_a_bad_trace_is_refused_with_its_file_and_line(write: Callable[[str], Path], text: str, says: str) -> None:
    path = write(text)
    with pytest.raises(TraceInvalid) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}{says}")
    assert "\n" not in str(caught.value)


def test_a_trace_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceInvalid, match="No such file"):
        read_trace(tmp_path / "absent.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceInvalid, match="can't be read"):
        read_trace(tmp_path / "bytes.csv")


@pytest.mark.parametrize(
    ("direction", "expected"),
    [("both", (7.0, 7.0)), ("uplink", (7.0, None)), ("downlink", (None, 7.0))],
)
async def test_a_link_follows_rate_and_half_the_round_trip(
    direction: Direction, expected: tuple[float | None, float | None]
) -> None:
    link = Recorded()
    link.set_to.clear()
    await follow(link, Trace((Sample(0, 7, rtt_s=0.08),), 1.0, loop=False), direction=direction)
    assert link.set_to == [("rate", *expected), ("delay", 0.04, None)]


async def test_a_link_follows_a_trace_in_time_and_without_end_if_it_loops() -> None:
    link = Recorded()
    link.set_to.clear()
    trace = Trace((Sample(0, 1), Sample(0.1, 2)), 0.1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(follow(link, trace), 0.95)
    rates = [rate for _, rate, _ in link.set_to]
    assert rates == [1.0, 2.0] * 5 or (2 <= len(rates) < 10 and rates == ([1.0, 2.0] * 5)[: len(rates)])


def test_an_address_is_host_and_port() -> None:
    assert address("127.0.0.1:1884") == ("127.0.0.1", 1884)
    assert address("[::1]:0") == ("::1", 0)
    for text in ("", "host", "host:", ":1", "host:x", "host:65536", "host:-1"):
        with pytest.raises(LinkError, match="write HOST:PORT"):
            address(text)


def test_the_help_explains_and_every_mistake_is_one_line(write: Callable[[str], Path]) -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert "TCP proxy" in shown.output
    assert "--uplink-mbps" in shown.output
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = f"127.0.0.1:{taken.getsockname()[1]}"
        for arguments, says in [
            (["--listen", used], f"link: can't listen on {used}: address already in use"),
            (["--broker", "nowhere"], "link: 'nowhere' is not an address"),
            (["--trace", str(write("x"))], f"link: {write('x')}, line 1: unknown column 'x'"),
        ]:
            failed = runner.invoke(app, arguments)
            assert failed.exit_code == 1
            assert failed.stderr.startswith(says)
            assert failed.stderr.count("\n") == 1


async def test_the_command_listens_until_interrupted(write: Callable[[str], Path]) -> None:
    trace = write("time_s,bandwidth_bps\n0,1000000\n")
    arguments = ["-m", "scripts.link", "--listen", "127.0.0.1:0", "--trace", str(trace), "--trace-hold"]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    try:
        first = await asyncio.wait_for(process.stderr.readline(), 60)
        process.send_signal(signal.SIGINT)
        rest = await asyncio.wait_for(process.stderr.read(), 60)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    assert first.startswith(b"link: listening on 127.0.0.1:")
    assert rest == b"link: carried 0 bytes up, 0 bytes down\nlink: stopped\n"
