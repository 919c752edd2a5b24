"""What results come to: E2E, deadlines and bytes by policy, and how policies and whole replays compare. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from scripts.replay.results import QuestionResult, Result

Floats = NDArray[np.float64]

FIXED = ("token", "kv")
UNANSWERED_S = 120.0
"""What a question counts at least that was answered under another policy only: so long a coordinator waits for an
answer. If one took longer, as long as that."""
RESAMPLES, CONFIDENCE, SEED = 2_000, 0.95, 0
DRAWN_AT_ONCE = 1_000_000
TIED = 0.02
"""E2E this close is one."""


class Figures(Struct, frozen=True, kw_only=True):
    """One policy over some questions.

    Seconds are of all questions that any policy answered, UNANSWERED_S for those that this one didn't; timed: questions
    with deadlines, missed: of these. off: median of |predicted / measured - 1|.
    kl: mean of the largest planned loss of each question, in nats. media: links sent as tokens, cache, split.
    """

    policy: str
    questions: int
    answered: int
    mean_s: float
    median_s: float
    p95_s: float
    timed: int
    missed: int
    sent_bytes: int
    fallbacks: int
    off: float | None
    kl: float
    media: tuple[int, int, int]


class Compared(Struct, frozen=True, kw_only=True):
    """All policies over the same questions.

    fixed: the fixed policy of the least mean; gain: how far `ours` is below it, as a share; best, best_p95: whether no
    policy is clearly below `ours`. lost: questions that nobody answered; missing: that were not asked under all, since
    a run failed.
    """

    name: str
    lost: int
    missing: int
    figures: tuple[Figures, ...]
    ours: str
    fixed: str | None
    gain: float | None
    best: bool
    best_p95: bool

    def of(self, policy: str) -> Figures | None:
        """A policy's."""
        return next((each for each in self.figures if each.policy == policy), None)


class Paired(Struct, frozen=True, kw_only=True):
    """The same questions under two.

    difference_s: mean in seconds, second less first; ratio: of the means; each with its 95 % interval by bootstrap over
    runs, and over the questions of each. With one run it tells how its questions scatter and nothing of other runs;
    with two or three it is still too narrow.
    """

    name: str
    questions: int
    first_s: float
    second_s: float
    difference_s: tuple[float, float, float]
    ratio: tuple[float, float, float]


