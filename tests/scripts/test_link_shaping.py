"""A link that follows a trace must give the trace's rate and delay: what passes is measured where it arrives.

Rate: a source that always has more fills both directions at once, and what the far end has received is counted in
windows of 1 s, one every 50 ms, whatever steps they lie across. A window must hold what the trace passes in it within
5 %. Bytes pass in turns of 4 ms but at least 1,500 bytes, and may be 5 ms late, so a window may also lack or have what
passes in 9 ms and 1,500 bytes: within a step of 0.3 Mbit/s or more that is less than 5 %, behind a steep step down, on
a slower link and where a change of delay brings much at once or nothing, it is not.

Delay: stamped messages of 64 bytes, one about every 25 ms each way on a link that carries nothing else, must arrive
within 5 ms of half the trace's round trip, and may take the time that their bits take at the trace's rate besides.

All runs in one event loop, and what it does while that is held up is not the link's doing. Windows that this moves
bytes into or out of, and messages on whose way it is, are left out; inside a window the link must make up for it. A
least share must remain. What else the machine does can't all be seen from here, so a run that finds a fault, or too
little to judge by, is done again once: what is the link's fault is there again.
"""

from __future__ import annotations

import asyncio
import math
import random
import socket
import struct
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, TypeVar

import pytest

from scripts.link import Bucket, EmulatedLink, follow
from scripts.link.bucket import BURST_S, QUANTUM_S, SMALLEST_QUANTUM_BYTES
from scripts.traces import Sample, Trace, read_trace
from scripts.traces.generate import KINDS, Made, made
from tests.shared_data import shared_data

pytestmark = pytest.mark.timeout(60)

MBIT = 1e6
RATE_TOLERANCE = 0.05
DELAY_TOLERANCE_S = 0.005
TOP_BPS = 50 * MBIT

WINDOW_S, EVERY_S = 1.0, 0.05
FILLING_S = 0.3
"""The source has filled the link's buffers long before."""
LEAST_TURN_BITS = SMALLEST_QUANTUM_BYTES * 8
LATE_S = DELAY_TOLERANCE_S + QUANTUM_S

MESSAGE = struct.Struct("d56x")
LEAST_BPS = 0.1 * MBIT
"""Five times the messages' own rate: a slower link is not idle with them, and they are not sent."""

WATCH_S = 0.002
TIMER_S = 0.002
"""A timer comes up to 1 ms late by itself, and something else may be in the way."""
HELD_S, MESSAGE_HELD_S = 0.003, 0.0015
"""Held up for longer than this is too long. A message meets three turns of the loop in its 5 ms."""
CATCHING_UP_S = 0.01
LEAST_SHARE = 0.1

STRETCH_S = 4.0
LONG_STRETCH_S = 60.0
UNSAID_DELAY_S = 0.02
"""Of a link whose trace has no round trip."""

MEDIANS_BPS = {"walk": 8 * MBIT, "bursts": 50 * MBIT, "drive": 14 * MBIT, "outages": 10 * MBIT}
REAL = ("5g_lte_hspa_handover_car", "lte_att_driving_up")
ALL_REAL = (
    "3g_hsdpa_metro_tunnel",
    "5g_lte_hspa_handover_car",
    "5g_mmwave_walking",
    "5g_static_rssi",
    "lte_att_driving_up",
    "lte_car_rssi",
    "starlink_car_up",
    "wifi5_office",
    "wifi_linkquality_rssi_loss",
    "wifi_walk_out",
)

Way = Literal["uplink", "downlink"]
WAYS: tuple[Way, Way] = ("uplink", "downlink")
Found = TypeVar("Found", "Window", "Message")


def steps(step_s: float, *rows: tuple[float, float]) -> Trace:
    """Mbit/s and the round trip in ms, one row after the other."""
    return Trace(
        tuple(Sample(i * step_s, rate * MBIT, rtt / 1000) for i, (rate, rtt) in enumerate(rows)), step_s, False
    )


STEPS = steps(1.5, (1, 40), (50, 20), (5, 60), (0.3, 100), (10, 40))
LONG_WAY = steps(1.5, (50, 200), (5, 200), (0, 200))


