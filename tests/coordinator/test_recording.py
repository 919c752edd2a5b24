"""Sessions in a file: whole, cut short, spoilt, by other tools."""

from __future__ import annotations

import asyncio
import resource
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgpack
import msgspec
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcap.data_stream import RecordBuilder
from mcap.opcode import Opcode
from mcap.reader import make_reader
from mcap.records import Chunk
from mcap.writer import Writer
from typer.testing import CliRunner

from broker_config import topics
from broker_config.messages import AnswerOrder, Ended, Planned, SendOrder
from coordinator import recording
from coordinator.errors import RecordingInvalid, RecordingUnwritable
from coordinator.recorder import RecordedBus
from coordinator.recording import Event, Recorded, Recording, Session
from coordinator.settings import CoordinatorSettings, PlanningSettings
from scripts.replay.__main__ import app
from scripts.replay.clock import run_virtual
from tests.coordinator.builders import presence, telemetry
from tests.coordinator.site import FakeSite, answered, fake_site, question
from tests.memory_bus import MemoryBroker

SESSION = Session(site="home", began_s=1.7e9, clock_s=50.0, planning=PlanningSettings(policy="kv"))


def event(second: int) -> Event:
    """Telemetry, or a question, or presence."""
    at_s = SESSION.clock_s + second
    if second % 7 == 3:
        return Event(at_s, "heard", topics.REQUESTS, {}, question(second))
    if second % 7 == 5:
        return Event(at_s, "told", topics.PRESENCE, {"agent": "pi-1"}, presence("pi-1"))
    return Event(at_s, "heard", topics.TELEMETRY, {"agent": "pi-1"}, telemetry("pi-1", 1, second))


EVENTS = [event(second) for second in range(300)]


def written(path: Path, events: list[Event] = EVENTS) -> Path:
    made = Recording(path, SESSION)
    for each in events:
        made.add(each)
    made.close()
    return path


def read(path: Path) -> tuple[list[Event], str]:
    """What can be read, and why no more can."""
    found: list[Event] = []
    try:
        recorded = Recorded(path)
        for each in recorded:
            found.append(each)  # noqa: PERF402  what was read before it raises counts
    except RecordingInvalid as error:
        return found, str(error)
    return found, recorded.cut


def check_same(found: list[Event], expected: list[Event]) -> None:
    assert [(e.way, e.topic, dict(e.parameters), e.message) for e in found] == [
        (e.way, e.topic, dict(e.parameters), e.message) for e in expected
    ]
    assert [e.at_s for e in found] == pytest.approx([e.at_s for e in expected], abs=1e-6)


def test_what_is_recorded_is_read_in_its_order_and_with_its_times(tmp_path: Path) -> None:
    recorded = Recorded(written(tmp_path / "a.mcap"))
    assert recorded.session == SESSION
    check_same(list(recorded), EVENTS)
    assert not recorded.cut


def test_it_is_compact(tmp_path: Path) -> None:
    raw = sum(len(msgpack.packb([str(e.message)])) for e in EVENTS)
    assert written(tmp_path / "a.mcap").stat().st_size < raw / 4


def test_other_tools_read_it(tmp_path: Path) -> None:
    with written(tmp_path / "a.mcap").open("rb") as file:
        reader = make_reader(file)
        summary = reader.get_summary()
        assert summary is not None
        assert {schema.encoding for schema in summary.schemas.values()} == {"jsonschema"}
        assert {channel.message_encoding for channel in summary.channels.values()} == {"msgpack"}
        found = list(reader.iter_messages(topics=[topics.REQUESTS.pattern]))
    assert len(found) == sum(e.topic is topics.REQUESTS for e in EVENTS)
    assert msgpack.unpackb(found[0][2].data)["message"]["question"] == "Which valve?"


def test_without_its_end_it_is_read_up_to_the_last_chunk(tmp_path: Path) -> None:
    """As after kill -9: nothing was closed."""
    made = Recording(tmp_path / "a.mcap", SESSION)
    for each in EVENTS:
        made.add(each)
    left = tmp_path / "left.mcap"
    left.write_bytes(made.path.read_bytes())
    made.close()
    recorded = Recorded(left)
    found = list(recorded)
    assert len(EVENTS) / 2 < len(found) < len(EVENTS)
    check_same(found, EVENTS[: len(found)])
    assert recorded.cut


@given(share=st.floats(0, 1))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cut_anywhere_it_is_read_up_to_there(tmp_path: Path, share: float) -> None:
    whole = tmp_path / "whole.mcap"
    data = whole.read_bytes() if whole.exists() else written(whole).read_bytes()
    part = tmp_path / "part.mcap"
    part.write_bytes(data[: int(share * (len(data) - 1))])
    found, why = read(part)
    check_same(found, EVENTS[: len(found)])
    assert why or len(found) == len(EVENTS)
    assert len(found) >= (share - 0.5) * len(EVENTS)
    assert "\n" not in why