def by_name(results: Iterable[Result], name: Callable[[Result], str], ours: str = "optimum") -> tuple[Compared, ...]:
    """Results grouped by a name, in order of appearance, and compared within each group."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if not result.error:
            groups.setdefault(name(result), []).append(result)
    return tuple(compared(title, group, ours) for title, group in groups.items())


def compared(name: str, results: Sequence[Result], ours: str = "optimum") -> Compared:
    """Policies over the questions that they have in common: the same number of the same run."""
    policies = list(dict.fromkeys(result.policy for result in results))
    table = {policy: dict(_questions(results, policy)) for policy in policies}
    common = [key for key in table[policies[0]] if all(key in rows for rows in table.values())]
    known = [key for key in common if any(rows[key].e2e_s is not None for rows in table.values())]
    answered_s = [seconds for rows in table.values() for key in known if (seconds := rows[key].e2e_s) is not None]
    lost_s = max([UNANSWERED_S, *answered_s])
    figures = tuple(_figures(policy, [table[policy][key] for key in known], lost_s) for policy in policies)
    means = {each.policy: each.mean_s for each in figures}
    p95s = {each.policy: each.p95_s for each in figures}
    fixed = min((policy for policy in FIXED if policy in means), key=means.__getitem__, default=None)
    has = ours in means and bool(known)
    return Compared(
        name=name,
        lost=len(common) - len(known),
        missing=len({key for rows in table.values() for key in rows}) - len(common),
        figures=figures,
        ours=ours,
        fixed=fixed,
        gain=1 - means[ours] / means[fixed] if has and fixed and means[fixed] > 0 else None,
        best=has and means[ours] <= min(means.values()) * (1 + TIED),
        best_p95=has and p95s[ours] <= min(p95s.values()) * (1 + TIED),
    )


def paired(name: str, runs: Iterable[Iterable[tuple[QuestionResult, QuestionResult]]]) -> Paired | None:
    """Of questions that both answered, as they came in each run; None without any.

    Policies over the same links and schedule are one run: they tell of the same outages.
    """
    answered = [
        [(one.e2e_s, other.e2e_s) for one, other in pairs if one.e2e_s is not None and other.e2e_s is not None]
        for pairs in runs
    ]
    values = [np.array(pairs, dtype=np.float64) for pairs in answered if pairs]
    if not values:
        return None
    means = _resampled_means(values)
    differences, ratios = means[:, 1] - means[:, 0], means[:, 1] / np.maximum(means[:, 0], 1e-9)
    one_s, other_s = np.concatenate(values).mean(axis=0).tolist()
    return Paired(
        name=name,
        questions=sum(map(len, values)),
        first_s=one_s,
        second_s=other_s,
        difference_s=(other_s - one_s, *_interval(differences)),
        ratio=(other_s / max(one_s, 1e-9), *_interval(ratios)),
    )


def replays_compared(first: Sequence[Result], second: Sequence[Result]) -> tuple[Paired, ...]:
    """Run by run of the same site, trace, device, policy and seed: of all together, then by policy."""
    before = {(result.key[:4], result.policy): result for result in first}
    both = [
        (before[result.key[:4], result.policy], result)
        for result in second
        if (result.key[:4], result.policy) in before
    ]
    found = []
    for policy in ("all", *dict.fromkeys(result.policy for _, result in both)):
        runs: dict[object, list[tuple[QuestionResult, QuestionResult]]] = {}
        for one, other in both:
            if policy in {"all", other.policy}:
                runs.setdefault(other.key[:4], []).extend(_same(one, other))
        each = paired(policy, runs.values())
        if each is not None:
            found.append(each)
    return tuple(found)


class Agreement(Struct, frozen=True, kw_only=True):
    """A live run beside its twin in virtual time.

    live_s, virtual_s: medians of E2E in seconds over the questions that both answered; ratio: of these, virtual ÷ live;
    paired: median over questions of that ratio.
    """

    name: str
    questions: int
    live_s: float
    virtual_s: float
    ratio: float
    paired: float


def agreement(results: Sequence[Result]) -> tuple[Agreement, ...]:
    """Every live run that has a twin, then all of them together."""
    twins = {(result.key[:4], result.policy): result for result in results if result.mode == "virtual"}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        twin = twins.get((result.key[:4], result.policy))
        if result.mode != "live" or twin is None:
            continue
        known = [
            (one.taken_e2e_s, other.taken_e2e_s)
            for one, other in _same(result, twin)
            if one.taken_e2e_s is not None and other.taken_e2e_s is not None
        ]
        pairs.setdefault(f"{result.trace or result.site}, {result.policy}", []).extend(known)
    rows = [*pairs.items(), ("all", [pair for each in pairs.values() for pair in each])]
    return tuple(_agreement(name, np.array(known)) for name, known in rows if known)


def _agreement(name: str, pairs: Floats) -> Agreement:
    live_s, virtual_s = np.median(pairs, axis=0).tolist()
    return Agreement(
        name=name,
        questions=len(pairs),
        live_s=live_s,
        virtual_s=virtual_s,
        ratio=virtual_s / live_s,
        paired=float(np.median(pairs[:, 1] / pairs[:, 0])),
    )


def cdf(results: Iterable[Result], policy: str) -> tuple[list[float], list[float]]:
    """E2E in rising order, and the share of questions at or below each; those that were not answered never come."""
    questions = [question for result in results if result.policy == policy for question in result.questions]
    e2e_s = sorted(question.e2e_s for question in questions if question.e2e_s is not None)
    return e2e_s, [(index + 1) / len(questions) for index in range(len(e2e_s))]


def _same(one: Result, other: Result) -> Iterator[tuple[QuestionResult, QuestionResult]]:
    """Questions of both, by number."""
    known = {question.number: question for question in one.questions}
    for question in other.questions:
        if question.number in known:
            yield known[question.number], question


def _questions(results: Sequence[Result], policy: str) -> Iterator[tuple[tuple[object, ...], QuestionResult]]:
    for result in results:
        if result.policy == policy:
            yield from (((*result.key, question.number), question) for question in result.questions)


def _figures(policy: str, questions: Sequence[QuestionResult], lost_s: float) -> Figures:
    seconds: Floats = np.array([lost_s if each.e2e_s is None else each.e2e_s for each in questions])
    off = [abs(each.predicted_s / each.taken_e2e_s - 1) for each in questions if each.taken_e2e_s and each.predicted_s]
    media = [link.medium for each in questions for link in each.links]
    losses = [each.kl for each in questions if each.links]
    return Figures(
        policy=policy,
        questions=len(questions),
        answered=sum(each.e2e_s is not None for each in questions),
        mean_s=float(seconds.mean()) if seconds.size else 0.0,
        median_s=float(np.median(seconds)) if seconds.size else 0.0,
        p95_s=float(np.percentile(seconds, 95)) if seconds.size else 0.0,
        timed=sum(each.deadline_s is not None for each in questions),
        missed=sum(each.missed for each in questions),
        sent_bytes=sum(each.sent_bytes for each in questions),
        fallbacks=sum(each.fallbacks for each in questions),
        off=float(np.median(off)) if off else None,
        kl=float(np.mean(losses)) if losses else 0.0,
        media=(media.count("tokens"), media.count("cache"), media.count("split")),
    )


def _resampled_means(runs: Sequence[Floats]) -> Floats:
    """(RESAMPLES, 2): runs are drawn anew with replacement, and in each of them its questions, which have one link and
    one fleet and are no independent witnesses.
    """
    dice = np.random.default_rng(SEED)
    sums = np.stack([_resampled_sums(dice, run) for run in runs])
    counts = np.array([len(run) for run in runs])
    drawn = dice.integers(len(runs), size=(RESAMPLES, len(runs)))
    rows = dice.integers(RESAMPLES, size=drawn.shape)
    means: Floats = sums[drawn, rows].sum(axis=1) / counts[drawn].sum(axis=1)[:, None]
    return means


def _resampled_sums(dice: np.random.Generator, run: Floats) -> Floats:
    """(RESAMPLES, 2), drawn in blocks: a run may have thousands of questions."""
    rows = max(1, DRAWN_AT_ONCE // len(run))
    sizes = [min(rows, RESAMPLES - at) for at in range(0, RESAMPLES, rows)]
    return np.concatenate([run[dice.integers(len(run), size=(size, len(run)))].sum(axis=1) for size in sizes])


def _interval(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)
