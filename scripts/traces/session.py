"""Traces out of recorded sessions: what an agent measured of its link while the session ran."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Literal

from broker_config import topics
from broker_config.messages import Telemetry
from coordinator.errors import RecordingInvalid
from coordinator.recording import Recorded
from scripts.traces.errors import TraceInvalid
from scripts.traces.table import check_rows
from scripts.traces.trace import Sample, Trace

Way = Literal["uplink", "downlink"]


def read_session(path: Path, agent: str, way: Way, *, step_s: float = 1.0, loop: bool = True) -> tuple[Trace, str]:
    """An agent's measured rate one way, and its round trip, held until the next report, from its first one on; and how
    the recording ended too early, or "".

    Raises TraceInvalid: for a file that is no session, or one in which the agent measured nothing.
    """
    try:
        recorded = Recorded(path)
        events = [
            (event.at_s, event.message)
            for event in recorded
            if event.topic is topics.TELEMETRY
            and event.way == "heard"
            and event.parameters["agent"] == event.message.agent
        ]
    except RecordingInvalid as error:
        raise TraceInvalid(path, 0, error.why) from None
    known = sorted({message.agent for _, message in events})
    if agent not in known:
        raise TraceInvalid(path, 0, f"tells nothing of {agent}; it tells of {', '.join(known) or 'nobody'}")
    points = [
        (at_s, found)
        for at_s, message in events
        if message.agent == agent and (found := _sample(message, way)) is not None
    ]
    if not points:
        raise TraceInvalid(path, 0, f"{agent} had not measured its {way} when it ended")
    start_s, last_s = points[0][0], points[-1][0]
    times_s = [at_s for at_s, _ in points]
    count = max(1, round((last_s - start_s) / step_s))
    check_rows(path, count, step_s)
    rtt_s = next((found.rtt_s for _, found in points if found.rtt_s is not None), None)
    samples = []
    for index in range(count):
        found = points[bisect_right(times_s, start_s + index * step_s) - 1][1]
        rtt_s = rtt_s if found.rtt_s is None else found.rtt_s
        samples.append(Sample(index * step_s, found.bandwidth_bps, rtt_s))
    return Trace(tuple(samples), step_s, loop), recorded.cut


def _sample(telemetry: Telemetry, way: Way) -> Sample | None:
    link = telemetry.link
    rate_bps = link.uplink_bps if way == "uplink" else link.downlink_bps
    return None if rate_bps is None else Sample(0.0, rate_bps, link.round_trip_s)
