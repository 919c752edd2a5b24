"""What was learned survives a restart; a file that can't be used or written is a warning and never more."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from structlog.typing import EventDict

from broker_config.messages import AnswerOrder, SendOrder
from coordinator.keeping import KEEP_INTERVAL_S, LARGEST_BYTES, VERSION, Keeper
from coordinator.learning import Learned, LearnedLink, LearnedPolicy, LearnedReceiver, Learning
from scripts.replay.clock import run_virtual
from tests.coordinator.site import FakeSite, answered, fake_site, question, sent
from tests.coordinator.test_journal import files_of_at_most
from tests.coordinator.test_learning import ALONE, LINK, MEGABYTES_5, ended

NAME = "home-learned.json"


def taught(rounds: int = 4, ratio: float = 0.5) -> Learning:
    learning = Learning()
    for _ in range(rounds):
        ended(learning, ALONE, ratios=(ratio,))
    return learning


def warnings(logs: list[EventDict]) -> list[EventDict]:
    return [entry for entry in logs if entry["log_level"] == "warning"]


def kept(path: Path, learning: Learning) -> None:
    """By a coordinator that starts, and ends in good order."""
    Keeper(path).close(learning)


def test_what_was_kept_is_found_and_a_missing_file_is_nothing(tmp_path: Path) -> None:
    path, learning = tmp_path / "state" / NAME, taught()
    with capture_logs() as logs:
        assert Keeper(path).learned == Learned()
        kept(path, learning)
        assert Keeper(path).learned == learning.learned
    assert logs == []
    assert Learning(learned=Keeper(path).learned).link_factors == {LINK: pytest.approx(0.5, rel=0.05)}
    assert [file.name for file in path.parent.iterdir()] == [NAME]


def test_it_is_written_when_something_was_learned_at_most_every_few_seconds_and_at_the_end(tmp_path: Path) -> None:
    path, learning = tmp_path / NAME, Learning()
    keeper = Keeper(path)
    keeper.keep(learning, 100.0)
    assert not path.exists()
    sizes = []
    for second in range(21):
        ended(learning, ALONE)
        keeper.keep(learning, 101.0 + second)
        sizes.append(path.stat().st_size if path.exists() else 0)
    assert len(set(sizes) - {0}) == 20 // KEEP_INTERVAL_S
    ended(learning, ALONE, policy="kv")
    keeper.close(learning)
    assert Keeper(path).learned == learning.learned


def learned_with(**changes: object) -> bytes:
    """A file that says this of its one link."""
    link = {"sender": "pi-1", "receiver": "jetson-1", "ratios": [0.5], **changes}
    return msgspec.json.encode({"kvbus_learned": VERSION, "learned": {"links": [link]}})


WHOLE = learned_with()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "truncated"),
        (WHOLE[:-5], "truncated"),
        (b"\0\xff\0", "malformed"),
        (b"[" * 50_000, ""),
        (b"null", "Expected `object`"),
        (b'{"ended":"0123456789abcdef"}', "missing required field `kvbus_learned`"),
        (WHOLE.replace(b":1,", b":2,", 1), "of version 2, this coordinator knows 1"),
        (b'{"kvbus_learned":1}', "missing required field `learned`"),
        (learned_with(ratios=[0.5, None]), "Expected `float`"),
        (learned_with(ratios=[0.0]), ">= 0.1"),
        (learned_with(ratios=[-1.0]), ">= 0.1"),
        (learned_with(ratios=[2.5]), "<= 2.4"),
        (learned_with().replace(b"0.5", b"NaN"), "malformed"),
        (learned_with().replace(b"0.5", b"1e999"), "out of range"),
        (learned_with(ratios=[0.5] * 17), "length <= 16"),
        (learned_with(sender="../pi"), "matching regex"),
        (b" " * (LARGEST_BYTES + 1), "longer than 4000000 bytes"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_warning_and_stays_until_there_is_a_better_one(
    tmp_path: Path, data: bytes, why: str
) -> None:
    path = tmp_path / NAME
    path.write_bytes(data)
    with capture_logs() as logs:
        keeper = Keeper(path)
        assert keeper.learned == Learned()
        keeper.close(Learning())
        assert path.read_bytes() == data
        with files_of_at_most(20):
            keeper.close(taught())
        assert path.read_bytes() == data
        keeper.close(taught())
    unusable, unwritable = warnings(logs)
    assert why in unusable["error"]
    assert "\n" not in unusable["error"]
    assert unusable["file"] == unwritable["file"] == str(path)
    assert Keeper(path).learned == taught().learned
    assert path.with_suffix(".unusable").read_bytes() == data
    assert len(list(tmp_path.iterdir())) == 2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_befalls_the_file_a_coordinator_starts_with_values_in_their_bounds(data: st.DataObject) -> None:
    whole = bytearray(WHOLE)
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytes(whole[:at]) + data.draw(st.binary(max_size=8)) + bytes(whole[at + 1 :])
    with pytest.MonkeyPatch.context() as patch, capture_logs():
        patch.setattr(Path, "open", lambda *_: _Bytes(damaged))
        found = Keeper(Path("state") / NAME).learned
    assert msgspec.convert(msgspec.to_builtins(found), Learned) == found
    assert all(0.2 <= factor <= 1.2 for factor in Learning(learned=found).link_factors.values())


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def __enter__(self) -> _Bytes:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def read(self, size: int) -> bytes:
        return self._data[:size]


def test_a_full_disk_is_one_warning_and_what_was_kept_before_stays(tmp_path: Path) -> None:
    path, learning = tmp_path / NAME, taught()
    keeper = Keeper(path)
    keeper.close(learning)
    before = path.read_bytes()
    with capture_logs() as logs:
        for _ in range(3):
            ended(learning, ALONE, policy="jmsra")
            with files_of_at_most(50):
                keeper.close(learning)
            assert path.read_bytes() == before
            assert list(tmp_path.iterdir()) == [path]
        assert [entry["event"] for entry in logs] == ["what was learned can't be kept"]
        keeper.close(learning)
        assert Keeper(path).learned == learning.learned
        ended(learning, ALONE)
        with files_of_at_most(50):
            keeper.close(learning)
    assert len(logs) == 2


def test_a_folder_that_cannot_be_used_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / NAME
    with capture_logs() as logs:
        keeper = Keeper(path)
        keeper.close(taught())
        keeper.close(taught())
    assert logs[0]["error"] == "Not a directory"
    assert [entry["event"].partition(":")[0] for entry in logs] == [
        "what was learned can't be used",
        "what was learned can't be kept",
    ]


def test_the_largest_file_that_can_be_written_can_be_read(tmp_path: Path) -> None:
    long = 1 / 3
    learned = Learned(
        links=tuple(LearnedLink(sender=f"{n:032d}", receiver="r" * 32, ratios=(long,) * 16) for n in range(512)),
        receivers=tuple(LearnedReceiver(receiver=f"{n:032d}", excess_s=(long,) * 16) for n in range(256)),
        policies=tuple(LearnedPolicy(policy=f"{n:032d}", errors=(long,) * 64) for n in range(64)),
    )
    learning = Learning(learned=learned)
    learning.rounds += 1
    path = tmp_path / NAME
    kept(path, learning)
    assert path.stat().st_size < LARGEST_BYTES / 4
    assert Keeper(path).learned == learned


async def asked(site: FakeSite, number: int) -> None:
    """A question whose first sender reaches half the rate of its link."""
    ask = question(number, sources=("pi-1",))
    await site.asker.ask(ask)
    order = await site.receiver.order(AnswerOrder, number)
    send = await site.pi_1.order(SendOrder, number)
    seconds = 8 * MEGABYTES_5 / 1e7
    await site.pi_1.tell(sent(send, "pi-1", payload_bytes=MEGABYTES_5, transfer_s=seconds))
    await site.receiver.piece(order, 0, "north")
    await site.receiver.tell(answered(order))
    await site.asker.end(ask.request)


def test_a_coordinator_that_is_restarted_plans_with_what_the_one_before_had_learned(tmp_path: Path) -> None:
    async def story(stop: str) -> None:
        async with fake_site(tmp_path / stop) as site:
            for number in range(1, 5):
                await asked(site, number)
            before = site.coordinator._learning.learned
            assert before.links
            if stop == "killed":
                await asyncio.sleep(KEEP_INTERVAL_S + 1)
                await site.kill_coordinator()
            else:
                await site.stop_coordinator()
            await site.start_coordinator()
            assert site.coordinator._learning.learned == before

    for stop in ("stopped", "killed"):
        (tmp_path / stop).mkdir()
        run_virtual(story(stop))
