"""What replays came to, as tables: for the terminal and files as Markdown, for the page as it dresses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from scripts.replay.findings import (
    UNANSWERED_S,
    Agreement,
    Compared,
    Figures,
    Paired,
    agreement,
    by_name,
)
from scripts.replay.results import Result

MEGABYTE = 1e6
OWN = "as the site has them"


@dataclass(frozen=True)
class Cell:
    """Of a table. best: whether it is to be seen first."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Row:
    """Of a table. total: whether it sums the others up."""

    cells: tuple[Cell, ...]
    total: bool = False

    @classmethod
    def of(cls, *texts: str, total: bool = False) -> Row:
        """Plain ones."""
        return cls(tuple(map(Cell, texts)), total)


@dataclass(frozen=True)
class Table:
    """text: what stands in it. The first column holds names, the others figures."""

    title: str
    text: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]

    def markdown(self) -> Iterator[str]:
        """Line by line, an empty one behind it; what is best stands bold."""
        yield f"**{self.title}** {self.text}\n"
        yield f"| {' | '.join(self.heads)} |"
        yield "|---|" + "--:|" * (len(self.heads) - 1)
        for row in self.rows:
            yield f"| {' | '.join(f'**{cell.text}**' if cell.best else cell.text for cell in row.cells)} |"
        yield ""


def tables_of(results: Sequence[Result], compared: Sequence[Paired] = ()) -> list[Table]:
    """The first one is what a reader wants first. Results of runs that failed are left out."""
    good = [result for result in results if not result.error]
    if not any(result.questions for result in good):
        return []
    ours, policies = good[0].policy, list(dict.fromkeys(result.policy for result in good))
    everything = by_name(good, lambda _: "all", ours)
    names: tuple[tuple[str, Callable[[Result], str]], ...] = (
        ("By trace", trace_name),
        ("By device", lambda result: result.device or OWN),
        ("By site", lambda result: result.site),
        ("By mode", lambda result: result.mode),
    )
    found = [_paired(compared)] if compared else []
    text = (
        "Mean / 95th percentile of E2E in seconds, over the questions that any policy answered; one that another "
        f"answered and this one didn't counts {UNANSWERED_S:g} s. While a question is refused, since an agent is "
        f"offline, its time runs. Gain: {ours} below the better of token and kv, in "
        "the mean. Deadlines missed and MB sent stand in the order of the policies."
    )
    for title, name in names:
        groups = by_name(good, name, ours)
        if title == "By trace" or len(groups) > 1:
            found.append(_seconds(title, text, [*groups, *everything], policies))
            text = ""
    twins = agreement(good)
    if twins:
        found.append(_twins(twins))
    return [*found, _details([*by_name(good, trace_name, ours), *everything], policies)]


def trace_name(result: Result) -> str:
    """What a run is on."""
    return result.trace or result.site


def errors_of(results: Sequence[Result]) -> list[str]:
    """Of runs that failed, a line each."""
    return [f"{run_name(result)}: {result.error}" for result in results if result.error]


def run_name(result: Result) -> str:
    """What tells it from others."""
    parts = (trace_name(result), result.device, result.policy, f"seed {result.seed}", result.mode)
    return ", ".join(part for part in parts if part)


def _seconds(title: str, text: str, groups: Sequence[Compared], policies: Sequence[str]) -> Table:
    """Mean, p95, missed deadlines and megabytes of every policy."""
    heads = ("", *(f"{policy}: mean / p95" for policy in policies), "gain", "deadlines missed", "MB")
    rows = []
    for group in groups:
        known = [group.of(policy) for policy in policies]
        least = min((each.mean_s for each in known if each), default=0.0)
        cells = [
            Cell(f"{each.mean_s:.2f} / {each.p95_s:.2f}", best=f"{each.mean_s:.2f}" == f"{least:.2f}")
            if each
            else Cell("–")
            for each in known
        ]
        gain = "–" if group.gain is None else f"{100 * group.gain:.0f} %"
        missed = " / ".join(str(each.missed) if each else "–" for each in known)
        sent = " / ".join(f"{each.sent_bytes / MEGABYTE:.0f}" if each else "–" for each in known)
        name = f"{group.name} ({group.missing} questions left out)" if group.missing else group.name
        rows.append(Row((Cell(name), *cells, Cell(gain), Cell(missed), Cell(sent)), total=group.name == "all"))
    return Table(title, text, heads, tuple(rows))


def _details(groups: Sequence[Compared], policies: Sequence[str]) -> Table:
    heads = ("", "answered", "median, s", "deadlines", "tokens / cache / split", "off by", "fallbacks", "loss, nats")
    rows = [_detail(group, each) for group in groups for policy in policies if (each := group.of(policy)) is not None]
    text = (
        "Questions answered; deadlines missed; what links carried; how far predictions were off, in the median; mean "
        "over questions of the largest loss that was planned."
    )
    return Table("Policies", text, heads, tuple(rows))


def _detail(group: Compared, each: Figures) -> Row:
    off = "–" if each.off is None else f"{100 * each.off:.0f} %"
    return Row.of(
        f"{group.name}, {each.policy}",
        f"{each.answered} of {each.questions + group.lost}",
        f"{each.median_s:.2f}",
        f"{each.missed} of {each.timed}",
        " / ".join(map(str, each.media)),
        off,
        str(each.fallbacks),
        f"{each.kl:.4f}",
        total=group.name == "all",
    )


def _twins(rows: Sequence[Agreement]) -> Table:
    heads = ("", "questions", "live, s", "virtual, s", "virtual ÷ live", "question by question")
    found = tuple(
        Row.of(
            each.name,
            str(each.questions),
            f"{each.live_s:.2f}",
            f"{each.virtual_s:.2f}",
            f"{each.ratio:.2f}",
            f"{each.paired:.2f}",
            total=each.name == "all",
        )
        for each in rows
    )
    text = "Median E2E of live runs and of their twins in virtual time, over questions that both answered."
    return Table("Live and virtual", text, heads, found)


def _paired(rows: Sequence[Paired]) -> Table:
    heads = ("", "questions", "first, s", "second, s", "difference, s", "second ÷ first")
    found = []
    for row in rows:
        difference, ratio = row.difference_s, row.ratio
        found.append(
            Row.of(
                row.name,
                str(row.questions),
                f"{row.first_s:.2f}",
                f"{row.second_s:.2f}",
                f"{difference[0]:+.2f} ({difference[1]:+.2f} to {difference[2]:+.2f})",
                f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})",
                total=row.name == "all",
            )
        )
    text = (
        "Mean E2E of the same questions under both, where both answered; 95 % intervals by bootstrap over runs and "
        "the questions of each."
    )
    return Table("Two replays, paired", text, heads, tuple(found))
