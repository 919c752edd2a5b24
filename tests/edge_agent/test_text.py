"""Text to ids and back, and an answer that grows piece by piece."""

from __future__ import annotations

import random
from functools import cache

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_agent.errors import ContextEmpty
from edge_agent.model.manifest import Manifest, read_manifest
from edge_agent.model.text import AnswerText, Text
from tests import tiny

EOS = 0


@cache
def manifest() -> Manifest:
    return read_manifest(tiny.tiny_bundle())


@cache
def text() -> Text:
    return Text(tiny.tiny_bundle(), manifest())


def answer(*stop: str) -> AnswerText:
    """An empty answer that ends at these strings."""
    prompt = msgspec.structs.replace(manifest().prompt, stop=stop)
    return AnswerText(text(), msgspec.structs.replace(manifest(), prompt=prompt))


@given(st.text())
def test_ids_give_the_text_back(written: str) -> None:
    assert text().decode(text().ids(written)) == written


@given(st.text(min_size=1))
def test_a_context_has_the_same_ids_whatever_space_is_around_it(written: str) -> None:
    if written.strip():
        assert text().context_ids(f" \n{written.strip()}\n\n") == text().context_ids(written)
        assert text().decode(text().context_ids("x")) == "\nPassage: x\n"


@given(st.lists(st.text(alphabet="abc?{}", min_size=1), min_size=1))
def test_a_question_is_one_line_whatever_was_typed(words: list[str]) -> None:
    ids = text().question_ids(" \n\t ".join(words))
    assert ids == text().question_ids(" ".join(words))
    assert text().decode(ids) == f"Question: {' '.join(words)}\nAnswer:"


@given(st.text())
@example("Der Füllstand fiel auf 0,5 °C — 🙂\n\nRelay 7:\tgeschlossen\r\nEnde")
@example("東京の\u3000ポンプ\u2028が止まった\x00.")
@example("e\u0301 is not é, and ﬁ not fi")
@example("\nPassage: one\n\nPassage: two\n")
@example("{text} {facts} {}")
def test_the_text_of_a_context_is_the_one_that_its_ids_were_made_of(written: str) -> None:
    if written.strip():
        taken = written.strip()
        assert text().context_text(text().context_ids(written)) == taken


@pytest.mark.parametrize("blank", ["", " ", "\n\t ", "\u2028"])
def test_no_facts_take_no_place_in_the_prompt(blank: str) -> None:
    assert text().facts_ids(blank) == []


@given(st.text())
@example("Karl Voss;\n1931\r\n\u2028214 metres\x85 ")
@example("{facts}; {0}; 🙂")
def test_facts_are_one_line_of_the_prompt_whatever_they_hold(facts: str) -> None:
    line = " ".join(facts.split())
    if line:
        told = text().decode(text().facts_ids(facts))
        assert told == manifest().prompt.facts_format.format(facts=line)
        assert len(told.splitlines()) == 1
        assert text().facts_ids(facts) == text().facts_ids(line)


def test_facts_stand_as_in_the_examples_of_the_prompt() -> None:
    told = text().decode(text().facts_ids("Lenn bridge; Karl Voss; 1931; 214 metres"))
    assert told == "Facts: Lenn bridge; Karl Voss; 1931; 214 metres\n"
    assert told in manifest().prompt.prefix


@pytest.mark.parametrize("blank", ["", " ", "\n\t "])
def test_blank_contexts_and_questions_are_refused(blank: str) -> None:
    with pytest.raises(ContextEmpty, match="the context is empty"):
        text().context_ids(blank)
    with pytest.raises(ContextEmpty, match="the question is empty"):
        text().question_ids(blank)


def test_the_prefix_in_the_manifest_is_the_tokenizers_own() -> None:
    assert tuple(text().ids(manifest().prompt.prefix)) == manifest().prompt.prefix_ids


@given(st.lists(st.integers(0, 2**31 - 1), max_size=9), st.lists(st.integers(0, 2**31 - 1), max_size=9))
def test_context_ids_differ_exactly_when_token_ids_do(one: list[int], other: list[int]) -> None:
    assert (text().context_id(one) == text().context_id(other)) == (one == other)


def test_the_context_id_depends_on_model_and_prefix() -> None:
    other_model = Text(tiny.tiny_bundle(), msgspec.structs.replace(manifest(), fingerprint="f" * 32))
    prompt = msgspec.structs.replace(manifest().prompt, version=manifest().prompt.version + 1)
    other_prefix = Text(tiny.tiny_bundle(), msgspec.structs.replace(manifest(), prompt=prompt))
    ids = text().context_ids("The pump stopped.")
    assert len({each.context_id(ids) for each in (text(), other_model, other_prefix)}) == 3


@given(st.integers(0, 2**32))
def test_the_pieces_of_an_answer_are_the_answer(seed: int) -> None:
    dice = random.Random(seed)
    growing, pieces = answer("\n"), list[str]()
    ids = [dice.randrange(1, tiny.VOCABULARY) for _ in range(40)]
    for token in ids:
        pieces.append(growing.take(token))
        assert "\n" not in pieces[-1]
        if growing.finished:
            break
    whole = text().decode(ids[: len(pieces)])
    assert growing.finished == ("\n" in whole)
    assert "".join(pieces) == whole.split("\n")[0].rstrip("\ufffd")
    assert "".join(pieces).strip() == growing.answer
    assert growing.ids == ids[: len(pieces)]


def test_half_a_character_waits_for_its_other_half() -> None:
    growing, said = answer("\n"), list[str]()
    for token in text().ids("5 °C — 🙂"):
        said.append(growing.take(token))
    assert "".join(said) == "5 °C — 🙂"
    assert not any("\ufffd" in piece for piece in said)
    assert "" in said  # the emoji has four bytes that the tiny tokenizer knows one by one


def test_an_answer_that_ends_in_half_a_character_is_told_without_it() -> None:
    growing = answer("\n")
    said = "".join(growing.take(token) for token in text().ids("dry 🙂")[:-1])
    assert said.strip() == growing.answer == "dry"


def test_the_first_of_several_stops_ends_the_answer() -> None:
    growing = answer("END", "\n")
    for token in text().ids("the valve END or\nnot"):
        growing.take(token)
        if growing.finished:
            break
    assert growing.finished
    assert growing.answer == "the valve"


def test_the_end_of_sequence_is_no_part_of_the_answer() -> None:
    growing = answer("\n")
    for token in text().ids("dry"):
        growing.take(token)
    assert growing.take(EOS) == ""
    assert growing.finished
    assert growing.answer == "dry"
    assert EOS not in growing.ids
