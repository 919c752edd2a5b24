"""Results outlive the run that wrote them, and only a run of the same goes on with them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.evaluate.errors import ResultsInvalid
from scripts.evaluate.records import RESULTS_NAME, RUN_NAME, Record, Results
from tests.scripts.evaluated import ABOUT, record

RUN: dict[str, Any] = {"bundle": "abc", "seed": 1, "methods": ("q4", "q6"), "files": {"squad": "f00"}}


def written(directory: Path, *items: str) -> Path:
    with Results.open(directory, RUN) as results:
        for item in items:
            results.add(record(item))
    return directory / RESULTS_NAME


def refusal(directory: Path, run: dict[str, Any]) -> str:
    with pytest.raises(ResultsInvalid) as caught:
        Results.open(directory, run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_results_of_another_question_under_the_same_name_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    written(tmp_path, "1")
    with Results.open(tmp_path, RUN) as results:
        with pytest.raises(ResultsInvalid, match="another question 1 of squad") as caught:
            results.has("squad", "1", "q4", "f" * 16)
        assert "\n" not in str(caught.value)


def test_a_run_that_did_nothing_yet_does_not_bind_the_next(tmp_path: Path) -> None:
    Results.open(tmp_path, RUN).close()
    with Results.open(tmp_path, {"of": "something else"}) as results:
        results.add(record("1"))
    assert "another run" in refusal(tmp_path, RUN)


def test_a_later_run_finds_what_an_earlier_one_did(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "results"
    written(directory, "1", "2")
    with Results.open(directory, RUN) as results:
        assert results.records == (record("1"), record("2"))
        assert results.has("squad", "1", "q4", ABOUT)
        assert not results.has("squad", "3", "q4", ABOUT)
        assert not results.has("squad", "1", "q6", ABOUT)
        assert not results.has("hotpotqa", "1", "q4", ABOUT)
        results.add(record("3"))
        assert results.has("squad", "3", "q4", ABOUT)
    with Results.open(directory, RUN) as results:
        assert len(results.records) == 3


@given(
    records=st.lists(
        st.builds(record, st.text(max_size=5), st.text(max_size=5), answer=st.text(), f1=st.floats(0, 1) | st.none())
    )
)
def test_every_record_comes_back_as_it_was(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("results")
    distinct = list({each.key: each for each in records}.values())
    with Results.open(directory, RUN) as results:
        for each in distinct:
            results.add(each)
    with Results.open(directory, RUN) as results:
        assert list(results.records) == distinct


def test_a_record_is_on_disk_as_soon_as_it_was_added(tmp_path: Path) -> None:
    with Results.open(tmp_path, RUN) as results:
        results.add(record())
        assert msgspec.json.decode((tmp_path / RESULTS_NAME).read_bytes(), type=Record) == record()


@pytest.mark.parametrize("cut", [1, 2, 50, 300])
def test_a_last_line_that_was_torn_is_dropped_and_can_be_done_again(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path, "1", "2")
    path.write_bytes(path.read_bytes()[:-cut])
    with Results.open(tmp_path, RUN) as results:
        assert [each.item for each in results.records] == ["1"]
        results.add(record("2"))
    with Results.open(tmp_path, RUN) as results:
        assert [each.item for each in results.records] == ["1", "2"]


@pytest.mark.parametrize("line", [b"", b"{}", b"\xff", b"[" * 100_000, b'{"item": 5}'])
def test_any_other_bad_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = written(tmp_path, "1", "2")
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + second)
    said = refusal(tmp_path, RUN)
    assert said.startswith(f"{path}, line 2: ")
    assert said.endswith("; remove the line")


def test_a_record_that_stands_there_twice_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "1", "2")
    path.write_bytes(path.read_bytes() + path.read_bytes())
    assert refusal(tmp_path, RUN) == f"{path}, line 3: stands there twice; remove the line"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 2}, "seed is 1 there, 2 here"),
        ({"methods": ["q4"]}, 'methods is ["q4","q6"] there, ["q4"] here'),
        ({"files": {"squad": "f01"}}, 'files is {"squad":"f00"} there, {"squad":"f01"} here'),
        ({"facts": True}, "facts is null there, true here"),
        ({"bundle": "x" * 200}, f'bundle is "abc" there, "{"x" * 76}... here'),
    ],
)
def test_another_run_is_refused_by_the_field_that_differs(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    written(tmp_path, "1")
    expected = f"{tmp_path} holds another run: {says}; give another directory or the same options"
    assert refusal(tmp_path, RUN | changes) == expected


def test_a_field_that_the_run_no_longer_has_differs_too(tmp_path: Path) -> None:
    written(tmp_path, "1")
    assert "seed is 1 there, null here" in refusal(tmp_path, {name: RUN[name] for name in RUN if name != "seed"})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_description_of_the_run_is_one_line(tmp_path: Path, content: bytes) -> None:
    written(tmp_path, "1")
    (tmp_path / RUN_NAME).write_bytes(content)
    assert refusal(tmp_path, RUN).startswith(f"{tmp_path / RUN_NAME} is damaged (")


def test_results_that_nothing_describes_are_left_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "1")
    (tmp_path / RUN_NAME).unlink()
    assert "holds results.jsonl but no run.json" in refusal(tmp_path, RUN)
    assert path.stat().st_size


def test_two_evaluations_never_share_a_directory(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom scripts.evaluate.records import Results\n"
        f"results = Results.open(Path({str(tmp_path)!r}), {RUN!r})\nprint('open', flush=True)\nsys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin is not None
    assert other.stdout is not None
    with other:
        assert other.stdout.readline() == b"open\n"
        assert refusal(tmp_path, RUN) == f"{tmp_path} is in use by another evaluation"
        other.kill()
    Results.open(tmp_path, RUN).close()  # the lock died with its process


def test_a_refused_directory_is_let_go(tmp_path: Path) -> None:
    refusal(written(tmp_path, "1").parent, RUN | {"seed": 2})
    results = Results.open(tmp_path, RUN)
    results.close()
    results.close()
    Results.open(tmp_path, RUN).close()


def test_a_full_disk_is_one_line_and_leaves_no_half_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    left = [30]

    def write(handle: int, data: memoryview) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(handle, data[: left[0]])
        left[0] -= done
        return done

    path = written(tmp_path, "1")
    with Results.open(tmp_path, RUN) as results:
        size = path.stat().st_size
        monkeypatch.setattr(os, "write", write)
        with pytest.raises(ResultsInvalid, match=r"disk full while writing .*results\.jsonl: \d+ MB free") as caught:
            results.add(record("2"))
        assert "\n" not in str(caught.value)
        assert not results.has("squad", "2", "q4", ABOUT)
        assert path.stat().st_size == size
        monkeypatch.undo()
        results.add(record("2"))
    with Results.open(tmp_path, RUN) as results:
        assert len(results.records) == 2


def test_a_record_that_could_not_be_averaged_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with Results.open(tmp_path, RUN) as results:
        with pytest.raises(ResultsInvalid, match="1 of squad under q4: kl is nan"):
            results.add(record(kl=float("nan")))
        results.add(record())
        with pytest.raises(ValueError, match="squad 1 q4 is there already"):
            results.add(record())


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert refusal(tmp_path / "file" / "results", RUN).endswith("can't be written (Not a directory)")
    (tmp_path / "taken" / RESULTS_NAME).mkdir(parents=True)
    assert refusal(tmp_path / "taken", RUN).endswith("can't be written (Is a directory)")
