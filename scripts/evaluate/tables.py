"""The summary as Markdown tables. Scores are in percent, intervals of 95 % in brackets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from msgspec import Struct

from scripts.evaluate.method import FACTS
from scripts.evaluate.records import Record
from scripts.evaluate.recovery import Recovery
from scripts.evaluate.summary import Estimate, Row, paired_if_any

_NONE = "–"
_Of = TypeVar("_Of", Row, Recovery)


class PaperRow(Struct, frozen=True):
    """A row of Q-KVComm's Table I: dataset as in our names, target bits, and what it reports."""

    dataset: str
    bits: int
    relevance: float
    coherence: float
    ratio: float
    saved_mb: float


TABLE_1 = (
    PaperRow("squad", 4, 0.707, 0.925, 6.93, 1997.2),
    PaperRow("squad", 6, 0.727, 0.935, 5.68, 1928.0),
    PaperRow("squad", 8, 0.743, 0.943, 5.06, 1858.8),
    PaperRow("hotpot", 4, 0.352, 0.777, 6.93, 5233.4),
    PaperRow("hotpot", 6, 0.392, 0.782, 5.69, 5052.0),
    PaperRow("hotpot", 8, 0.402, 0.797, 5.07, 4870.6),
    PaperRow("narrativeqa", 4, 0.656, 0.937, 6.93, 2624.6),
    PaperRow("narrativeqa", 6, 0.696, 0.943, 5.69, 2533.6),
    PaperRow("narrativeqa", 8, 0.699, 0.957, 5.06, 2442.7),
)


def quality(rows: Sequence[Row]) -> str:
    """What each method keeps of the answers, a table for each data set."""
    head = ["method", "bits/element", "× fp16", "EM", "F1", "completeness"]
    head += ["relevance", "fidelity", "KL, nats", "agreement"]
    chosen = any(row.choice is not None for row in rows)
    return _by_dataset(
        rows,
        [*head, "right choice"] if chosen else head,
        lambda row: (
            row.method,
            _number(row.bits_per_element, 2),
            _number(row.ratio_fp16, 2),
            *map(_percent, (row.exact_match, row.f1, row.completeness)),
            *(_shown(each, "{:z.3f}".format) for each in (row.relevance, row.fidelity)),
            _shown(row.kl, kl_text),
            _shown(row.agreement, "{:z.3f}".format),
            *([_percent(row.choice)] if chosen else []),
        ),
    )


def costs(rows: Sequence[Row]) -> str:
    """What each method sends and how long it takes, a table for each data set. Bytes and times are means of an item."""
    head = ["method", "kB sent", "saved in all, MB", "F1 % per Mbit", "correct/s"]
    head += ["encode, ms", "decode, ms", "context, ms", "answer, ms"]
    return _by_dataset(
        rows,
        head,
        lambda row: (
            row.method,
            f"{row.payload_bytes / row.items / 1e3:,.1f}",
            f"{row.saved_bytes / 1e6:,.1f}",
            _number(row.f1_per_mbit, 2),
            _number(row.correct_per_s, 3),
            *(f"{1e3 * took_s:,.1f}" for took_s in (row.encode_s, row.decode_s, row.context_s, row.answer_s)),
        ),
    )


def facts(records: Sequence[Record]) -> str:
    """What facts add to each method that was run with and without them: paired differences over the same items."""
    ran = dict.fromkeys((record.dataset, record.method) for record in records)
    lines = []
    for dataset, method in ran:
        if (dataset, method + FACTS) not in ran:
            continue
        own = [record for record in records if record.dataset == dataset]
        f1, match, gold = (
            paired_if_any(own, metric, method + FACTS, method) for metric in ("f1", "exact_match", "gold_logprob")
        )
        items = {record.item for record in own if record.method == method}
        items &= {record.item for record in own if record.method == method + FACTS}
        points = "{:+z.1f}".format
        shown = _shown(f1, points, 100), _shown(match, points, 100), _shown(gold, "{:+z.3f}".format)
        lines.append((dataset, method, str(len(items)), *shown))
    if not lines:
        return "No method was run both with and without facts.\n"
    return _table(("data set", "method", "items", "F1, points", "EM, points", "log p of the reference, nats"), lines, 2)


