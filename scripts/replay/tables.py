"""What replays came to, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scripts.replay.findings import UNANSWERED_S, Agreement, Compared, Figures, Paired, by_name
from scripts.replay.results import Result

MEGABYTE = 1e6
OWN = "as the site has them"
CAPTION = (
    "Seconds from a question's acceptance to its first token, over the questions that any policy answered; one that "
    f"another policy answered and this one didn't counts {UNANSWERED_S:g} s. Gain: the mean of {{ours}} below that of "
    "the better fixed policy (token, kv).\n"
)


def result_lines(results: Sequence[Result], ours: str) -> list[str]:
    """By trace, by device where there are several, all together; runs that failed."""
    tables = [("trace", by_name(results, lambda result: result.trace or "own links", ours))]
    for title, of in (("device", lambda result: result.device or OWN), ("site", lambda result: result.site)):
        groups = by_name(results, of, ours)
        if len(groups) > 1:
            tables.append((title, groups))
    everything = by_name(results, lambda _: "all", ours)
    policies = list(dict.fromkeys(result.policy for result in results if not result.error))
    lines = [CAPTION.format(ours=ours)]
    for title, groups in tables:
        lines += [*_table(title, [*groups, *(everything if title == "trace" else ())], policies), ""]
    for title, groups in tables[:1]:
        lines += [*_details(title, [*groups, *everything], policies), ""]
    lines += [
        f"- {result.trace or result.site}, {result.device or OWN}, {result.policy}, seed {result.seed}: {result.error}"
        for result in results
        if result.error
    ]
    return lines


def _table(title: str, groups: Sequence[Compared], policies: Sequence[str]) -> Iterator[str]:
    """Mean, p95, missed deadlines and megabytes of every policy; what is best stands bold."""
    yield f"| {title} | " + " | ".join(f"{policy}: mean / p95, s" for policy in policies) + " | gain | misses | MB |"
    yield "|---|" + "--:|" * (len(policies) + 3)
    for group in groups:
        known = [figures for policy in policies if (figures := group.of(policy)) is not None]
        gain = "–" if group.gain is None else f"{100 * group.gain:.0f} %"
        misses = " / ".join(str(figures.missed) for figures in known)
        sent = " / ".join(f"{figures.sent_bytes / MEGABYTE:.0f}" for figures in known)
        cells = " | ".join(_seconds(figures, known) for figures in known)
        yield f"| {group.name} | {cells} | {gain} | {misses} | {sent} |"


def _seconds(figures: Figures, known: Sequence[Figures]) -> str:
    def shown(value: float, least: float) -> str:
        text = f"{value:.2f}"
        return f"**{text}**" if text == f"{least:.2f}" else text

    mean = shown(figures.mean_s, min(each.mean_s for each in known))
    p95 = shown(figures.p95_s, min(each.p95_s for each in known))
    return f"{mean} / {p95}"


def _details(title: str, groups: Sequence[Compared], policies: Sequence[str]) -> Iterator[str]:
    """Of each policy: how many were answered, what travelled (tokens / cache / split), how far predictions were off."""
    yield f"| {title} | policy | answered | deadlines missed | media | off by | fallbacks | loss, nats |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    for group in groups:
        for policy in policies:
            figures = group.of(policy)
            if figures is None:
                continue
            off = "–" if figures.off is None else f"{100 * figures.off:.0f} %"
            yield (
                f"| {group.name} | {policy} | {figures.answered} of {figures.questions + group.lost} | "
                f"{figures.missed} of {figures.timed} | {' / '.join(map(str, figures.media))} | {off} | "
                f"{figures.fallbacks} | {figures.kl:.4f} |"
            )


def agreement_lines(rows: Sequence[Agreement]) -> list[str]:
    """Live runs and their twins in virtual time."""
    return [
        "Live and virtual: median E2E over questions that both answered, in seconds\n",
        "| trace, policy | questions | live | virtual | virtual ÷ live | the same, question by question |",
        "|---|--:|--:|--:|--:|--:|",
        *(
            f"| {row.name} | {row.questions} | {row.live_s:.2f} | {row.virtual_s:.2f} | {row.ratio:.2f} | "
            f"{row.paired:.2f} |"
            for row in rows
        ),
        "",
    ]


def paired_lines(rows: Sequence[Paired], first: str, second: str) -> list[str]:
    """Two replays, question by question."""
    lines = [
        f"Questions that both answered, {second} less {first}; 95 % intervals by bootstrap over questions\n",
        f"| policy | questions | {first}, s | {second}, s | difference, s | ratio |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        difference, ratio = row.difference_s, row.ratio
        lines.append(
            f"| {row.name} | {row.questions} | {row.first_s:.2f} | {row.second_s:.2f} | "
            f"{difference[0]:+.2f} ({difference[1]:+.2f} to {difference[2]:+.2f}) | "
            f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f}) |"
        )
    return [*lines, ""]