@given(share=st.floats(0, 1), flip=st.integers(1, 255))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_spoilt_anywhere_it_is_read_up_to_there_or_refused(tmp_path: Path, share: float, flip: int) -> None:
    whole = tmp_path / "whole.mcap"
    data = bytearray(whole.read_bytes() if whole.exists() else written(whole).read_bytes())
    data[int(share * (len(data) - 1))] ^= flip
    part = tmp_path / "part.mcap"
    part.write_bytes(data)
    found, why = read(part)
    assert [e.message for e in found] == [e.message for e in EVENTS[: len(found)]]
    assert "\n" not in why


def _other_mcap(path: Path, metadata: dict[str, str] | None) -> None:
    with path.open("wb") as file:
        writer = Writer(file)
        writer.start()
        if metadata is not None:
            writer.add_metadata(recording.SESSION, metadata)
        writer.finish()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b""), "cut short"),
        (lambda path: path.write_text("time_s,bandwidth_bps\n0,1e6\n" * 9), "spoilt"),
        (lambda path: _other_mcap(path, None), "not a session of kvbus"),
        (lambda path: _other_mcap(path, {"version": "2", "session": "{}"}), "it has version 2, this program reads 1"),
        (lambda path: _other_mcap(path, {"version": "1", "session": "{}"}), "site"),
        (lambda path: _other_mcap(path, {"version": "1", "session": "["}), "session"),
    ],
)
def test_what_is_no_session_is_refused_in_one_line(tmp_path: Path, make: Callable[[Path], object], why: str) -> None:
    path = tmp_path / "other.mcap"
    make(path)
    with pytest.raises(RecordingInvalid, match=why) as refused:
        list(Recorded(path))
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


def _spoilt(path: Path, *, claims: int, data: bytes, compression: str = "zstd") -> Path:
    """A recording with a chunk that is not what it says."""
    chunk = Chunk(
        compression=compression,
        data=data,
        message_start_time=0,
        message_end_time=0,
        uncompressed_crc=0,
        uncompressed_size=claims,
    )
    whole = written(path, EVENTS[:1]).read_bytes()
    builder = RecordBuilder()
    chunk.write(builder)
    begin = whole.index(bytes([Opcode.CHUNK]), whole.index(b'"planning"'))
    path.write_bytes(whole[:begin] + builder.end())  # type: ignore[no-untyped-call]
    return path


@pytest.mark.parametrize(
    ("claims", "data", "compression", "why"),
    [
        (10, zstandard.compress(bytes(2**28)), "zstd", "says it has 10 bytes"),
        (2**40, b"", "zstd", "a chunk of 1099511627776 bytes"),
        (10, b"", "lz4", "compressed by 'lz4'"),
        (10, b"no zstd", "zstd", "spoilt"),
        (9, bytes([Opcode.MESSAGE]) + (2**62).to_bytes(8, "little"), "", "it "),
        (9, bytes([Opcode.MESSAGE]) + (2**63 + 5).to_bytes(8, "little"), "", "it "),
    ],
)
def test_a_chunk_that_is_not_what_it_says_ends_the_reading_in_little_memory(
    tmp_path: Path, claims: int, data: bytes, compression: str, why: str
) -> None:
    path = _spoilt(tmp_path / "a.mcap", claims=claims, data=data, compression=compression)
    tracemalloc.start()
    found, cut = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == []
    assert why in cut
    assert "\n" not in cut
    assert peak < 2**27


def _with(path: Path, at_s: float, topic: str, content: object) -> Path:
    """A recording with one message that no coordinator would have recorded."""
    with path.open("wb") as file:
        writer = Writer(file)
        writer.start()
        metadata = {"version": "1", "session": msgspec.json.encode(SESSION).decode()}
        writer.add_metadata(recording.SESSION, metadata)
        channel = writer.register_channel(topic=topic, message_encoding="msgpack", schema_id=0)
        at_ns = int((SESSION.began_s + at_s) * 1e9)
        writer.add_message(channel, log_time=at_ns, publish_time=at_ns, data=msgpack.packb(content))
        writer.finish()  # type: ignore[no-untyped-call]
    return path


GOOD = msgspec.to_builtins(telemetry("pi-1"))


@pytest.mark.parametrize(
    ("at_s", "content", "why"),
    [
        (1, {"parameters": {"agent": "pi-1"}, "message": {"x": 1}}, "a message of kvbus/{site}/agents/{agent}/tele"),
        (1, {"parameters": {}, "message": GOOD}, "other parameters"),
        (1, {"parameters": {"agent": 1}, "message": GOOD}, "a message of"),
        (1, [], "a message of"),
        (9e8, {"parameters": {"agent": "pi-1"}, "message": GOOD}, "900000000 s after its beginning"),
        (-50, {"parameters": {"agent": "pi-1"}, "message": GOOD}, "-50 s after its beginning"),
    ],
)
def test_a_message_that_is_none_is_refused_in_one_line(tmp_path: Path, at_s: float, content: object, why: str) -> None:
    path = _with(tmp_path / "a.mcap", at_s, topics.TELEMETRY.pattern, content)
    found, told = read(path)
    assert found == []
    assert why in told
    assert "\n" not in told
    done = CliRunner().invoke(app, ["plans", str(path)])
    assert done.exit_code == 1
    assert done.stderr.startswith("replay: ")
    assert done.stderr.count("\n") == 1


