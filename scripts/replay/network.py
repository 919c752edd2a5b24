"""A network in virtual time: flows over channels whose rates follow traces, shared as fairly as the link emulator does.

What flows is bits, not packets. While nothing changes every flow has a rate: max-min fair over the channels that it
passes, no more than its pace, nothing while it waits for more to be sent. Rates change when a flow begins, ends, stops
for want of bits or gets another pace, and when a trace of a channel that is in use has its next step. Only flows that
share a channel with what has changed, over whatever others, are looked at then.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from scripts.traces import Trace

SLIGHTLY_BITS = 1e-3
"""So near to a mark counts as there: floats are not exact, and a thousandth of a bit is nothing."""
SLIGHTLY_S = 1e-7
"""A timer may fire so much before its time, by rounding; steps of traces are far longer."""
FULL = 1e-9
"""So small a share of a channel's rate counts as nothing left."""
SHORT_S = 0.25
"""What ends so soon on channels that nobody uses is not held up by what begins meanwhile: messages and probes."""


@dataclass(eq=False)
class Channel:
    """What flows share: a rate that follows a trace, or a constant one, in bits per second."""

    name: str
    rate: Trace | float
    flows: dict[Flow, int] = field(default_factory=dict)
    """With how many times each passes it."""
    step: asyncio.TimerHandle | None = None

    def bps(self, now_s: float) -> float:
        """The rate at a time; traces begin at 0."""
        return self.rate.at(now_s + SLIGHTLY_S).bandwidth_bps if isinstance(self.rate, Trace) else self.rate

    @property
    def busy(self) -> bool:
        """Whether anything moves on it, or would."""
        return any(not flow.waits for flow in self.flows)

    def next_change_s(self, now_s: float) -> float:
        """When the rate is another; infinite if it stays from now on."""
        return self.rate.next_change_s(now_s + SLIGHTLY_S) if isinstance(self.rate, Trace) else math.inf


