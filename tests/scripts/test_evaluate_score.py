"""Scores must be those of the official scripts, written here a second time as they stand there."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.evaluate.score import completeness, exact_match, normalised, token_f1

words = st.sampled_from(
    ["the", "a", "An", "pump", "Pump", "3", "3.1", "yes", "no", "noanswer", "-", "it's", "café", "\t"]
)
texts = st.lists(words, max_size=6).map(" ".join) | st.text(max_size=20)
references = st.lists(texts, min_size=1, max_size=3)


def official_normalisation(text: str) -> str:
    """evaluate-v1.1.py, step by step."""
    lowered = text.lower()
    kept = ""
    for character in lowered:
        if character not in set(string.punctuation):
            kept += character
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def official_f1(prediction: str, answer: str) -> float:
    """hotpot_evaluate_v1.py, and evaluate-v2.0.py where no token is left."""
    said, reference = official_normalisation(prediction), official_normalisation(answer)
    closed = ["yes", "no", "noanswer"]
    if (said in closed or reference in closed) and said != reference:
        return 0.0
    tokens, expected = said.split(), reference.split()
    if not tokens or not expected:
        return float(tokens == expected)
    same = 0
    for token in tokens:
        if token in expected:
            expected.remove(token)
            same += 1
    if same == 0:
        return 0.0
    precision, recall = same / len(tokens), same / len(reference.split())
    return 2 * precision * recall / (precision + recall)


@given(texts)
def test_normalisation_is_the_official_one(text: str) -> None:
    assert normalised(text) == official_normalisation(text)


@given(texts, references)
def test_f1_and_exact_match_are_the_official_ones(prediction: str, answers: list[str]) -> None:
    assert token_f1(prediction, answers) == pytest.approx(max(official_f1(prediction, each) for each in answers))
    same = any(official_normalisation(prediction) == official_normalisation(each) for each in answers)
    assert exact_match(prediction, answers) == float(same)


@given(texts, references)
def test_scores_stay_between_0_and_1_and_an_exact_match_has_all(prediction: str, answers: list[str]) -> None:
    scores = [score(prediction, answers) for score in (token_f1, completeness)]
    assert all(0 <= score <= 1 for score in scores)
    if exact_match(prediction, answers):
        assert scores == [1.0, 1.0]


@given(texts, references, texts)
def test_a_further_reference_never_lowers_a_score(prediction: str, answers: list[str], further: str) -> None:
    for score in (exact_match, token_f1, completeness):
        assert score(prediction, [*answers, further]) >= score(prediction, answers)


@given(references, texts, texts)
def test_an_answer_that_says_more_is_no_less_complete(answers: list[str], before: str, after: str) -> None:
    for answer in answers:
        assert completeness(f"{before} {answer} {after}", [answer]) in {0.0, 1.0}
        if normalised(answer):
            assert completeness(f"{before} {answer} {after}", [answer]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answers", "match", "f1", "complete"),
    [
        ("The Denver Broncos!", ["Denver Broncos"], 1, 1, 1),
        ("Broncos", ["Denver Broncos"], 0, 2 / 3, 1 / 2),
        ("It was the Denver Broncos.", ["Denver Broncos", "Carolina"], 0, 2 * 2 / 6, 1),
        ("a cat a cat", ["cat"], 0, 2 / 3, 1),
        ("yes, it is", ["yes"], 0, 0, 1),
        ("yes", ["yes it is"], 0, 0, 1 / 3),
        ("no", ["No."], 1, 1, 1),
        ("", ["Denver"], 0, 0, 0),
        ("The", ["a"], 1, 1, 1),
        ("5,400 kWh", ["5400 kwh"], 1, 1, 1),
    ],
)
def test_known_answers_have_known_scores(
    prediction: str, answers: list[str], match: float, f1: float, complete: float
) -> None:
    found = exact_match(prediction, answers), token_f1(prediction, answers), completeness(prediction, answers)
    assert found == pytest.approx((match, f1, complete))


@pytest.mark.parametrize("score", [exact_match, token_f1, completeness])
def test_without_references_there_is_no_score(score: Callable[[str, Sequence[str]], float]) -> None:
    with pytest.raises(ValueError, match="no reference"):
        score("anything", [])
