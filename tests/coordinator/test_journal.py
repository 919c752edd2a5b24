"""What the journal promises: after any crash, and on a full disk, what is open is known and nothing else is."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_config.messages import Ask
from coordinator.errors import JournalUnwritable
from coordinator.journal import ENDED_KEPT, InFlight, Journal
from tests.coordinator.builders import instance


def entry(number: int, text: str = "Which valve?") -> InFlight:
    ask = Ask(request=instance(number), client="client-1", question=text, sources=("pi-1",), receiver="jetson-1")
    return InFlight(ask=ask, agents=("jetson-1", "pi-1"))


def left_over(path: Path) -> list[str]:
    """What a coordinator that starts now finds."""
    journal = Journal(path)
    journal.close()
    return [each.ask.request for each in journal.left_over]


@contextmanager
def opened(path: Path, compact_bytes: int = 1_000_000) -> Iterator[Journal]:
    journal = Journal(path, compact_bytes)
    try:
        yield journal
    finally:
        journal.close()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """This process can't write a file any longer than that: the kernel cuts the write short, then refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_began_and_did_not_end_is_left_over_whole_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "state" / "rounds.jsonl"
    with opened(path) as journal:
        assert journal.left_over == ()
        for number in (3, 1, 2):
            journal.began(entry(number, "Wo ist das Ventil?\nUnd die Pumpe – «hier»?"))
        journal.ended(instance(1))
    with opened(path) as journal:
        assert journal.left_over == tuple(entry(n, "Wo ist das Ventil?\nUnd die Pumpe – «hier»?") for n in (3, 2))


def test_opening_compacts_and_leaves_no_second_file(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    with opened(path) as journal:
        for number in range(50):
            journal.began(entry(number))
            journal.ended(instance(number))
        journal.began(entry(99))
    with opened(path):
        assert path.read_bytes().count(b'"began"') == 1
    assert list(tmp_path.iterdir()) == [path]
    assert left_over(path) == [instance(99)]


def test_a_line_cut_short_by_a_crash_is_ignored_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    with opened(path) as journal:
        journal.began(entry(1))
        journal.began(entry(2))
    path.write_bytes(path.read_bytes()[:-40])
    with opened(path) as journal:
        assert [each.ask.request for each in journal.left_over] == [instance(1)]
        journal.began(entry(3))
    assert left_over(path) == [instance(1), instance(3)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["began", "ended"]), st.integers(0, 3)), min_size=1, max_size=12),
    st.data(),
)
def test_any_prefix_of_what_was_written_gives_what_was_open_after_its_last_whole_line(
    steps: list[tuple[str, int]], data: st.DataObject
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rounds.jsonl"
        open_: dict[str, None] = {}
        after = [(0, list(open_))]
        with opened(path) as journal:
            for what, number in steps:
                if what == "began":
                    journal.began(entry(number))
                    open_[instance(number)] = None
                else:
                    journal.ended(instance(number))
                    open_.pop(instance(number), None)
                after.append((path.stat().st_size, list(open_)))
        cut = data.draw(st.integers(0, after[-1][0]))
        path.write_bytes(path.read_bytes()[:cut])
        # a line whose line feed alone is missing is a whole line all the same
        expected = [state for size, state in after if size - 1 <= cut][-1]
        assert left_over(path) == expected
        assert left_over(path) == expected


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_journal_are_ignored(garbage: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rounds.jsonl"
        with opened(path) as journal:
            journal.began(entry(1))
        path.write_bytes(path.read_bytes() + garbage + b"\n")
        assert instance(1) in left_over(path)


@pytest.mark.parametrize(
    "line", [b'{"ended":"\xff"}', b"[" * 5_000, b'{"began":' * 5_000, b"\0\0\0", b'{"began":{"ask":1}}', b"null", b"7"]
)
def test_a_damaged_line_is_ignored(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rounds.jsonl"
    with opened(path) as journal:
        journal.began(entry(1))
    path.write_bytes(line + b"\n" + path.read_bytes())
    assert left_over(path) == [instance(1)]


def test_on_a_full_disk_a_line_is_refused_whole_however_often_it_is_tried(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    with opened(path) as journal:
        journal.began(entry(1))
        whole = path.read_bytes()
        with files_of_at_most(len(whole) + 50):
            for _ in range(3):
                with pytest.raises(JournalUnwritable, match=r"rounds\.jsonl can't be written: \S") as raised:
                    journal.began(entry(2))
                assert "\n" not in str(raised.value)
                assert path.read_bytes() == whole
            journal.ended(instance(1))  # the short line of an end still fits
        journal.began(entry(3))
    assert left_over(path) == [instance(3)]


def test_a_question_that_was_refused_for_a_full_disk_is_not_left_over(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    with opened(path, compact_bytes=600) as journal:
        for number in range(10):
            with files_of_at_most(100), pytest.raises(JournalUnwritable):
                journal.began(entry(100 + number))
            journal.began(entry(number))  # compacts now and then
            if number < 8:
                journal.ended(instance(number))
    assert left_over(path) == [instance(8), instance(9)]


def test_a_journal_that_runs_for_long_does_not_grow(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    with opened(path, compact_bytes=4_000) as journal:
        journal.began(entry(5_000))
        for number in range(1_000):
            journal.began(entry(number))
            assert path.stat().st_size < 25_000  # all of it would be 300 kB
            journal.ended(instance(number))
    assert left_over(path) == [instance(5_000)]


def test_the_last_that_ended_are_known_to_the_next_coordinator_and_no_more_than_that(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    with opened(path) as journal:
        for number in range(ENDED_KEPT + 10):
            journal.began(entry(number))
            journal.ended(instance(number))
    for _ in range(2):
        with opened(path) as journal:
            assert journal.known_ended == tuple(instance(number) for number in range(10, ENDED_KEPT + 10))


def test_many_open_questions_are_not_written_again_at_every_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = 0
    compacted = Journal._compacted

    def counted(self: Journal) -> object:
        nonlocal times
        times += 1
        return compacted(self)

    monkeypatch.setattr(Journal, "_compacted", counted)
    with opened(tmp_path / "rounds.jsonl", compact_bytes=1_000) as journal:
        for number in range(500):
            journal.began(entry(number))
    assert times < 15


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalUnwritable, match=r"file/rounds\.jsonl can't be read: Not a directory") as raised:
        Journal(tmp_path / "file" / "rounds.jsonl")
    assert "\n" not in str(raised.value)


def test_a_disk_that_is_full_at_the_start_is_one_line_and_the_journal_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    with opened(path) as journal:
        journal.began(entry(1))
    whole = path.read_bytes()
    with files_of_at_most(10), pytest.raises(JournalUnwritable, match="can't be written"):
        Journal(path)
    assert path.read_bytes() == whole
    assert left_over(path) == [instance(1)]
