"""What is replayed when nothing is named: the shipped site, on traces that are made."""

from __future__ import annotations

from scripts.replay.setting import SITES
from scripts.traces import Trace
from scripts.traces.generate import Made, made

SITE_FILE, LIVE_FILE = SITES / "four.toml", SITES / "live.toml"
POLICIES = ("optimum", "jmsra", "token", "kv")
SECONDS = 600.0
_KINDS = (("walk", 1), ("walk", 8), ("bursts", 15), ("drive", 25), ("outages", 10), ("walk", 80))
"""Kinds, and medians in Mbit/s: slow links on which tokens win, fast ones on which caches do, and what lies between."""


def traces() -> list[tuple[str, Trace | None]]:
    """By name."""
    return [
        (
            f"{kind}-{mbps}",
            made(Made(kind=kind, duration_s=SECONDS, median_bps=mbps * 1e6, rtt_s=0.03, seed=index)),
        )
        for index, (kind, mbps) in enumerate(_KINDS)
    ]
