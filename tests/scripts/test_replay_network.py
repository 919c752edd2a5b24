"""Flows in virtual time against integrals, and against the same network in ten thousand small steps."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.replay.clock import run_virtual
from scripts.replay.network import Flow, Network
from scripts.traces import Sample, Trace

MBIT = 1e6


def trace(rates: Sequence[float], step_s: float = 1.0, *, loop: bool = True) -> Trace:
    return Trace(tuple(Sample(index * step_s, rate) for index, rate in enumerate(rates)), step_s, loop)


def play(story: Callable[[], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        return await story()

    return run_virtual(run(), limit_s=1e6)


def now_s() -> float:
    return asyncio.get_running_loop().time()


def when_moved(rates: Trace | float, bits: float, start_s: float = 0.0) -> float:
    async def story() -> float:
        await asyncio.sleep(start_s)
        flow = Network({"up": rates}).flow(["up"])
        flow.add(bits)
        await flow.moved(bits)
        return now_s()

    found: float = play(story)
    return found


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0, 7.3, 40.0]), min_size=1, max_size=12).filter(any),
    st.sampled_from([0.1, 0.7, 1.0]),
    st.floats(0.01, 300),
    st.floats(0, 20),
)
@settings(deadline=None)
def test_a_lone_flow_is_through_when_the_rates_integral_is(
    mbps: list[float], step_s: float, mbits: float, start_s: float
) -> None:
    rates = trace([rate * MBIT for rate in mbps], step_s)
    end_s = when_moved(rates, mbits * MBIT, start_s)
    steps = np.arange(math.ceil((end_s + step_s) / step_s)) * step_s
    values = np.array([rates.at(at + step_s / 2).bandwidth_bps for at in steps])
    overlap_s = np.clip(np.minimum(steps + step_s, end_s) - np.maximum(steps, start_s), 0, None)
    assert (values * overlap_s).sum() == pytest.approx(mbits * MBIT, rel=1e-6, abs=40 * MBIT * 1e-6)


def test_a_constant_rate_needs_no_trace() -> None:
    assert when_moved(4 * MBIT, 2 * MBIT) == pytest.approx(0.5)


def test_a_trace_that_does_not_loop_holds_its_last_rate() -> None:
    assert when_moved(trace([1 * MBIT, 2 * MBIT], loop=False), 9 * MBIT) == pytest.approx(1 + 4)


def test_flows_of_one_channel_share_it_alike_and_the_rest_is_the_others() -> None:
    async def story() -> list[float]:
        network = Network({"up": 6 * MBIT})
        short, long, paced = (network.flow(["up"], pace_bps=pace) for pace in (math.inf, math.inf, 1 * MBIT))
        for flow, mbits in ((short, 2.5), (long, 10.0), (paced, 3.0)):
            flow.add(mbits * MBIT)
        assert [flow.rate_bps / MBIT for flow in (short, long, paced)] == pytest.approx([2.5, 2.5, 1])
        await short.moved(2.5 * MBIT)
        ends = [now_s()]
        assert long.rate_bps == pytest.approx(5 * MBIT)
        await long.moved(10 * MBIT)
        ends.append(now_s())
        paced.set_pace(6 * MBIT)
        await paced.moved(3 * MBIT)
        return [*ends, now_s()]

    one, two, three = play(story)
    assert (one, two) == pytest.approx((1.0, 1.0 + 7.5 / 5))
    assert three == pytest.approx(two + (3.0 - two) / 6)


def test_a_cell_is_passed_twice_and_the_slower_of_two_ways_counts() -> None:
    async def story() -> list[float]:
        network = Network({"cell": 8 * MBIT, "up": 2 * MBIT, "down": 5 * MBIT})
        twice, over = network.flow(["cell", "cell"]), network.flow(["up", "down"])
        twice.add(1e9)
        over.add(1e9)
        return [twice.rate_bps / MBIT, over.rate_bps / MBIT]

    assert play(story) == pytest.approx([4, 2])


def test_a_flow_waits_for_what_is_not_there_yet_and_gives_its_share_meanwhile() -> None:
    async def story() -> None:
        network = Network({"up": 2 * MBIT})
        sliced, other = network.flow(["up"]), network.flow(["up"])
        other.add(100 * MBIT)
        sliced.add(1 * MBIT)
        await sliced.moved(1 * MBIT)
        assert now_s() == pytest.approx(1.0)
        assert (sliced.rate_bps, other.rate_bps) == (0, 2 * MBIT)
        await asyncio.sleep(3)
        sliced.add(1 * MBIT)
        assert sliced.rate_bps == other.rate_bps == 1 * MBIT
        await sliced.moved(1.5 * MBIT)
        assert now_s() == pytest.approx(4.5)
        sliced.end()
        assert other.rate_bps == 2 * MBIT
        assert other.moved_bits == pytest.approx((1 + 3 * 2 + 0.5) * MBIT)

    play(story)


def test_a_flow_that_finishes_takes_its_share_until_what_was_given_has_moved() -> None:
    async def story() -> None:
        network = Network({"up": 2 * MBIT})
        left, other = network.flow(["up"]), network.flow(["up"])
        other.add(100 * MBIT)
        left.add(1 * MBIT)
        await asyncio.sleep(0.5)
        left.finish()
        assert left.rate_bps == other.rate_bps == 1 * MBIT
        await asyncio.sleep(0.6)
        assert left.moved_bits == pytest.approx(1 * MBIT)
        assert other.rate_bps == 2 * MBIT
        assert list(network.channels["up"].flows) == [other]
        other.end()
        idle = network.flow(["up"])
        idle.finish()
        assert not network.channels["up"].flows

    play(story)


def test_an_outage_holds_what_is_on_its_way_and_everybody_near_it_gains() -> None:
    async def story() -> None:
        network = Network({"a": trace([1 * MBIT, 0, 1 * MBIT]), "b": 9 * MBIT, "down": 2 * MBIT})
        cut, other = network.flow(["a", "down"]), network.flow(["b", "down"])
        cut.add(1.5 * MBIT)
        other.add(100 * MBIT)
        await asyncio.sleep(1.5)
        assert (cut.rate_bps, other.rate_bps) == (0, 2 * MBIT)
        await cut.moved(1.5 * MBIT)
        assert now_s() == pytest.approx(2.5)

    play(story)


@dataclass(frozen=True)
class Sent:
    """A flow of a drawn scene."""

    start_s: float
    bits: float
    passes: tuple[str, ...]
    pace_bps: float


CHANNELS = ("a", "b", "c")
scenes = st.tuples(
    st.fixed_dictionaries(
        {
            name: st.lists(st.sampled_from([0.0, 0.4, 1.0, 2.0, 5.0]), min_size=1, max_size=4).filter(any)
            for name in CHANNELS
        }
    ),
    st.lists(
        st.builds(
            Sent,
            st.sampled_from([0.0, 0.25, 0.6, 1.3]),
            st.floats(0.05, 3).map(lambda mbits: mbits * MBIT),
            st.sampled_from([("a",), ("b",), ("a", "b"), ("b", "c"), ("a", "a"), ("c",)]),
            st.sampled_from([math.inf, math.inf, 0.3 * MBIT]),
        ),
        min_size=1,
        max_size=5,
    ),
)


def by_small_steps(rates: Mapping[str, Trace], sent: Sequence[Sent], until_s: float, step_s: float) -> list[float]:
    """Bits that each has moved by then, every step with rates by a water level that is raised in thousandths."""
    moved = np.zeros(len(sent))
    uses = np.array([[each.passes.count(name) for name in CHANNELS] for each in sent], dtype=float)
    pace = np.array([each.pace_bps for each in sent])
    bits = np.array([each.bits for each in sent])
    begins = np.array([each.start_s for each in sent])
    for step in range(round(until_s / step_s)):
        at_s = step * step_s
        active = (begins <= at_s + 1e-9) & (moved < bits)
        left = np.array([rates[name].at(at_s + step_s / 2).bandwidth_bps for name in CHANNELS])
        rate, going = np.zeros(len(sent)), active.copy()
        while going.any():
            weight = uses[going].sum(axis=0)
            most = np.min(left[weight > 0] / weight[weight > 0])
            most = min(most, float(np.min(pace[going] - rate[going])))
            rate[going] += most
            left = left - weight * most
            closed = left <= 1e-6
            going &= (rate < pace - 1e-6) & ~(uses[:, closed] > 0).any(axis=1)
        moved = np.minimum(moved + rate * step_s, bits)
    return [float(each) for each in moved]


@given(scenes, st.floats(0.2, 6))
@settings(deadline=None, max_examples=60)
def test_a_network_moves_what_the_same_one_in_small_steps_moves(
    scene: tuple[Mapping[str, list[float]], list[Sent]], until_s: float
) -> None:
    mbps, sent = scene
    rates = {name: trace([rate * MBIT for rate in each], 0.5) for name, each in mbps.items()}
    step_s = 1e-3
    until_s = round(until_s, 2)

    async def story() -> list[float]:
        network = Network(rates)
        flows: dict[int, Flow] = {}

        async def one(index: int, each: Sent) -> None:
            await asyncio.sleep(each.start_s)
            flows[index] = network.flow(each.passes, each.pace_bps)
            flows[index].add(each.bits)
            await flows[index].moved(each.bits)

        tasks = [asyncio.create_task(one(index, each)) for index, each in enumerate(sent)]
        await asyncio.sleep(until_s)
        found = [flows[index].moved_bits if index in flows else 0.0 for index in range(len(sent))]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return found

    expected = by_small_steps(rates, sent, until_s, step_s)
    # each change of rates may be seen a step late, and what one gets another lacks
    assert play(story) == pytest.approx(expected, rel=0.01, abs=5 * MBIT * step_s * (4 + 2 * len(sent)))


@pytest.mark.parametrize("order", list(permutations("abc")))
@pytest.mark.parametrize("stepping", [False, True])
def test_what_ends_in_one_instant_frees_all_its_channels(order: Sequence[str], stepping: bool) -> None:
    """b passes both channels and ends when a does, or when x has another rate; c must have y to itself then."""

    async def story() -> float:
        x = trace([2 * MBIT, 3 * MBIT], loop=False) if stepping else 2 * MBIT
        network = Network({"x": x, "y": 2 * MBIT})
        sent = {"a": (["x"], 1 * MBIT), "b": (["x", "y"], 1 * MBIT), "c": (["y"], 5 * MBIT)}
        flows = {name: network.flow(sent[name][0]) for name in order}
        for name in order:
            flows[name].add(sent[name][1])
        await flows["c"].moved(5 * MBIT)
        return now_s()

    assert play(story) == pytest.approx(1 + 4 / 2)


def test_a_grid_that_is_not_quite_even_is_followed_by_its_own_times() -> None:
    times = [0.0, 1.009, *(1.009 + second for second in range(1, 400))]
    rates = [(1 + index // 10 % 2) * MBIT for index in range(len(times))]
    uneven = Trace(tuple(map(Sample, times, rates)), 1.009, loop=False)
    bits = float(np.dot(np.diff(times), rates[:-1]))
    assert when_moved(uneven, bits) == pytest.approx(times[-1], abs=1e-3)


def test_time_passes_on_a_machine_that_has_been_up_for_years() -> None:
    async def story() -> float:
        for _ in range(5):
            await asyncio.sleep(0.5)
        return now_s()

    assert run_virtual(story(), start_s=1e8) == pytest.approx(1e8 + 2.5, abs=1e-3)


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused_by_the_channels_name(rate: float) -> None:
    with pytest.raises(ValueError, match="channel up"):
        Network({"up": rate})


def test_a_flow_over_nothing_is_refused() -> None:
    async def story() -> None:
        with pytest.raises(ValueError, match="at least one channel"):
            Network({}).flow([])

    play(story)
