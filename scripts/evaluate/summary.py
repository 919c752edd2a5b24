"""What the records of a run come to: means with bootstrap intervals over contexts, sizes, rates. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from scipy.stats import bootstrap

from scripts.evaluate.records import Record

METRICS = (
    "exact_match",
    "f1",
    "completeness",
    "relevance",
    "fidelity",
    "self_f1",
    "answer_logprob",
    "gold_logprob",
    "kl",
    "agreement",
    "choice",
)
CONFIDENCE = 0.95
RESAMPLES = 2_000

_SEED = 0


class Estimate(Struct, frozen=True):
    """A mean over `count` items and its bootstrap interval of 95 %."""

    mean: float
    low: float
    high: float
    count: int


class Row(Struct, frozen=True, kw_only=True):
    """A method on a data set.

    A metric is None where no item has it; its count says how many have it, and these may differ between methods
    (there is no log-probability of an empty answer). bits_per_element: of all payloads over all elements of the whole
    caches; None where no entries are sent. ratio_fp16: of all that the caches take in fp16 over all payloads; None
    likewise. f1_per_mbit: mean F1 in percent over the mean payload in Mbit. correct_per_s: exact matches over
    the time from encoding to the last token. encode_s, decode_s, context_s, answer_s: means.
    """

    dataset: str
    method: str
    items: int
    exact_match: Estimate | None
    f1: Estimate | None
    completeness: Estimate | None
    relevance: Estimate | None
    fidelity: Estimate | None
    self_f1: Estimate | None
    answer_logprob: Estimate | None
    gold_logprob: Estimate | None
    kl: Estimate | None
    agreement: Estimate | None
    choice: Estimate | None
    bits_per_element: float | None
    ratio_fp16: float | None
    payload_bytes: int
    saved_bytes: int
    f1_per_mbit: float | None
    correct_per_s: float | None
    encode_s: float
    decode_s: float
    context_s: float
    answer_s: float


def rows(records: Sequence[Record], methods: Sequence[str]) -> tuple[Row, ...]:
    """A row for each data set, in order of appearance, and each method that was run on it, in the order of `methods`.

    Only items that all of these methods have done are counted, so that rows of a data set compare like with like.
    """
    counted = comparable(records, methods)
    found = []
    for dataset in dict.fromkeys(record.dataset for record in counted):
        for method in dict.fromkeys(methods):
            own = [record for record in counted if (record.dataset, record.method) == (dataset, method)]
            if own:
                found.append(_row(dataset, method, own))
    return tuple(found)


def comparable(records: Iterable[Record], methods: Iterable[str]) -> tuple[Record, ...]:
    """Those of `methods`, of items for which every method that was run on their data set is done."""
    asked = set(methods)
    wanted = [record for record in records if record.method in asked]
    done: dict[str, dict[str, set[str]]] = {}
    for record in wanted:
        done.setdefault(record.dataset, {}).setdefault(record.method, set()).add(record.item)
    shared = {dataset: set.intersection(*by_method.values()) for dataset, by_method in done.items()}
    return tuple(record for record in wanted if record.item in shared[record.dataset])


def paired(records: Iterable[Record], metric: str, method: str, baseline: str) -> Estimate:
    """The mean difference of a metric, method less baseline, over the items for which both have it.

    Raises ValueError if there is no such item.
    """
    values: dict[str, dict[tuple[str, str], float]] = {method: {}, baseline: {}}
    about: dict[tuple[str, str], str] = {}
    for record in records:
        value = getattr(record, metric)
        if record.method in values and value is not None:
            values[record.method][record.dataset, record.item] = value
            about[record.dataset, record.item] = record.context
    shared = [key for key in values[method] if key in values[baseline]]
    differences = [values[method][key] - values[baseline][key] for key in shared]
    contexts = [about[key] for key in shared]
    if not differences:
        raise ValueError(f"no item has {metric} under both {method} and {baseline}")
    return estimate(differences, contexts)


def paired_if_any(records: Iterable[Record], metric: str | None, method: str, baseline: str) -> Estimate | None:
    """The same; None for no metric, or if no item has it under both."""
    if metric is None:
        return None
    try:
        return paired(records, metric, method, baseline)
    except ValueError:
        return None


def estimate(values: Sequence[float], groups: Sequence[str] | None = None) -> Estimate:
    """The mean of at least one value, with its interval (percentile bootstrap, always the same resamples).

    groups: of each value; whole groups are drawn again, as questions on one context are not independent (None: each
    value by itself). Of one group, or of equal values, the interval is the mean itself.
    """
    data: NDArray[np.float64] = np.asarray(values, np.float64)
    mean = float(data.mean())
    if np.ptp(data) == 0:
        return Estimate(float(data[0]), float(data[0]), float(data[0]), len(data))
    _, members = np.unique(range(len(data)) if groups is None else list(groups), return_inverse=True)
    sums, counts = np.bincount(members, weights=data), np.bincount(members).astype(np.float64)
    if len(sums) == 1:
        return Estimate(mean, mean, mean, len(data))
    interval: Any = bootstrap(
        (sums, counts),
        _ratio,
        paired=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    # Of few values all resamples may lie to one side of the mean by a rounding error.
    return Estimate(mean, min(float(interval.low), mean), max(float(interval.high), mean), len(data))


def _ratio(sums: NDArray[np.float64], counts: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    found: NDArray[np.float64] = sums.sum(axis=axis) / counts.sum(axis=axis)
    return found


def _row(dataset: str, method: str, records: Sequence[Record]) -> Row:
    payload = sum(record.payload_bytes for record in records)
    elements = sum(record.elements for record in records)
    fp16 = sum(record.fp16_bytes for record in records)
    scored = [record for record in records if record.exact_match is not None]
    seconds = sum(record.encode_s + record.decode_s + record.context_s + record.answer_s for record in scored)
    metrics = {metric: _metric(records, metric) for metric in METRICS}
    f1, mbit = metrics["f1"], payload * 8e-6 / len(records)
    return Row(
        dataset=dataset,
        method=method,
        items=len(records),
        exact_match=metrics["exact_match"],
        f1=f1,
        completeness=metrics["completeness"],
        relevance=metrics["relevance"],
        fidelity=metrics["fidelity"],
        self_f1=metrics["self_f1"],
        answer_logprob=metrics["answer_logprob"],
        gold_logprob=metrics["gold_logprob"],
        kl=metrics["kl"],
        agreement=metrics["agreement"],
        choice=metrics["choice"],
        bits_per_element=8 * payload / elements if elements else None,
        ratio_fp16=fp16 / payload if elements else None,
        payload_bytes=payload,
        saved_bytes=fp16 - payload,
        f1_per_mbit=100 * f1.mean / mbit if f1 is not None and payload else None,
        correct_per_s=sum(record.exact_match or 0.0 for record in scored) / seconds if seconds > 0 else None,
        encode_s=_mean(record.encode_s for record in records),
        decode_s=_mean(record.decode_s for record in records),
        context_s=_mean(record.context_s for record in records),
        answer_s=_mean(record.answer_s for record in records),
    )


def _metric(records: Sequence[Record], metric: str) -> Estimate | None:
    having = [record for record in records if getattr(record, metric) is not None]
    values = [getattr(record, metric) for record in having]
    return estimate(values, [record.context for record in having]) if values else None


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
