"""Made-up records of an evaluation."""

from __future__ import annotations

from typing import Any

from scripts.evaluate.records import Record

ABOUT = "0" * 16


def record(item: str = "1", method: str = "q4", dataset: str = "squad", **changes: Any) -> Record:
    """A record of a cache of 1,000 elements; `changes` are its other fields."""
    fields: dict[str, Any] = {
        "about": ABOUT,
        "context": item,
        "answer": "42",
        "exact_match": 1.0,
        "f1": 1.0,
        "completeness": 1.0,
        "relevance": 0.5,
        "fidelity": 0.9,
        "self_f1": 0.8,
        "answer_logprob": -0.5,
        "gold_logprob": -1.5,
        "kl": 0.01,
        "agreement": 0.95,
        "positions": 8,
        "context_tokens": 100,
        "elements": 1_000,
        "payload_bytes": 500,
        "fp16_bytes": 2_000,
        "facts_tokens": 0,
        "encode_s": 0.01,
        "decode_s": 0.02,
        "context_s": 0.0,
        "answer_s": 0.47,
        "choice": None,
    }
    return Record(item=item, method=method, dataset=dataset, **(fields | changes))
