"""How good an agent's access link is: round trip, uplink and downlink rate, signal strength.

While nothing is being transferred, every few seconds two probes of the same size go out over the bulk connection: one
to a topic that nobody reads, acknowledged by the broker after rtt + size/uplink; one to the agent itself, which is back
after rtt + size/uplink + size/downlink. A small one before them gives rtt. Sizes follow the link, so that a probe
occupies it for about PROBE_TARGET_S.

While something is being transferred, nothing is probed, and the transfers themselves tell. What comes in is at most as
fast as the downlink. What goes out unpaced, while more waits to be sent, is as fast as the uplink or what lies behind
it; only a clear change counts. Once they have ended, the probes' word holds again.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from broker_config import topics
from broker_config.bus import Bus
from broker_config.errors import BusError
from broker_config.messages import MAX_PROBE_BYTES, LinkQuality, Probe, SendProgress
from edge_agent.flow import Flow

log = logging.getLogger(__name__)

PROBE_TARGET_S = 0.1
SMALLEST_PROBE_BYTES = 8 * 1024
LARGEST_PROBE_BYTES = MAX_PROBE_BYTES
PROBE_TIMEOUT_S = 8.0
QUIET_S = 0.3
"""After a transfer the link is left alone for so long before it is probed."""

REMEMBERED_PROBES = 3
"""The median of so many is reported: one slow probe changes nothing, a link that has changed is seen at the second."""
SMALLEST_TRANSFER_BYTES = 1024 * 1024
"""A shorter transfer says more of round trips than of rates."""
CLEARLY_SLOWER = 0.75
FASTEST_BPS = 1e15
MOST_TOLD = 64
"""As many transfers as a message may name."""

WIRELESS = Path("/proc/net/wireless")


class LinkMeter:
    """Measures one agent's access link. `quality` is what telemetry reports. signal: in dBm, else of this machine."""

    def __init__(
        self,
        *,
        bulk: Bus,
        agent: str,
        signal: Callable[[], float | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bulk, self._agent, self._signal, self._clock = bulk, agent, signal or signal_dbm, clock
        self._round_trip_s = _Median()
        self._uplink_bps = _Median()
        self._downlink_bps = _Median()
        self._probe_bytes = SMALLEST_PROBE_BYTES
        self._sequence = 0
        self._awaited: asyncio.Future[float] | None = None
        self._transfers = 0
        self._outward: list[Flow] = []
        self._inward: list[Flow] = []
        self._quiet_since = 0.0

    @property
    def quality(self) -> LinkQuality:
        return LinkQuality(
            round_trip_s=self._round_trip_s.value,
            uplink_bps=self._moved(self._uplink_bps.value, self._unpaced_bps()),
            downlink_bps=self._at_least(self._downlink_bps.value, sum(flow.rate_bps or 0.0 for flow in self._inward)),
            signal_dbm=self._signal(),
        )

    @contextmanager
    def transferring(self) -> Iterator[None]:
        """No probe is sent inside the block."""
        self._transfers += 1
        try:
            yield
        finally:
            self._transfers -= 1
            self._quiet_since = self._clock()

    @contextmanager
    def sending(self, flow: Flow) -> Iterator[Flow]:
        """The same, and telemetry tells of this transfer."""
        with self.transferring(), _listed(self._outward, flow):
            yield flow

    @contextmanager
    def receiving(self, flow: Flow) -> Iterator[Flow]:
        """The same for one that comes in."""
        with self.transferring(), _listed(self._inward, flow):
            yield flow

    @property
    def progress(self) -> tuple[SendProgress, ...]:
        """What telemetry tells of transfers that are being sent."""
        return tuple(
            SendProgress(transfer=flow.transfer, moved_bytes=flow.moved_bytes, goodput_bps=flow.goodput_bps)
            for flow in self._outward[:MOST_TOLD]
        )

    def _unpaced_bps(self) -> float | None:
        """What transfers that go out show of the uplink; None if one of them is paced or may have waited."""
        rates = [flow.link_bps for flow in self._outward if flow.pace_bps is None]
        known = [rate for rate in rates if rate is not None]
        return sum(known) if known and len(known) == len(self._outward) else None

    @staticmethod
    def _moved(probed_bps: float | None, seen_bps: float | None) -> float | None:
        """A rate as transfers show it, if that is clearly another than the probes found."""
        if not seen_bps or (probed_bps is not None and CLEARLY_SLOWER * probed_bps <= seen_bps <= probed_bps):
            return probed_bps
        return min(seen_bps, FASTEST_BPS)

    @staticmethod
    def _at_least(probed_bps: float | None, seen_bps: float) -> float | None:
        return min(seen_bps, FASTEST_BPS) if seen_bps > (probed_bps or 0.0) else probed_bps

    def sent(self, wire_bytes: int, seconds: float) -> None:
        """A transfer went out: the uplink is at least as fast as that."""
        _raise_to(self._uplink_bps, wire_bytes, seconds)

    def received(self, wire_bytes: int, seconds: float) -> None:
        """A transfer came in: the downlink is at least as fast as that."""
        _raise_to(self._downlink_bps, wire_bytes, seconds)

    async def run(self, interval_s: float) -> None:
        """Probe for ever, at most every interval_s seconds, whenever the link is quiet."""
        await self._bulk.subscribe(topics.PROBES, self._back, agent=self._agent)
        while True:
            if not self._transfers and self._clock() - self._quiet_since >= QUIET_S:
                try:
                    await self.probe()
                except BusError as error:
                    log.info("link probe: %s", error)
                except TimeoutError:
                    log.info("link probe: not back within %g s", PROBE_TIMEOUT_S)
            await asyncio.sleep(interval_s)

    async def probe(self) -> None:
        """Measure once. Raises BusError, TimeoutError."""
        round_trip_s = await self._bounce(0)
        size, self._probe_bytes = (
            self._probe_bytes,
            SMALLEST_PROBE_BYTES,
        )  # one that is lost is not repeated at its size
        self._sequence += 1
        start = self._clock()
        probe = Probe(sequence=self._sequence, padding=bytes(size))
        await self._bulk.publish(topics.PROBE_SINK, probe, agent=self._agent)
        up_s = self._clock() - start
        both_s = await self._bounce(size)
        if self._transfers:  # one began meanwhile: these seconds say nothing
            self._probe_bytes = size
            return
        self._round_trip_s.add(round_trip_s)
        up_bps = 8 * size / max(up_s - round_trip_s, up_s / 10)
        down_bps = 8 * size / max(both_s - up_s, both_s / 20)
        slowest = min(up_bps, down_bps, self._uplink_bps.add(up_bps), self._downlink_bps.add(down_bps))
        self._probe_bytes = int(min(max(slowest * PROBE_TARGET_S / 8, SMALLEST_PROBE_BYTES), LARGEST_PROBE_BYTES))

    async def _bounce(self, size: int) -> float:
        """Seconds until a probe of so many bytes is back."""
        self._sequence += 1
        self._awaited = asyncio.get_running_loop().create_future()
        start = self._clock()
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            await self._bulk.publish(
                topics.PROBES, Probe(sequence=self._sequence, padding=bytes(size)), agent=self._agent
            )
            return await self._awaited - start

    def _back(self, probe: Probe, _: Mapping[str, str]) -> None:
        if self._awaited is not None and not self._awaited.done() and probe.sequence == self._sequence:
            self._awaited.set_result(self._clock())


def signal_dbm(wireless: Path = WIRELESS) -> float | None:
    """Signal level of the first wireless interface in dBm, None where there is none (Linux wireless extensions)."""
    try:
        lines = wireless.read_text().splitlines()[2:]
        level = float(lines[0].split()[3].rstrip(".")) if lines else None
    except (OSError, ValueError, IndexError):
        return None
    return level if level is not None and -200 <= level <= 50 else None


@contextmanager
def _listed(flows: list[Flow], flow: Flow) -> Iterator[None]:
    flows.append(flow)
    try:
        yield
    finally:
        flows.remove(flow)


class _Median:
    """The median of the last few measurements; None before the first."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=REMEMBERED_PROBES)
        self.value: float | None = None

    def add(self, measured: float) -> float:
        self._last.append(measured)
        self.value = median = statistics.median_low(self._last)
        return median


def _raise_to(rate: _Median, wire_bytes: int, seconds: float) -> None:
    """A large transfer that was faster than the estimate is proof enough to forget what was measured before."""
    if wire_bytes >= SMALLEST_TRANSFER_BYTES and seconds > 0 and 8 * wire_bytes / seconds > (rate.value or 0.0):
        for _ in range(REMEMBERED_PROBES):
            rate.add(8 * wire_bytes / seconds)
