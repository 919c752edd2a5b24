"""Facts of whole texts, without spaCy: they stand where they say, any text is read, libraries wait until needed."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.facts import ContentType, Extractor, Fact, content_type, summary, within
from edge_agent.facts.extractor import READ_CHARACTERS
from edge_agent.facts.keywords import BEST_CONFIDENCE, HALF_SCORE, Keywords, confidence

ROOT = Path(__file__).parents[2]
API = (
    "Authentication uses a bearer token. Call POST /v1/sessions with your client_id to get one; GET /v1/users/{id} "
    "returns a profile. The limit is 100 requests per minute, above it the server answers ERR_RATE_LIMIT. "
    "Version 2.1.3 of the API runs at https://api.example.org/v1 since 12 March 2024."
)
NAMES = (
    "On 4 March the painter Maria Lindqvist met Daniel Okafor of Helvar Energy at the Grand Hotel in New York. "
    "Their friend Elena Petrov, who had come from San Francisco, showed them a letter by John Stuart Mill."
)
PLAIN = (
    "Bread rises because yeast eats sugar and gives off gas. Kneading orders the gluten net; salt makes the gluten net "
    "tighter and slows the yeast down. A dough with a lot of water needs a tin or a basket."
)
EXTRACTOR = Extractor(spacy_model=None)


def _contents(text: str) -> set[str]:
    return {fact.content for fact in EXTRACTOR.extract(text)}


def _sound(text: str, facts: tuple[Fact, ...]) -> None:
    for fact in facts:
        assert " ".join(text[fact.start : fact.end].split()) == fact.content
        assert msgspec.convert(msgspec.to_builtins(fact), Fact) == fact
        assert fact.content.isprintable()
    assert "\n" not in summary(facts)


@pytest.mark.parametrize(
    ("text", "expected"), [(API, "technical"), (NAMES, "entities"), (PLAIN, "general"), ("", "general")]
)
def test_the_kind_of_a_text_is_told(text: str, expected: ContentType) -> None:
    assert content_type(text) == expected


def test_code_is_technical() -> None:
    assert content_type("def main():\n    return read_all(path) == {}\n\nmain();\nload_model();") == "technical"


def test_a_technical_text_yields_what_it_is_read_for() -> None:
    wanted = {"POST /v1/sessions", "GET /v1/users/{id}", "100 requests per minute", "ERR_RATE_LIMIT", "Version 2.1.3"}
    assert wanted | {"client_id", "12 March 2024", "https://api.example.org/v1"} <= _contents(API)


def test_a_text_with_names_yields_them() -> None:
    wanted = {
        "4 March",
        "Maria Lindqvist",
        "Daniel Okafor of Helvar Energy",
        "Grand Hotel",
        "New York",
        "John Stuart Mill",
    }
    assert wanted <= _contents(NAMES)


def test_a_plain_text_yields_keywords() -> None:
    keywords = {fact.content for fact in EXTRACTOR.extract(PLAIN) if fact.type == "keyword"}
    assert any("gluten net" in keyword for keyword in keywords)


def test_the_best_facts_of_a_report_fit_a_few_tokens() -> None:
    text = (ROOT / "scripts" / "demo" / "documents" / "site-north.txt").read_text(encoding="utf-8")
    line = summary(within(EXTRACTOR.extract(text), 48, lambda line: len(line.split()) * 14 // 10))
    for wanted in ("Maria Lindqvist", "Helvar Energy", "180 solar panels", "63 kW", "120 kWh"):
        assert wanted in line


@given(st.text(max_size=300))
def test_any_text_is_read_and_every_fact_stands_where_it_says(text: str) -> None:
    _sound(text, EXTRACTOR.extract(text))


PIECES = st.sampled_from(
    [
        "Ada",
        "Lovelace",
        "12",
        "kg",
        "/v1",
        "GET",
        "March",
        "1931",
        "\n\n",
        "\t",
        "\x00",
        "'",
        '"',
        ".",
        ", ",
        "İ",
        "ß",
        "版本",
        "é",
        "$",
        "%",
        "v2",
        "A-1",
    ]
)


@given(st.lists(st.tuples(PIECES, st.sampled_from(["", " ", "  ", "\n"])), max_size=60))
def test_any_mixture_of_what_facts_are_made_of_is_read(pieces: list[tuple[str, str]]) -> None:
    text = "".join(piece + gap for piece, gap in pieces)
    _sound(text, EXTRACTOR.extract(text))


@pytest.mark.parametrize("text", ["", " \n\t", "...", "?!", "\x00\x01", "—", "a", "$", "\u2028", "¿"])
def test_a_text_that_says_nothing_has_no_facts(text: str) -> None:
    assert EXTRACTOR.extract(text) == ()


@pytest.mark.parametrize(
    "piece",
    [
        "word ",
        "'",
        "a'",
        "no",
        "我们的服务器在三月四日停止工作。",
        "Ünïcode Wörd ",
        "abc\x00\x01 def\u200b ",
        "A. ",
        "\n",
        "1 kg ",
    ],
)
def test_200_kilobytes_of_anything_take_seconds(piece: str) -> None:
    text = (piece * 200_000)[:200_000]
    began = time.process_time()
    _sound(text, EXTRACTOR.extract(text))
    assert time.process_time() - began < 30


def test_only_the_beginning_of_a_long_text_is_read() -> None:
    text = "Nothing to see here. " * (READ_CHARACTERS // 20) + "Maria Lindqvist weighs 60 kg."
    assert "60 kg" not in _contents(text)
    assert "60 kg" in _contents(text[-1000:])


def test_equal_texts_give_equal_facts_in_any_number_of_threads() -> None:
    extractor = Extractor(spacy_model=None)
    texts, found = [API, NAMES, PLAIN] * 4, {}

    def read(index: int) -> None:
        found[index] = extractor.extract(texts[index])

    threads = [threading.Thread(target=read, args=(index,)) for index in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(len(texts))] == [EXTRACTOR.extract(text) for text in texts]


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_lower_score_of_yake_is_more_confidence(one: float, other: float) -> None:
    assert 0 <= confidence(one) <= BEST_CONFIDENCE
    assert one > other or confidence(one) >= confidence(other)


def test_scores_of_yake_at_their_ends() -> None:
    assert confidence(0.0) == confidence(-1.0) == BEST_CONFIDENCE
    assert confidence(HALF_SCORE) == pytest.approx(BEST_CONFIDENCE / 2)
    assert confidence(float("nan")) == confidence(float("inf")) == 0


def test_where_yake_fails_nothing_of_the_text_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import yake.core.yake  # noqa: PLC0415

    keywords = Keywords()
    assert keywords.find(PLAIN)

    def fail(**arguments: object) -> None:
        raise ValueError("odd")

    monkeypatch.setattr(yake.core.yake, "DataCore", fail)
    with caplog.at_level(logging.DEBUG):
        assert keywords.find(PLAIN) == []
    assert "Bread" not in caplog.text


def test_importing_and_making_an_extractor_loads_neither_yake_nor_spacy() -> None:
    program = (
        "import sys, edge_agent.facts as facts\n"
        "extractor = facts.Extractor()\n"
        "extractor.extract(' ')\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'yake', 'spacy', 'networkx', 'torch'}), extractor.note)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"
