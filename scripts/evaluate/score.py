"""How right an answer is against its references: exact match, token F1, completeness. All from 0 to 1.

Texts are normalised as SQuAD's official evaluate-v1.1.py does. From HotpotQA's official script comes the rule that
F1 between `yes`, `no` or `noanswer` and anything else is 0; it is applied to all sets and hardly matters to the others.
From SQuAD's evaluate-v2.0.py comes what to do when nothing is left of a text after
normalisation ("The"): it equals only another of which nothing is left, so that F1 is never below exact match.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_CLOSED = frozenset({"yes", "no", "noanswer"})


def normalised(text: str) -> str:
    """Lower case, without punctuation and English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers after normalisation, else 0.0. Raises ValueError without answers."""
    return _best(lambda said, reference: float(said == reference), prediction, answers)


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the bags of tokens, against the answer it is highest for. Raises ValueError without answers."""
    return _best(_f1, prediction, answers)


def completeness(prediction: str, answers: Sequence[str]) -> float:
    """The part of an answer's tokens that the prediction holds, for the answer it is highest for (Q-KVComm, IV-A).

    Raises ValueError without answers.
    """
    return _best(_recall, prediction, answers)


def _best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    if not answers:
        raise ValueError("no reference answer to score against")
    said = normalised(prediction)
    return max(score(said, normalised(answer)) for answer in answers)


def _f1(said: str, reference: str) -> float:
    if said != reference and (said in _CLOSED or reference in _CLOSED):
        return 0.0
    lengths = len(said.split()) + len(reference.split())
    return 2 * _shared(said, reference) / lengths if lengths else 1.0


def _recall(said: str, reference: str) -> float:
    tokens = len(reference.split())
    return _shared(said, reference) / tokens if tokens else float(not said)


def _shared(said: str, reference: str) -> int:
    return (Counter(said.split()) & Counter(reference.split())).total()
