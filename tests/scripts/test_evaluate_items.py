"""Questions are read from every format they come in; what can't be asked is named and skipped, never fatal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import scripts.evaluate
from scripts.evaluate.errors import DataInvalid
from scripts.evaluate.items import MAX_CHARACTERS, WHICH, Item, Read, drawn, read_items
from tests.shared_data import shared_data

SITE = Path(scripts.evaluate.__file__).parent / "questions" / "site.jsonl"
GOOD: dict[str, Any] = {
    "id": "1",
    "dataset": "x",
    "context": "The pump has 3 valves.",
    "question": "How many?",
    "answers": ["3"],
}
BEES = [["Bees", ["Bees fly. ", " They hum."]], ["Wax", ["Wax melts."]]]

Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: bytes) -> Path:
        path = tmp_path / "questions.any"
        path.write_bytes(content)
        return path

    return write


def lines(*objects: Any) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in objects)


def squad(*articles: Any) -> dict[str, Any]:
    return {"version": "v2.0", "data": list(articles)}


def article(*questions: Any, context: Any = "Water boils.") -> dict[str, Any]:
    return {"title": "t", "paragraphs": [{"context": context, "qas": list(questions)}]}


def reasons(read: Read) -> list[tuple[str, str]]:
    return [(skipped.place, skipped.reason) for skipped in read.skipped]


def test_our_own_lines_are_read_and_further_fields_ignored(write: Write) -> None:
    path = write(lines(GOOD | {"title": 5}, GOOD | {"id": "2", "answers": ["3", "three", "3", " "]}))
    read = read_items(path)
    assert (read.dataset, read.skipped) == ("questions", ())
    assert read.items == (
        Item(id="1", dataset="questions", context=GOOD["context"], question="How many?", answers=("3",)),
        Item(id="2", dataset="questions", context=GOOD["context"], question="How many?", answers=("3", "three")),
    )


@pytest.mark.parametrize("layout", [{}, {"indent": 2}])
def test_squads_own_json_is_read_with_questions_that_have_no_answer(write: Write, layout: dict[str, Any]) -> None:
    answered = {"id": "a", "question": "What boils?", "answers": [{"text": "Water", "answer_start": 0}] * 2}
    impossible = {"id": "b", "question": "What freezes?", "answers": [], "is_impossible": True}
    read = read_items(write(json.dumps(squad(article(answered, impossible), article()), **layout).encode()))
    assert [(item.id, item.context, item.answers) for item in read.items] == [
        ("a", "Water boils.", ("Water",)),
        ("b", "Water boils.", ()),
    ]


def test_hotpotqa_paragraphs_become_title_and_text(write: Write) -> None:
    own = [{"_id": "h", "question": "Who hums?", "answer": "Bees", "context": BEES, "type": "bridge"}]
    hugging_face = {
        "id": "h",
        "question": "Who hums?",
        "answer": "Bees",
        "context": {"title": [title for title, _ in BEES], "sentences": [sentences for _, sentences in BEES]},
    }
    expected = [("h", "Bees: Bees fly. They hum.\n\nWax: Wax melts.", ("Bees",))]
    for content in (json.dumps(own).encode(), lines(hugging_face), lines(hugging_face, 5)):
        assert [(i.id, i.context, i.answers) for i in read_items(write(content)).items] == expected


def test_hugging_faces_lines_of_squad_are_read(write: Write) -> None:
    found = read_items(write(lines(GOOD | {"answers": {"text": ["3", "3"], "answer_start": [13, 13]}}))).items
    assert [item.answers for item in found] == [("3",)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": None}, "id is missing"),
        ({"id": 7}, "id is not a text"),
        ({"id": "0"}, "id '0' stands there twice"),
        ({"context": ""}, "context is empty"),
        ({"context": None}, "context is missing"),
        ({"context": 5}, "context is neither a text nor a list of titles and sentences"),
        ({"context": [["Title", "not a list"]]}, "context is neither a text nor a list of titles and sentences"),
        ({"context": {"title": ["a"], "sentences": []}}, "context has titles and sentences that don't match"),
        ({"context": []}, "context is empty"),
        ({"question": " \n"}, "question is empty"),
        ({"question": ["?"]}, "question is not a text"),
        ({"question": "?" * (MAX_CHARACTERS + 1)}, "question has 1,000,001 characters; at most 1,000,000 are taken"),
        ({"answers": 3}, "answers are not a list"),
        ({"answers": [3]}, "an answer is not a text"),
        ({"answers": [{"start": 3}]}, "an answer is not a text"),
        ({"answers": ["3" * (MAX_CHARACTERS + 1)]}, "an answer has more than 1,000,000 characters"),
    ],
)
def test_a_line_that_cannot_be_asked_is_skipped_by_its_number(
    write: Write, changes: dict[str, Any], reason: str
) -> None:
    read = read_items(write(lines(GOOD | {"id": "0"}) + b"\r\n" + lines(GOOD | changes, GOOD | {"id": "2"})))
    assert reasons(read) == [("line 3", reason)]
    assert [item.id for item in read.items] == ["0", "2"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "1", "context": ', "is not JSON (Input data was truncated)"),
        (b'{"id": "caf\xe9"}', "is not UTF-8"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"x":' * 100_000, "is nested too deeply"),
        (b"[1, 2]", "is not an object"),
        (b'{"id": "\\ud800 "}', "is not JSON"),
    ],
)
def test_a_line_that_is_no_object_is_skipped_wherever_it_stands(write: Write, line: bytes, reason: str) -> None:
    for content, place in [(line + b"\n" + lines(GOOD), "line 1"), (lines(GOOD) + line, "line 2")]:
        read = read_items(write(content))
        assert len(read.items) == 1
        assert [(where, why[: len(reason)]) for where, why in reasons(read)] == [(place, reason)]


@pytest.mark.parametrize("answers", [{}, {"answers": None}, {"answers": []}, {"answers": [" "]}])
def test_a_question_without_references_is_kept(write: Write, answers: dict[str, Any]) -> None:
    bare = {name: value for name, value in GOOD.items() if name != "answers"}
    assert read_items(write(lines(bare | answers))).items[0].answers == ()


def test_what_is_wrong_within_squads_json_is_named_by_item(write: Write) -> None:
    good = {"id": "a", "question": "What boils?", "answers": []}
    broken = squad(3, {"paragraphs": [4]}, article(good, 5, good), article(good | {"id": "b"}, context=6))
    assert reasons(read_items(write(json.dumps(broken).encode()))) == [
        ("item 1", "belongs to an article without a list of paragraphs"),
        ("item 2", "belongs to a paragraph without a list of questions"),
        ("item 4", "is not an object"),
        ("item 5", "id 'a' stands there twice"),
        ("item 6", "context is neither a text nor a list of titles and sentences"),
    ]


def test_a_byte_order_mark_and_unusual_line_ends_do_no_harm(write: Write) -> None:
    odd = GOOD | {"context": "line\u2028separator"}
    content = b"\xef\xbb\xbf" + json.dumps(odd, ensure_ascii=False).encode() + b"\r\n\r\n"
    assert read_items(write(content)).items[0].context == odd["context"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"5", "is of no known format"),
        (b'{"version": "1.1"}', "is of no known format"),
        (b"[]", r"has no question that could be asked \(it holds none\)"),
        (b'{"data": []}', r"has no question that could be asked \(it holds none\)"),
        (b"time_s,bandwidth_bps\n0,1\n", r"has no question that could be asked \(line 1: is not JSON"),
        (lines(GOOD | {"context": ""}), r"has no question that could be asked \(line 1: context is empty\)"),
        ("{}".encode("utf-16"), r"has no question that could be asked \(line 1: is not JSON"),
        (bytes(range(256)), "has no question that could be asked"),
    ],
)
def test_a_file_without_any_question_is_refused_with_one_line(write: Write, content: bytes, says: str) -> None:
    path = write(content)
    with pytest.raises(DataInvalid, match=says) as caught:
        read_items(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="No such file"):
        read_items(tmp_path / "absent.jsonl")
    with pytest.raises(DataInvalid, match="Is a directory"):
        read_items(tmp_path)


@given(
    content=st.binary(max_size=200)
    | st.lists(st.sampled_from([lines(GOOD), b"{", b"\xff\n", b"[", b"]"])).map(b"".join)
)
def test_no_content_raises_anything_but_the_one_error(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    with suppress(DataInvalid):
        assert read_items(path).items


ITEMS = tuple(Item(id=str(number), dataset="x", context="c", question="q") for number in range(50))


@given(st.integers(0, 60), st.integers(0, 60), st.integers())
def test_a_draw_keeps_the_order_repeats_nothing_and_holds_every_smaller_draw(few: int, many: int, seed: int) -> None:
    few, many = sorted((few, many))
    chosen = drawn(ITEMS, many, seed)
    assert len(chosen) == min(many, len(ITEMS))
    assert list(chosen) == sorted(set(chosen), key=ITEMS.index)
    assert set(drawn(ITEMS, few, seed)) <= set(chosen)


def test_a_draw_depends_on_its_seed_alone() -> None:
    assert drawn(ITEMS, None, 1) == ITEMS
    assert drawn(ITEMS, 5, 1) != drawn(ITEMS, 5, 2)
    with pytest.raises(ValueError, match="-1 items can't be drawn"):
        drawn(ITEMS, -1, 1)
    program = (
        "from scripts.evaluate.items import Item, drawn\n"
        "items = [Item(id=str(n), dataset='x', context='c', question='q') for n in range(50)]\n"
        "print(*(item.id for item in drawn(items, 5, 7)))"
    )
    said = {
        subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True)
        .stdout.decode()
        .split()[0:5]
        .__repr__()
        for seed in ("0", "1")
    }
    assert said == {repr([item.id for item in drawn(ITEMS, 5, 7)])}


def test_the_products_own_questions_can_all_be_asked() -> None:
    read = read_items(SITE)
    assert read.skipped == ()
    assert len(read.items) >= 24
    for item in read.items:
        assert 80 <= len(item.context.split()) <= 200
        assert any(answer.lower() in item.context.lower() for answer in item.answers), item.id


@pytest.mark.parametrize(("name", "count"), [("squad", 300), ("hotpotqa", 150), ("narrativeqa", 100), ("gsm8k", 100)])
def test_the_shared_question_sets_are_read_whole(name: str, count: int) -> None:
    read = read_items(shared_data() / f"{name}.jsonl")
    assert (read.dataset, len(read.items), read.skipped) == (name, count, ())
    assert all(item.answers for item in read.items)


@pytest.mark.parametrize(("name", "why"), [("calibration", "context is missing")])
def test_shared_sets_without_contexts_or_questions_are_refused(name: str, why: str) -> None:
    with pytest.raises(DataInvalid, match=why):
        read_items(shared_data() / f"{name}.jsonl")


CHOICE = {"id": "1", "context": "", "question": "What boils?", "choices": ["ice", "water"], "answer_index": 1}


def test_multiple_choice_without_a_context_has_its_question_for_one(write: Write) -> None:
    alone, beside = read_items(write(lines(CHOICE, CHOICE | {"id": "2", "context": "It is hot."}))).items
    assert (alone.context, alone.question) == ("What boils?", WHICH)
    assert (beside.context, beside.question) == ("It is hot.", "What boils?")
    assert (alone.choices, alone.right) == (("ice", "water"), 1)
    assert alone.about != msgspec.structs.replace(alone, choices=("ice", "steam")).about


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer_index": 2}, "answer_index 2 is none of its 2 choices"),
        ({"answer_index": -1}, "answer_index -1 is none of its 2 choices"),
        ({"answer_index": None}, "choices are not a list of texts with an answer_index"),
        ({"choices": ["ice", 5]}, "choices are not a list of texts with an answer_index"),
        ({"choices": ["ice"]}, "has 1 choices, or a blank one; 2 to 64 are taken"),
        ({"choices": ["ice", " "]}, "has 2 choices, or a blank one; 2 to 64 are taken"),
    ],
)
def test_choices_that_make_no_sense_are_skipped(write: Write, changes: dict[str, Any], reason: str) -> None:
    read = read_items(write(lines(CHOICE, CHOICE | {"id": "2"} | changes)))
    assert reasons(read) == [("line 2", reason)]
