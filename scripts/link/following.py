"""A link driven by a trace."""

from __future__ import annotations

import asyncio
from typing import Literal

from scripts.link.emulated import EmulatedLink
from scripts.traces import Trace

Direction = Literal["both", "uplink", "downlink"]


async def follow(link: EmulatedLink, trace: Trace, *, direction: Direction = "both") -> None:
    """Drive a link from a trace: its rate and, where the trace has a round trip, half of that as delay each way.

    Loss is not replayed: TCP hides it, and the rate was measured with it. Returns after the last sample came into
    force, never if the trace loops.
    """
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    for time_s, sample in trace.steps():
        await asyncio.sleep(start_s + time_s - loop.time())
        rate_bps = sample.bandwidth_bps
        link.set_rate(
            rate_bps if direction != "downlink" else None,
            rate_bps if direction != "uplink" else None,
        )
        if sample.rtt_s is not None:
            link.set_delay(sample.rtt_s / 2)
