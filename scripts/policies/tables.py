"""What was computed, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from scripts.policies.findings import Curve, Findings
from scripts.policies.profiles import profiles
from scripts.policies.regions import MEDIA, Regions, Span
from scripts.policies.scale import STAGES, Timed
from scripts.policies.simulation import Mean, Row, Simulation

_NAMES = {
    "compute": "receiver's compute",
    "rate": "rate (airtime)",
    "snr": "SNR (FDMA)",
    "agents": "number of senders",
}
_GROUPS = {"all": "all", "own": "links of their own", "cell": "Wi-Fi cell", "fdma": "FDMA band"}


def profile_lines() -> list[str]:
    """Devices and where their speeds come from."""
    rows = [
        f"| {each.title} | {each.prefill_tps:g} | {each.decode_tps:g} | "
        f"{each.coding['klt'][0] / 1e6:.1f} / {each.coding['klt'][1] / 1e6:.1f} | "
        f"{each.source.prefill}; {each.source.decode}; {each.source.coding} |"
        for each in profiles().values()
    ]
    return [
        "Devices, SmolLM2-135M-Instruct; sources of prefill, decode and coding in this order\n",
        "| device | prefill, tokens/s | decode, tokens/s | klt coding, M elements/s, encode / decode | from |",
        "|---|--:|--:|--:|---|",
        *rows,
        "",
    ]


def findings_lines(found: Findings) -> list[str]:
    """Over each axis: which fixed medium wins at its ends, and how far below the better one the others are."""
    return [
        "E2E over one axis: the better of NL-only and KV-only at its two ends, and E2E in parts of that better one\n",
        (
            "| text | over | better at the low end | at the high end | jmsra, mean (least) | optimum, mean (least) | "
            "with streaming | jmsra ÷ best of its rungs, most | optimum ÷ bound, most |"
        ),
        "|---|---|---|---|--:|--:|--:|--:|--:|",
        *(
            _finding(text, curve)
            for text, curves in (("given", found.given), ("generated", found.generated))
            for curve in curves
        ),
        "",
    ]


def _finding(text: str, curve: Curve) -> str:
    def column(name: str) -> list[float]:
        return [float("nan") if value is None else value for value in curve.e2e_s[name]]

    token, kv = column("token"), column("kv")
    fixed = [min(pair) for pair in zip(token, kv, strict=True)]
    wins = ["NL" if nl < cache else "KV" for nl, cache in zip(token, kv, strict=True)]

    def beside(name: str) -> str:
        parts = [one / other for one, other in zip(column(name), fixed, strict=True)]
        return f"{sum(parts) / len(parts):.2f} ({min(parts):.2f})"

    known = [(one, other) for one, other in zip(column("jmsra"), curve.e2e_s["tightest"], strict=True) if other]
    most = max(one / other for one, other in known)
    gap = max(one / other for one, other in zip(column("optimum"), column("bound"), strict=True))
    return (
        f"| {text} | {_NAMES[curve.name]} | {wins[0]} | {wins[-1]} | {beside('jmsra')} | {beside('optimum')} | "
        f"{beside('streaming')} | {most:.3f} | {gap:.2f} |"
    )


def regions_lines(found: Regions) -> list[str]:
    """Shares of the maps, and the rates at which each medium is chosen between devices alike."""
    areas = [
        f"| {each.title} | {'ready' if each.ready else 'not ready'} | "
        + " | ".join(f"{100 * each.area(medium):.0f} %" for medium in MEDIA)
        + f" | {100 * max(map(max, each.gain)):.0f} % |"
        for each in found.maps
    ]
    return [
        "Shares of the maps, with streaming\n",
        "| device | sender's cache | tokens | split | cache | largest gain |",
        "|---|---|--:|--:|--:|--:|",
        *areas,
        "",
        "Between two devices alike: what is chosen over the rate in Mbit/s\n",
        "| device | sender's cache | streaming | chosen | largest gain of the split |",
        "|---|---|---|---|--:|",
        *(
            f"| {span.title} | {'ready' if span.ready else 'not ready'} | {'yes' if span.slices else 'no'} | "
            f"{_ranges(span)} | {100 * max(span.gain):.0f} % |"
            for span in found.spans
        ),
        "",
    ]


def _ranges(span: Span) -> str:
    parts = []
    for medium, group in groupby(zip(span.media, span.rates_mbps, strict=True), key=lambda pair: pair[0]):
        rates = [_mbps(rate) for _, rate in group]
        parts.append(f"{medium} {rates[0]}" if len(rates) == 1 else f"{medium} {rates[0]}-{rates[-1]}")
    return ", ".join(parts)


def _mbps(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def simulation_lines(found: Simulation) -> list[str]:
    """A column a network."""
    columns: tuple[tuple[str, Callable[[Row], str]], ...] = (
        ("optimum streaming ÷ best binary", lambda row: _mean(row.streaming_to_whole)),
        ("optimum ÷ best binary", lambda row: _mean(row.whole_to_whole)),
        ("optimum streaming ÷ best binary streaming", lambda row: _mean(row.streaming_to_streaming)),
        ("best binary streaming ÷ best binary", lambda row: _mean(row.binary)),
        ("jmsra ÷ best binary of its rungs, mean (most)", lambda row: _most(row.jmsra_whole)),
        ("the same, both streaming", lambda row: _most(row.jmsra_streaming)),
        ("rounds with a split", lambda row: f"{100 * row.split_whole:.0f} %"),
        ("the same, streaming", lambda row: f"{100 * row.split_streaming:.0f} %"),
        ("optimum above the bound, mean (most)", lambda row: _percent(row.gap_whole)),
        ("the same, both streaming", lambda row: _percent(row.gap_streaming)),
    )
    return [
        f"{len(found.rounds)} random rounds; means of ratios of E2E, 95 % intervals by bootstrap, least-most\n",
        f"| | {' | '.join(f'{_GROUPS[row.group]}, {row.rounds}' for row in found.rows)} |",
        "|---|" + "--:|" * len(found.rows),
        *(f"| {title} | {' | '.join(show(row) for row in found.rows)} |" for title, show in columns),
        "",
    ]


def _mean(found: Mean) -> str:
    return f"{found.mean:.2f} ({found.low:.2f}-{found.high:.2f}), {found.least:.2f}-{found.most:.2f}"


def _most(found: Mean) -> str:
    return f"{found.mean:.3f} ({found.most:.2f})"


def _percent(found: Mean) -> str:
    return f"{100 * found.mean:.1f} % ({100 * found.most:.0f} %)"


def scale_lines(found: Sequence[Timed]) -> list[str]:
    """Milliseconds by stage."""
    return [
        "Planning, process milliseconds on one core, the least of the repeats\n",
        "| network | links | " + " | ".join(STAGES) + " | plan, median | repeats |",
        "|---|--:|" + "--:|" * (len(STAGES) + 2),
        *(
            f"| {_GROUPS[each.network.value]} | {each.links:,} | "
            + " | ".join(_ms(each.seconds[stage]) for stage in STAGES)
            + f" | {_ms(each.plan_median_s)} | {each.repeats} |"
            for each in found
        ),
        "",
    ]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:,.1f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"
