"""Settings for tests of replays: few agents, short, on links of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from coordinator.policy import get_policy
from scripts.replay.results import Result
from scripts.replay.setting import AgentTerms, Place, RequestTerms, Setting
from scripts.replay.virtual.run import Terms, run
from scripts.traces import Sample, Trace

MBPS = 20.0


def agent(name: str, **changes: object) -> AgentTerms:
    """A Pi 5 on a link of MBPS that holds contexts of 200 and 600 tokens."""
    fields: dict[str, Any] = {"name": name, "mbps": MBPS, "contexts": (200, 600)}
    return AgentTerms(**{**fields, **changes})


def place(*agents: AgentTerms, requests: RequestTerms | None = None, **changes: object) -> Place:
    """Three agents, a minute, six questions, no noise."""
    fields: dict[str, Any] = {
        "agents": agents or tuple(agent(f"agent-{number}") for number in (1, 2, 3)),
        "requests": requests or RequestTerms(count=6, first_s=15.0),
        "duration_s": 90.0,
        "noise": 0.0,
        "size_noise": 0.0,
    }
    return Place(Setting(**{**fields, **changes}), Path("/nowhere"), "test")


def replayed(where: Place | None = None, policy: str = "optimum", **changes: object) -> Result:
    """A run of it."""
    fields: dict[str, Any] = {"place": where or place(), "policy": get_policy(policy)}
    return run(Terms(**{**fields, **changes}))


def steps(*mbps: float, step_s: float = 1.0, rtt_s: float | None = None) -> Trace:
    """A trace of these rates."""
    return Trace(tuple(Sample(i * step_s, rate * 1e6, rtt_s) for i, rate in enumerate(mbps)), step_s)


def changed(where: Place, **changes: Any) -> Place:
    """The same with another setting."""
    return Place(msgspec.structs.replace(where.setting, **changes), where.folder, where.name)