def stretch(trace: Trace, seconds: float) -> Trace:
    """The part of a trace in which its rate changes most, cut off at the top."""
    count = min(round(seconds / trace.step_s), len(trace.samples))
    rates_bps = [min(sample.bandwidth_bps, TOP_BPS) for sample in trace.samples]
    changes = [0.0, *(abs(math.sqrt(b) - math.sqrt(a)) for a, b in pairwise(rates_bps))]
    at = max(range(len(rates_bps) - count + 1), key=lambda at: sum(changes[at + 1 : at + count]))
    part = zip(trace.samples[at : at + count], rates_bps[at : at + count], strict=True)
    samples = (replace(s, time_s=i * trace.step_s, bandwidth_bps=bps) for i, (s, bps) in enumerate(part))
    return Trace(tuple(samples), trace.step_s, loop=False)


def made_trace(kind: str) -> Trace:
    return stretch(made(Made(kind=kind, duration_s=300, median_bps=MEDIANS_BPS[kind])), STRETCH_S)


def real_trace(name: str, seconds: float = STRETCH_S) -> Trace:
    """Skips the test where the file is not there."""
    return stretch(read_trace(shared_data() / "traces" / f"{name}.csv"), seconds)


@dataclass(frozen=True)
class Ideal:
    """A link that follows a trace without fault, in the trace's time. Before its start it is as at the start."""

    trace: Trace

    def rate_bps(self, time_s: float) -> float:
        return self.trace.at(max(time_s, 0.0)).bandwidth_bps

    def delay_s(self, time_s: float) -> float:
        rtt_s = self.trace.at(max(time_s, 0.0)).rtt_s
        return UNSAID_DELAY_S if rtt_s is None else rtt_s / 2

    def sent_bits(self, time_s: float) -> float:
        """What has been let onto the link, counted from the start of the trace."""
        if time_s < 0:
            return time_s * self.rate_bps(0)
        spans = ((max(0.0, min(end_s, time_s) - begin_s), begin_s) for begin_s, end_s in self._spans())
        return sum(span_s * self.rate_bps(begin_s) for span_s, begin_s in spans)

    def sent_s(self, time_s: float) -> float:
        """When that was sent which arrives next: the first moment whose delay ends later than this."""
        for begin_s, end_s in self._spans():
            sent_s = time_s - self.delay_s(begin_s)
            if begin_s > 0:
                sent_s = max(sent_s, begin_s)
            if sent_s < end_s:
                return sent_s
        raise AssertionError("the last span has no end")

    def arrived_bits(self, time_s: float) -> float:
        """What has come out at the far end: all that was sent before what is still on its way."""
        return self.sent_bits(self.sent_s(time_s))

    def late_bits(self, time_s: float) -> float:
        """What has come out but may not have yet, because it was sent late or arrives late."""
        arrivals_late, sendings_late = self.sent_s(time_s - LATE_S), self.sent_s(time_s) - LATE_S
        return self.arrived_bits(time_s) - self.sent_bits(min(arrivals_late, sendings_late))

    def early_bits(self, time_s: float) -> float:
        """What has not come out but may have: where the delay fell, what is held up by the order alone.

        The last turn before the step, which it waits for, may have been a while before the step.
        """
        ends_s = ((begin_s, end_s, time_s - self.delay_s(begin_s)) for begin_s, end_s in self._spans())
        sent_s = max((min(sent_s, end_s) for begin_s, end_s, sent_s in ends_s if begin_s <= sent_s), default=-math.inf)
        return self.sent_bits(max(sent_s, self.sent_s(time_s))) - self.arrived_bits(time_s)

    def steps_s(self, begin_s: float, end_s: float) -> list[float]:
        """Those that what arrives in a window was sent across."""
        first_s, last_s = self.sent_s(begin_s), self.sent_s(end_s)
        return [step_s for step_s, _ in self._spans() if first_s <= step_s <= last_s]

    def step_bits(self, begin_s: float, end_s: float) -> float:
        """What steps that come as late as a timer does make in a window."""
        rates_bps = [
            (self.rate_bps(step_s - TIMER_S), self.rate_bps(step_s)) for step_s in self.steps_s(begin_s, end_s)
        ]
        return TIMER_S * sum(abs(after - before) for before, after in rates_bps)

    def _spans(self) -> list[tuple[float, float]]:
        begins_s = [sample.time_s for sample in self.trace.samples]
        return list(zip(begins_s, [*begins_s[1:], math.inf], strict=True))