def test_topics_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    assert read(_with(tmp_path / "a.mcap", 1, "kvbus/{site}/weather", [])) == ([], "")


def test_a_recording_that_cannot_begin_leaves_no_file(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(RecordingUnwritable, match="File too large"):
            Recording(tmp_path / "a.mcap", SESSION)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "a.mcap").exists()
    with pytest.raises(RecordingUnwritable, match="too long"):
        Recording.named(tmp_path / ("n" * 300), SESSION)


def test_nobody_else_reads_it(tmp_path: Path) -> None:
    assert written(tmp_path / "a.mcap").stat().st_mode & 0o077 == 0


def test_an_existing_file_is_never_touched(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    path.write_text("mine")
    with pytest.raises(RecordingUnwritable, match="File exists"):
        Recording(path, SESSION)
    assert path.read_text() == "mine"


def test_in_a_folder_it_is_named_by_site_and_time(tmp_path: Path) -> None:
    made = Recording.named(tmp_path, SESSION)
    made.close()
    assert made.path.parent == tmp_path
    assert made.path.name.startswith("home-2023111")
    with closing(Recorded(made.path)) as recorded:
        assert recorded.session.site == "home"


def test_a_whole_session_of_a_coordinator_is_recorded(tmp_path: Path) -> None:
    ask = question()

    async def story(site: FakeSite) -> None:
        await site.asker.ask(ask)
        order = await site.receiver.order(AnswerOrder)
        await site.deliver(order, [site.pi_1, site.pi_2])
        await site.receiver.piece(order, 0, "the north one")
        await site.receiver.tell(answered(order))
        await site.asker.end(ask.request)

    record(tmp_path, story)
    recorded = Recorded(tmp_path / "a.mcap")
    found = list(recorded)
    assert not recorded.cut
    assert {agent for e in found if e.topic is topics.TELEMETRY for agent in [e.parameters["agent"]]} == {
        "pi-1",
        "pi-2",
        "jetson-1",
    }
    told = [e for e in found if e.way == "told"]
    assert [e.message for e in found if e.topic is topics.REQUESTS] == [ask]
    assert sum(isinstance(e.message, SendOrder) for e in told) == 2
    kinds = [type(e.message) for e in told]
    assert kinds.index(Planned) < kinds.index(Ended)
    assert [e.at_s for e in found] == sorted(e.at_s for e in found)


def test_a_disk_that_fills_ends_the_recording_and_not_the_session(tmp_path: Path) -> None:
    """A file of this process may not grow beyond so many bytes: writing it fails as on a full disk."""

    async def story(site: FakeSite) -> None:
        await asyncio.sleep(200)
        ask = question()
        await site.asker.ask(ask)
        order = await site.receiver.order(AnswerOrder)
        await site.receiver.tell(answered(order))
        assert isinstance(await site.asker.end(ask.request), Ended)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, before[1]))
    try:
        record(tmp_path, story)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found, why = read(tmp_path / "a.mcap")
    assert len(found) > 100
    assert "cut short" in why
    assert not any(e.topic is topics.REQUESTS for e in found)


def test_a_recorded_bus_is_the_bus_it_records(tmp_path: Path) -> None:
    """Handlers hear what they would, and no longer when they have closed."""

    async def run() -> None:
        broker = MemoryBroker()
        bus = RecordedBus.begin(broker.bus(), tmp_path / "a.mcap", CoordinatorSettings(), SESSION.learned)
        heard: list[object] = []
        subscription = await bus.subscribe(topics.PRESENCE, lambda message, at: heard.append((message, dict(at))))
        for number in (1, 2):
            await bus.publish(topics.PRESENCE, presence("pi-1", number), agent="pi-1")
            await asyncio.sleep(0.1)
            await subscription.close()
        bus.close()
        assert heard == [(presence("pi-1", 1), {"agent": "pi-1"})]
        assert bus.site == "home"

    run_virtual(run())
    ways = [e.way for e in Recorded(tmp_path / "a.mcap")]
    assert ways == ["told", "heard", "told"]


def record(folder: Path, story: Callable[[FakeSite], object]) -> None:
    """Run a story on a fresh site whose session is recorded to a.mcap."""

    async def run() -> None:
        async with fake_site(folder, record=folder / "a.mcap") as site:
            await story(site)  # type: ignore[misc]

    run_virtual(run())