def backfill(found: Sequence[Recovery]) -> str:
    """What each eviction loses of the answers, and what backfill gives back of that: a table for each data set."""
    scored = [each.f1_recovery for each in found if each.f1_recovery is not None]
    chosen = [each.choice_recovery for each in found if each.choice_recovery is not None]
    head = ["method", "kept", "KL, nats: damage", "recovery"]
    head += ["F1, points: damage", "recovery"] if scored else []
    head += ["right choice, points: damage", "recovery"] if chosen else []
    nats, points = "{:+z.3f}".format, "{:+z.1f}".format
    return _by_dataset(
        found,
        head,
        lambda each: (
            each.method.backfilled,
            f"{100 * each.method.share:g} %",
            _shown(each.kl_damage, "{:z.3f}".format),
            _shown(each.kl_recovery, nats),
            *((_shown(each.f1_damage, points, 100), _shown(each.f1_recovery, points, 100)) if scored else ()),
            *((_shown(each.choice_damage, points, 100), _shown(each.choice_recovery, points, 100)) if chosen else ()),
        ),
    )


def paper(rows: Sequence[Row]) -> str:
    """Q-KVComm's Table I beside our figures for the same pipeline, with and without facts.

    The paper's ratio is against a size it does not state, ours against fp16 with every header counted. Its coherence
    is a heuristic on length and structure; the answer's log-probability under the uncompressed model stands for it.
    """
    head = ["data set", "method", "relevance, paper", "ours", "coherence, paper", "log p of the answer, ours"]
    head += ["ratio, paper", "ours, × fp16", "saved MB, paper", "ours", "KL, nats", "F1"]
    lines = [
        (
            row.dataset,
            row.method,
            f"{theirs.relevance:.3f}",
            _shown(row.relevance, "{:z.3f}".format),
            f"{theirs.coherence:.3f}",
            _shown(row.answer_logprob, "{:z.3f}".format),
            f"{theirs.ratio:.2f}",
            _number(row.ratio_fp16, 2),
            f"{theirs.saved_mb:,.1f}",
            f"{row.saved_bytes / 1e6:,.1f}",
            _shown(row.kl, kl_text),
            _percent(row.f1),
        )
        for row in rows
        if (theirs := _of_the_paper(row)) is not None
    ]
    if not lines:
        return "Nothing of the paper's Table I was run.\n"
    return _table(head, lines, 2)


def in_paper(row: Row) -> bool:
    """Whether the paper's Table I has this data set and width."""
    return _of_the_paper(row) is not None


def _of_the_paper(row: Row) -> PaperRow | None:
    method = row.method.removesuffix(FACTS)
    fitting = (theirs for theirs in TABLE_1 if theirs.dataset in row.dataset.lower())
    return next((theirs for theirs in fitting if method == f"qkvcomm-{theirs.bits}"), None)


def kl_text(kl: float) -> str:
    """A KL divergence in nats, as the ladder's table shows it."""
    return f"{kl:.5f}" if kl >= 1e-5 or kl == 0 else f"{kl:.0e}"


def _by_dataset(rows: Sequence[_Of], head: Sequence[str], cells: Callable[[_Of], Sequence[str]]) -> str:
    parts = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        own = [row for row in rows if row.dataset == dataset]
        parts.append(f"**{_cell(dataset)}**, {own[0].items} items\n\n{_table(head, [cells(row) for row in own], 1)}")
    return "\n".join(parts)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], names: int) -> str:
    """names: how many columns hold names, to the left; the others hold figures, to the right."""
    rules = ["---"] * names + ["--:"] * (len(head) - names)
    escaped = ([_cell(cell) for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rules, *escaped))


def _cell(text: str) -> str:
    """A text that ends neither its cell nor its line."""
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: float | None, decimals: int) -> str:
    return _NONE if value is None else f"{value:,.{decimals}f}"


def _percent(found: Estimate | None) -> str:
    return _shown(found, "{:z.1f}".format, 100)


def _shown(found: Estimate | None, text: Callable[[float], str], scale: float = 1) -> str:
    """An estimate as `mean (low–high)`; only the mean where the interval is no wider than a point."""
    if found is None:
        return _NONE
    mean, low, high = (text(scale * value) for value in (found.mean, found.low, found.high))
    if low == high:
        return mean
    return f"{mean} ({low}{' to ' if low.startswith(('-', '+')) else '–'}{high})"