class Flow:
    """Bits on their way. `moved` waits for them; `add` lets more of them go."""

    def __init__(self, network: Network, ways: Mapping[Channel, int], pace_bps: float) -> None:
        self._network, self.ways, self.pace_bps = network, ways, pace_bps
        self.rate_bps = 0.0
        self._moved_bits = self._given_bits = 0.0
        self._at_s = network.now_s
        self._marks: list[tuple[float, asyncio.Future[None]]] = []
        self._finishing = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def moved_bits(self) -> float:
        """By now."""
        since_s = self._network.now_s - self._at_s
        return min(self._moved_bits + self.rate_bps * since_s, self._given_bits)

    @property
    def waits(self) -> bool:
        """Whether all that was given has moved."""
        return self._given_bits - self.moved_bits <= SLIGHTLY_BITS

    def add(self, bits: float) -> None:
        """So many more may go."""
        waited = self.waits
        self._settle()
        self._given_bits += bits
        if waited:
            self._network.changed(self.ways)
        else:
            self._wake()

    def set_pace(self, pace_bps: float) -> None:
        """No faster than this from now on."""
        self.pace_bps = pace_bps
        self._network.changed(self.ways)

    async def moved(self, bits: float) -> None:
        """Until so many have moved in all, since it began."""
        if self.moved_bits >= bits - SLIGHTLY_BITS:
            return
        future: asyncio.Future[None] = self._network.loop.create_future()
        self._marks.append((bits, future))
        self._wake()
        await future

    def finish(self) -> None:
        """No more will be added: it ends when all that was given has moved, whoever waits for it or not."""
        self._finishing = True
        if self.waits:
            self.end()

    def end(self) -> None:
        """It takes nothing of its channels any more; those who wait for it wait for ever, unless they are cancelled."""
        self._settle()
        self.rate_bps = 0.0
        if self._timer is not None:
            self._timer.cancel()
        self._network.ended(self)

    def run_at(self, rate_bps: float) -> None:
        """From now on (the network's business)."""
        self._settle()
        self.rate_bps = rate_bps
        self._wake()

    def _settle(self) -> None:
        self._moved_bits, self._at_s = self.moved_bits, self._network.now_s

    def _wake(self) -> None:
        """Come back at the next mark, or when there is nothing left to move."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        moved_bits = self.moved_bits
        for mark in [mark for mark in self._marks if mark[0] <= moved_bits + SLIGHTLY_BITS]:
            self._marks.remove(mark)
            if not mark[1].done():
                mark[1].set_result(None)
        if self.rate_bps > 0:
            ahead = [bits for bits, _ in self._marks if bits <= self._given_bits + SLIGHTLY_BITS]
            next_bits = min([*ahead, self._given_bits])
            in_s = max(next_bits - moved_bits, 0.0) / self.rate_bps
            self._timer = self._network.loop.call_later(in_s, self._arrived, next_bits)
        elif self._finishing and self.waits:
            self._network.loop.call_soon(self.end)

    def _arrived(self, bits: float) -> None:
        self._timer = None
        self._moved_bits, self._at_s = max(min(bits, self._given_bits), self.moved_bits), self._network.now_s
        if self.waits and not self._finishing:
            self._network.changed(self.ways)
        self._wake()
        if self.waits and self._finishing:
            self.end()


class Network:
    """Channels by name. Belongs to one event loop, whose clock is at 0 when traces begin."""

    def __init__(self, rates: Mapping[str, Trace | float]) -> None:
        """Raises ValueError for a rate that is none."""
        for name, rate in rates.items():
            if not isinstance(rate, Trace) and not (math.isfinite(rate) and rate >= 0):
                raise ValueError(f"channel {name} has a rate of {rate} bit/s")
        self.channels = {name: Channel(name, rate) for name, rate in rates.items()}

    @cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The one that it belongs to. Up to Python 3.11 asking for the running one is a system call each time."""
        return asyncio.get_running_loop()

    @property
    def now_s(self) -> float:
        """The loop's clock."""
        return self.loop.time()

    def flow(self, passes: Iterable[str], pace_bps: float = math.inf) -> Flow:
        """A flow that passes these channels (one twice if it is named twice), with nothing to move yet.

        Raises KeyError for a channel that isn't there, ValueError without any.
        """
        ways: dict[Channel, int] = {}
        for name in passes:
            channel = self.channels[name]
            ways[channel] = ways.get(channel, 0) + 1
        if not ways:
            raise ValueError("a flow passes at least one channel")
        flow = Flow(self, ways, pace_bps)
        for channel, times in ways.items():
            channel.flows[flow] = times
        return flow

    def alone_s(self, passes: Iterable[str], bits: float) -> float | None:
        """Seconds that so many bits take on channels that nobody else uses; None where that is not so, or not sure.

        Raises KeyError for a channel that isn't there.
        """
        now_s, taken_s = self.now_s, 0.0
        for name in passes:
            channel = self.channels[name]
            rate_bps = channel.bps(now_s)
            if channel.busy or rate_bps * SHORT_S < bits:
                return None
            taken_s = max(taken_s, bits / rate_bps if bits else 0.0)
            if channel.next_change_s(now_s) < now_s + taken_s:
                return None
        return taken_s

    async def carry(self, passes: Iterable[str], bits: float) -> None:
        """Until so many bits have passed these channels; they go their way when nobody waits for them any more.

        Raises KeyError for a channel that isn't there.
        """
        passes = tuple(passes)
        soon_s = self.alone_s(passes, bits)
        if soon_s is not None:
            await asyncio.sleep(soon_s)
            return
        flow = self.flow(passes)
        try:
            flow.add(bits)
            await flow.moved(bits)
        finally:
            flow.finish()

    def ended(self, flow: Flow) -> None:
        """What it had is the others'."""
        for channel in flow.ways:
            channel.flows.pop(flow, None)
        self.changed(flow.ways)

    def changed(self, channels: Iterable[Channel]) -> None:
        """Share anew what these channels have, and those that their flows pass."""
        near = list(_reached(channels))
        flows = dict.fromkeys(flow for channel in near for flow in channel.flows)
        for flow, rate_bps in _shared(near, list(flows), self.now_s).items():
            if rate_bps != flow.rate_bps:
                flow.run_at(rate_bps)
        for channel in near:
            self._follow(channel)

    def _follow(self, channel: Channel) -> None:
        """Come back at the next step of the channel's trace, as long as somebody uses it."""
        if channel.step is not None or all(flow.waits for flow in channel.flows):
            return
        next_s = channel.next_change_s(self.now_s)
        if next_s < math.inf:
            channel.step = self.loop.call_at(next_s, self._stepped, channel)

    def _stepped(self, channel: Channel) -> None:
        channel.step = None
        self.changed((channel,))


def _reached(channels: Iterable[Channel]) -> Iterator[Channel]:
    """These, and those that flows of theirs pass, and so on."""
    seen: dict[Channel, None] = {}
    left = list(channels)
    while left:
        channel = left.pop()
        if channel in seen:
            continue
        seen[channel] = None
        yield channel
        # one that has just run dry still holds its rate on its other channels
        left += [other for flow in channel.flows if not flow.waits or flow.rate_bps > 0 for other in flow.ways]


def _shared(channels: Iterable[Channel], flows: list[Flow], now_s: float) -> dict[Flow, float]:
    """Max-min fair rates: all grow alike; those stop whose pace is reached or of which a channel is full."""
    rates = dict.fromkeys(flows, 0.0)
    full = {channel: channel.bps(now_s) for channel in channels}
    left = dict(full)
    growing = [flow for flow in flows if not flow.waits and flow.pace_bps > 0]
    while growing:
        weights: dict[Channel, int] = {}
        for flow in growing:
            for channel, times in flow.ways.items():
                weights[channel] = weights.get(channel, 0) + times
        by_s = min(
            *(left[channel] / weight for channel, weight in weights.items()),
            *(flow.pace_bps - rates[flow] for flow in growing),
        )
        by_s = max(by_s, 0.0)
        for flow in growing:
            rates[flow] += by_s
        for channel, weight in weights.items():
            left[channel] = max(left[channel] - weight * by_s, 0.0)
        still = [
            flow
            for flow in growing
            if rates[flow] < flow.pace_bps * (1 - FULL)
            and all(left[channel] > FULL * full[channel] for channel in flow.ways)
        ]
        if len(still) == len(growing):
            break
        growing = still
    return rates
