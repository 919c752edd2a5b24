"""E2E by link rate as the model predicts it from this machine's own speeds: where tokens win, where caches do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from msgspec import Struct

from broker_config.messages import SLICE_TOKENS, Rung, Speed
from coordinator.latency import Link, RequestTerms, Scenario
from coordinator.policy import get_policy

RATES_MBPS = np.geomspace(1, 500, 60)
CONTEXT_TOKENS, QUESTION_TOKENS = 512, 24
ROUND_TRIP_S = 0.02


class Crossover(Struct, frozen=True, kw_only=True):
    """Seconds of E2E at each rate, by policy."""

    rates_mbps: tuple[float, ...]
    e2e_s: dict[str, tuple[float, ...]]
    speed: Speed


def crossover(speed: Speed, elements_per_token: int, ladder: tuple[Rung, ...]) -> Crossover:
    """One link of CONTEXT_TOKENS tokens at the default quality floor, sender's cache ready."""
    e2e_s: dict[str, list[float]] = {"token": [], "kv": [], "jmsra": [], "optimum": []}
    for mbps in RATES_MBPS:
        bps = float(mbps) * 1e6
        link = Link(
            request=0,
            sender="a",
            receiver="b",
            context="context",
            context_id="0" * 32,
            tokens=CONTEXT_TOKENS,
            elements_per_token=elements_per_token,
            bytes_per_token_id=2,
            cached=True,
            reference=ladder[0],
            sender_speed=speed,
            receiver_speed=speed,
            sender_rtt_s=ROUND_TRIP_S,
            receiver_rtt_s=ROUND_TRIP_S,
            link_bps=bps,
            channels=(("a/up", bps), ("b/down", bps)),
            rungs=tuple(sorted((r for r in ladder if r.kl <= 0.02), key=lambda r: r.bits_per_element)),
        )
        terms = RequestTerms(request="0" * 16, receiver="b", question_tokens=QUESTION_TOKENS)
        scenario = Scenario(requests=(terms,), links=(link,), slice_tokens=SLICE_TOKENS, tie_fraction=0.0)
        for policy, seconds in e2e_s.items():
            seconds.append(get_policy(policy).plan(scenario).predicted_e2e_s)
    return Crossover(
        rates_mbps=tuple(float(mbps) for mbps in RATES_MBPS),
        e2e_s={policy: tuple(seconds) for policy, seconds in e2e_s.items()},
        speed=speed,
    )


def plot(found: Crossover, path: Path) -> None:
    """The picture of it, as PNG."""
    import matplotlib as mpl  # noqa: PLC0415  heavy, and only for this

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    styles = {
        "token": ("#b5651d", "tokens", 2),
        "kv": ("#1f6f8b", "cache", 2),
        "jmsra": ("#222222", "jmsra", 1),
        "optimum": ("#3a7d44", "optimum", 2),
    }
    for policy, (colour, label, width) in styles.items():
        line = "--" if policy == "jmsra" else "-"
        axes.plot(found.rates_mbps, found.e2e_s[policy], line, color=colour, linewidth=width, label=label)
    axes.set(
        xscale="log",
        xlabel="link rate, Mbit/s",
        ylabel="E2E to the first answer token, s",
        title=f"A context of {CONTEXT_TOKENS} tokens; prefill {found.speed.prefill_tps:.0f} tokens/s",
    )
    axes.set_ylim(0, 3 * max(found.e2e_s["token"]))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