@dataclass(frozen=True)
class Window:
    """What arrived in a second, and what may have: bits. clear: the loop was not held up at its edges."""

    begin_s: float
    passed: float
    ideal: float
    least: float
    most: float
    clear: bool

    def __str__(self) -> str:
        allowed = f"{self.least:,.0f} to {self.most:,.0f}"
        return f"from {self.begin_s:.2f} s: {self.passed:,.0f} bits, not {self.ideal:,.0f} ({allowed})"

    @property
    def holds(self) -> bool:
        return self.least <= self.passed <= self.most


@dataclass(frozen=True)
class Message:
    """When it was sent, how much too late it came, and how much of that its own bits take."""

    sent_s: float
    error_s: float
    slow_s: float
    clear: bool

    def __str__(self) -> str:
        return f"sent at {self.sent_s:.3f} s: {1000 * self.error_s:+.1f} ms, its bits take {1000 * self.slow_s:.1f} ms"

    @property
    def holds(self) -> bool:
        return -DELAY_TOLERANCE_S <= self.error_s <= DELAY_TOLERANCE_S + self.slow_s


@dataclass(frozen=True)
class Arrivals:
    """Bytes received at the far end: when, and how many till then."""

    times_s: list[float] = field(default_factory=lambda: [-math.inf])
    totals_bytes: list[int] = field(default_factory=lambda: [0])

    async def note(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(sock, 65_536):
            self.times_s.append(loop.time())
            self.totals_bytes.append(self.totals_bytes[-1] + len(data))

    def bits(self, time_s: float) -> int:
        return 8 * self.totals_bytes[bisect_right(self.times_s, time_s) - 1]


class Watch:
    """Notes when the event loop was held up."""

    def __init__(self) -> None:
        self._held: list[tuple[float, float]] = []

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            begin_s = loop.time()
            await asyncio.sleep(WATCH_S)
            if loop.time() - begin_s > WATCH_S + MESSAGE_HELD_S:
                self._held.append((begin_s, loop.time()))

    def longest_s(self, begin_s: float, end_s: float) -> float:
        """How long at a stretch, of what touches this time; 0 if it was never worth a note."""
        touching = (until_s - from_s for from_s, until_s in self._held if begin_s <= until_s and from_s <= end_s)
        return max(touching, default=WATCH_S) - WATCH_S


@dataclass(frozen=True)
class Setup:
    """A link with one connection through it."""

    link: EmulatedLink
    agent: socket.socket
    broker: socket.socket

    def ends(self, way: Way) -> tuple[socket.socket, socket.socket]:
        """Where it begins and where it arrives."""
        return (self.agent, self.broker) if way == "uplink" else (self.broker, self.agent)


@asynccontextmanager
async def connected(ideal: Ideal) -> AsyncIterator[Setup]:
    """As the trace begins."""
    loop = asyncio.get_running_loop()
    rate_bps, delay_s = ideal.rate_bps(0), ideal.delay_s(0)
    with ExitStack() as sockets:
        listener = sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
        link = EmulatedLink(
            broker_host="127.0.0.1",
            broker_port=listener.getsockname()[1],
            uplink=Bucket(rate_bps),
            downlink=Bucket(rate_bps),
            uplink_delay_s=delay_s,
            downlink_delay_s=delay_s,
        )
        async with link:
            agent = sockets.enter_context(socket.socket())
            for sock in (listener, agent):
                sock.setblocking(False)
            await loop.sock_connect(agent, (link.host, link.port))
            broker = sockets.enter_context((await loop.sock_accept(listener))[0])
            for sock in (agent, broker):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield Setup(link, agent, broker)


@asynccontextmanager
async def beside(*work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(each) for each in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def fill(sock: socket.socket) -> None:
    while True:
        await asyncio.get_running_loop().sock_sendall(sock, bytes(65_536))


async def windows(ideal: Ideal, watch: Watch) -> dict[Way, list[Window]]:
    """Of a link that is full both ways."""
    loop = asyncio.get_running_loop()
    arrived = {way: Arrivals() for way in WAYS}
    async with connected(ideal) as setup:
        sources = [fill(setup.ends(way)[0]) for way in WAYS]
        sinks = [arrived[way].note(setup.ends(way)[1]) for way in WAYS]
        async with beside(*sources, *sinks):
            await asyncio.sleep(FILLING_S)
            start_s = loop.time()
            await follow(setup.link, ideal.trace)
            await asyncio.sleep(start_s + ideal.trace.duration_s + DELAY_TOLERANCE_S - loop.time())
    count = round((ideal.trace.duration_s - WINDOW_S) / EVERY_S) + 1
    return {way: [window(ideal, arrived[way], watch, start_s, i * EVERY_S) for i in range(count)] for way in WAYS}


def window(ideal: Ideal, arrivals: Arrivals, watch: Watch, start_s: float, begin_s: float) -> Window:
    end_s = begin_s + WINDOW_S
    bits = ideal.arrived_bits(end_s) - ideal.arrived_bits(begin_s)
    few = LEAST_TURN_BITS + ideal.step_bits(begin_s, end_s)
    missing = max(RATE_TOLERANCE * bits, few + ideal.late_bits(end_s) + ideal.early_bits(begin_s))
    more = max(RATE_TOLERANCE * bits, few + ideal.late_bits(begin_s) + ideal.early_bits(end_s))
    return Window(
        begin_s=begin_s,
        passed=arrivals.bits(start_s + end_s) - arrivals.bits(start_s + begin_s),
        ideal=bits,
        least=bits - missing,
        most=bits + more,
        clear=was_clear(ideal, watch, start_s, begin_s, end_s),
    )


def was_clear(ideal: Ideal, watch: Watch, start_s: float, begin_s: float, end_s: float) -> bool:
    """Whether the loop was held up neither when it mattered nor for longer than an idle channel may save up."""
    sent_s = ideal.sent_s(begin_s), ideal.sent_s(end_s)
    decisive_s = [start_s + at_s for at_s in (begin_s, end_s, *sent_s, *ideal.steps_s(begin_s, end_s))]
    late_s = max(watch.longest_s(at_s - CATCHING_UP_S, at_s) for at_s in decisive_s)
    return late_s <= HELD_S and watch.longest_s(start_s + begin_s, start_s + end_s) <= BURST_S


@dataclass(frozen=True)
class Post:
    """One direction of a link that carries nothing but stamped messages."""

    ideal: Ideal
    start_s: float
    sent_s: list[float] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)

    async def send(self, sock: socket.socket, dice: random.Random) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(dice.uniform(0.015, 0.035))
            now_s = loop.time()
            at_s = now_s - self.start_s
            if min(self.ideal.rate_bps(at_s), self.ideal.rate_bps(at_s + DELAY_TOLERANCE_S)) >= LEAST_BPS:
                await loop.sock_sendall(sock, MESSAGE.pack(now_s))

    async def receive(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        held = b""
        while data := await loop.sock_recv(sock, 65_536):
            held += data
            whole = len(held) // MESSAGE.size * MESSAGE.size
            for (sent_s,) in MESSAGE.iter_unpack(held[:whole]):
                self.sent_s.append(sent_s)
                self.arrived_s.append(loop.time())
            held = held[whole:]

    def messages(self, watch: Watch) -> list[Message]:
        found, last_due_s = [], -math.inf
        for sent_s, arrived_s in zip(self.sent_s, self.arrived_s, strict=True):
            at_s = sent_s - self.start_s
            # A step may come a little late, so for what is sent just behind it either delay will do.
            dues_s = [max(last_due_s, sent_s + self.ideal.delay_s(s)) for s in (at_s, at_s - DELAY_TOLERANCE_S)]
            last_due_s = min(dues_s, key=lambda due_s: abs(arrived_s - due_s))
            slow_s = 8 * MESSAGE.size / self.ideal.rate_bps(at_s)
            found.append(
                Message(at_s, arrived_s - last_due_s, slow_s, watch.longest_s(sent_s, arrived_s) <= MESSAGE_HELD_S)
            )
        return found


async def messages(ideal: Ideal, watch: Watch) -> dict[Way, list[Message]]:
    """Of a link that carries nothing else."""
    dice = random.Random(0)
    async with connected(ideal) as setup:
        posts = {way: Post(ideal, asyncio.get_running_loop().time()) for way in WAYS}
        async with asyncio.TaskGroup() as receivers:
            for way, post in posts.items():
                receivers.create_task(post.receive(setup.ends(way)[1]))
            async with beside(*(post.send(setup.ends(way)[0], dice) for way, post in posts.items())):
                await follow(setup.link, ideal.trace)
                await asyncio.sleep(ideal.trace.step_s)
            for way in WAYS:
                setup.ends(way)[0].shutdown(socket.SHUT_WR)
    return {way: post.messages(watch) for way, post in posts.items()}


Measure = Callable[[Ideal, Watch], Coroutine[None, None, dict[Way, list[Found]]]]


async def check(measure: Measure[Found], traces: Sequence[Trace]) -> None:
    """Every window or message of every trace, all traces at once; in a second run if the first does not satisfy."""
    verdict = ""
    for _ in range(2):
        watch = Watch()
        async with beside(watch.run()):
            runs = await asyncio.gather(*(measure(Ideal(trace), watch) for trace in traces))
        found = [(way, each) for run in runs for way in WAYS for each in run[way]]
        clear = [(way, each) for way, each in found if each.clear]
        wrong = [f"{way} {each}" for way, each in clear if not each.holds]
        if wrong:
            verdict = f"{len(wrong)} of {len(clear)}: " + "; ".join(wrong[:10])
        elif len(clear) < LEAST_SHARE * len(found) or not clear:
            verdict = f"the machine is too busy to measure on it: {len(clear)} of {len(found)} were not held up"
        else:
            return
    pytest.fail(verdict)


def test_the_ideal_link_lets_out_what_went_in_a_delay_before_and_keeps_the_order() -> None:
    ideal = Ideal(steps(1.0, (10, 200), (2, 400), (4, 40)))
    assert ideal.sent_bits(2.5) == pytest.approx(14 * MBIT)
    told = {-0.5: -6, 0.0: -1, 0.6: 5, 1.1: 10, 1.15: 10, 1.2: 10, 1.7: 11, 2.19: 11.98, 2.2: 12.72, 2.52: 14}
    for time_s, mbit in told.items():
        assert ideal.arrived_bits(time_s + 1e-9) == pytest.approx(mbit * MBIT, abs=100)


def one_of(names: Iterable[str]) -> list[object]:
    """The first always, the others when there is time."""
    first, *others = names
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


async def test_a_full_link_passes_the_rate_of_steps_in_every_window() -> None:
    await check(windows, [STEPS])


async def test_a_full_link_passes_the_rate_behind_a_steep_drop_with_much_on_its_way() -> None:
    await check(windows, [LONG_WAY])


@pytest.mark.parametrize("kind", one_of(KINDS))
async def test_a_full_link_passes_the_rate_of_a_made_trace_in_every_window(kind: str) -> None:
    await check(windows, [made_trace(kind)])


@pytest.mark.parametrize("name", one_of(REAL))
async def test_a_full_link_passes_the_rate_of_a_real_trace_in_every_window(name: str) -> None:
    await check(windows, [real_trace(name)])


async def test_an_idle_link_has_half_the_round_trip_of_steps_and_made_traces_each_way() -> None:
    await check(messages, [STEPS, *map(made_trace, KINDS)])


async def test_an_idle_link_has_half_the_round_trip_of_real_traces_each_way() -> None:
    await check(messages, [real_trace(name) for name in REAL])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ALL_REAL)
async def test_a_full_link_passes_the_rate_of_a_real_trace_in_every_window_of_a_minute(name: str) -> None:
    await check(windows, [real_trace(name, LONG_STRETCH_S)])


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_an_idle_link_has_half_the_round_trip_of_all_real_traces_for_a_minute() -> None:
    await check(messages, [real_trace(name, LONG_STRETCH_S) for name in ALL_REAL])
