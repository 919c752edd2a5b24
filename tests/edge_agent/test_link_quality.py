"""The link meter's estimates against a link whose delays are known, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_config import topics
from broker_config.bus import Handler, Subscription
from broker_config.errors import BrokerUnreachable
from broker_config.messages import Probe
from broker_config.topics import Topic
from edge_agent import link_quality
from edge_agent.flow import Flow
from edge_agent.link_quality import LARGEST_PROBE_BYTES, QUIET_S, SMALLEST_PROBE_BYTES, LinkMeter, signal_dbm
from scripts.replay.clock import run_virtual
from tests.memory_bus import MemoryBroker

MEGABIT = 1e6
ROUTE = {"agent": "pi-1"}


class Link:
    """A bus over one access link: a publish is acknowledged after round_trip_s + size / uplink, and what it carries is
    delivered size / downlink later."""

    site = "home"

    def __init__(self, *, up_bps: float = 8e6, down_bps: float = 4e6, round_trip_s: float = 0.02) -> None:
        self.up_bps, self.down_bps, self.round_trip_s = up_bps, down_bps, round_trip_s
        self.handler: Handler[Probe] | None = None
        self.published: list[tuple[float, str, int]] = []
        self.broken: Exception | None = None
        self.silent = False

    async def publish(self, topic: Topic[Any], message: Any, **parameters: str) -> None:
        now = asyncio.get_running_loop().time()
        bits = 8 * len(message.padding)
        self.published.append((now, topic.pattern, len(message.padding)))
        if self.broken:
            raise self.broken
        await asyncio.sleep(self.round_trip_s + bits / self.up_bps)
        if topic is topics.PROBES and self.handler and not self.silent:
            asyncio.get_running_loop().call_later(bits / self.down_bps, self.handler, message, parameters)

    async def subscribe(self, topic: Topic[Any], handler: Handler[Any], **parameters: str) -> Subscription:
        assert topic is topics.PROBES
        assert parameters == ROUTE
        self.handler = handler
        return SimpleNamespace()  # the meter keeps it for ever


def now_s() -> float:
    """The loop's time, which is virtual here."""
    return asyncio.get_running_loop().time()


def moving(transfer: str, **options: Any) -> Flow:
    """A transfer that reads it, as the meter does."""
    return Flow(transfer, clock=now_s, **options)


def metered(link: Link, work: Callable[[LinkMeter], Awaitable[None]], wireless: Path = Path("/nowhere")) -> LinkMeter:
    """Do something with a meter on this link, in virtual time."""

    async def run() -> LinkMeter:
        await asyncio.sleep(1)  # no clock begins at 0 when an agent starts
        meter = LinkMeter(bulk=link, agent="pi-1", signal=partial(signal_dbm, wireless), clock=now_s)
        await link.subscribe(topics.PROBES, meter._back, agent="pi-1")
        await work(meter)
        return meter

    return run_virtual(run())


async def three_probes(meter: LinkMeter) -> None:
    for _ in range(3):
        await meter.probe()


def test_before_the_first_probe_nothing_is_claimed() -> None:
    async def nothing(meter: LinkMeter) -> None:
        pass

    quality = metered(Link(), nothing).quality
    assert (quality.round_trip_s, quality.uplink_bps, quality.downlink_bps, quality.signal_dbm) == (None,) * 4


@given(st.floats(0.2, 200), st.floats(0.2, 200), st.floats(0.0005, 0.05))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip_and_both_rates_are_found(up: float, down: float, round_trip_s: float) -> None:
    link = Link(up_bps=up * MEGABIT, down_bps=down * MEGABIT, round_trip_s=round_trip_s)
    quality = metered(link, three_probes).quality
    assert quality.round_trip_s == pytest.approx(round_trip_s, rel=0.01)
    assert quality.uplink_bps is not None
    # a link that is over before its round trip can't be told from a faster one, up to the bound against division by 0
    size_s = 8 * SMALLEST_PROBE_BYTES / link.up_bps
    if size_s > round_trip_s / 5:
        assert quality.uplink_bps == pytest.approx(link.up_bps, rel=0.05)
    if 8 * SMALLEST_PROBE_BYTES / link.down_bps > (round_trip_s + size_s) / 5:
        assert quality.downlink_bps == pytest.approx(link.down_bps, rel=0.05)


def test_a_probe_grows_and_shrinks_with_the_link_and_stays_within_bounds() -> None:
    link = Link(up_bps=8e6, down_bps=8e6, round_trip_s=0.001)
    sizes: list[int] = []

    async def watch(meter: LinkMeter) -> None:
        for rate in (8e6, 8e6, 1e10, 1e10, 1e10, 3e6, 1e6, 1e5, 1e5):
            link.up_bps = link.down_bps = rate
            await meter.probe()
            sizes.append(link.published[-1][2])

    metered(link, watch)
    assert sizes[0] == SMALLEST_PROBE_BYTES
    assert sizes[1] == pytest.approx(100_000, rel=0.05)  # a tenth of a second
    assert max(sizes) == LARGEST_PROBE_BYTES
    assert sizes[-1] == SMALLEST_PROBE_BYTES


def test_a_link_that_became_too_slow_for_the_last_probe_is_found_out_with_a_small_one() -> None:
    link = Link(up_bps=1e9, down_bps=1e9, round_trip_s=0.001)

    async def slow_down(meter: LinkMeter) -> None:
        await three_probes(meter)
        link.down_bps = 3e5  # the largest probe would now take half a minute
        with pytest.raises(TimeoutError):
            await meter.probe()
        await meter.probe()
        await meter.probe()
        assert meter.quality.downlink_bps == pytest.approx(3e5, rel=0.05)

    metered(link, slow_down)


def test_one_slow_probe_changes_nothing_and_a_changed_link_is_seen_at_the_second() -> None:
    link = Link(up_bps=8e6, down_bps=8e6)

    async def change(meter: LinkMeter) -> None:
        await three_probes(meter)
        link.up_bps = link.down_bps = 1e6
        await meter.probe()
        link.up_bps = link.down_bps = 8e6
        assert meter.quality.uplink_bps == pytest.approx(8e6, rel=0.05)
        await three_probes(meter)
        link.up_bps = link.down_bps = 1e6
        await meter.probe()
        await meter.probe()
        assert meter.quality.uplink_bps == pytest.approx(1e6, rel=0.05)
        assert meter.quality.downlink_bps == pytest.approx(1e6, rel=0.05)

    metered(link, change)


@pytest.mark.parametrize("silent", [True, False])
def test_a_probe_that_is_lost_or_refused_ends_and_claims_nothing(silent: bool) -> None:
    link = Link()
    link.silent = silent
    link.broken = None if silent else BrokerUnreachable("home", "it is down")

    async def probe(meter: LinkMeter) -> None:
        with pytest.raises((TimeoutError, BrokerUnreachable)):
            await meter.probe()
        assert meter.quality.round_trip_s is None
        link.silent, link.broken = False, None
        await meter.probe()
        assert meter.quality.round_trip_s == pytest.approx(link.round_trip_s, rel=0.01)

    metered(link, probe)


def test_a_late_echo_of_an_earlier_probe_is_not_taken_for_this_one() -> None:
    link = Link(round_trip_s=0.5)

    async def probe(meter: LinkMeter) -> None:
        probing = asyncio.create_task(meter.probe())
        await asyncio.sleep(0.1)
        meter._back(Probe(sequence=0), ROUTE)
        await probing
        meter._back(Probe(sequence=1), ROUTE)  # nobody waits any more
        assert meter.quality.round_trip_s == pytest.approx(0.5, rel=0.01)

    metered(link, probe)


def test_the_link_is_left_alone_during_and_shortly_after_a_transfer() -> None:
    link = Link()

    async def run(meter: LinkMeter) -> None:
        with meter.transferring():
            probing = asyncio.create_task(meter.run(0.1))
            await asyncio.sleep(5)
            assert link.published == []
            with meter.transferring():
                pass
            await asyncio.sleep(5)
            assert link.published == []  # the outer one still runs
        ended_s = asyncio.get_running_loop().time()
        await asyncio.sleep(5)
        assert link.published[0][0] >= ended_s + QUIET_S
        probing.cancel()

    metered(link, run)


def test_a_probe_during_which_a_transfer_began_is_thrown_away() -> None:
    async def run(meter: LinkMeter) -> None:
        probing = asyncio.create_task(meter.probe())
        await asyncio.sleep(0.01)
        with meter.transferring():
            await probing
        assert meter.quality.round_trip_s is None

    metered(Link(), run)


def test_probing_goes_on_after_a_fault_and_keeps_its_interval() -> None:
    link = Link()

    async def run(meter: LinkMeter) -> None:
        link.broken = BrokerUnreachable("home", "it is down")
        probing = asyncio.create_task(meter.run(3.0))
        await asyncio.sleep(10)
        assert [at for at, _, _ in link.published] == pytest.approx([1.0, 4.0, 7.0, 10.0], abs=0.01)
        link.broken = None
        await asyncio.sleep(5)
        assert meter.quality.uplink_bps == pytest.approx(link.up_bps, rel=0.05)
        probing.cancel()

    metered(link, run)


def test_a_large_transfer_that_was_faster_is_believed_and_a_slower_or_small_one_is_not() -> None:
    link = Link(up_bps=8e6, down_bps=4e6)

    async def run(meter: LinkMeter) -> None:
        await three_probes(meter)
        before = meter.quality
        meter.sent(2**20, 10.0)
        meter.received(2**20, 10.0)
        meter.sent(10_000, 1e-6)
        meter.received(2**30, 0.0)
        assert meter.quality == before
        meter.sent(2**21, 1.0)
        meter.received(2**22, 1.0)
        assert meter.quality.uplink_bps == 8 * 2**21
        assert meter.quality.downlink_bps == 8 * 2**22

    metered(link, run)


async def moved(flow: Flow, bytes_per_s: float, seconds: float = 1.0) -> None:
    start = flow.moved_bytes
    for step in range(1, round(seconds / 0.05) + 1):
        await asyncio.sleep(0.05)
        flow.moved(int(start + bytes_per_s * step * 0.05))


def test_transfers_under_way_move_the_rates_clearly_and_the_probes_word_holds_again_after_them() -> None:
    async def run(meter: LinkMeter) -> None:
        await three_probes(meter)
        probed = meter.quality
        with meter.sending(moving("aa")) as out, meter.receiving(moving("bb")) as back:
            out.made(10**9)
            await asyncio.gather(moved(out, 0.95e6), moved(back, 0.1e6))
            assert meter.quality == probed  # a little slower, and what came in may have been sent slowly
            await asyncio.gather(moved(out, 0.25e6), moved(back, 2e6))
            assert meter.quality.uplink_bps == pytest.approx(2e6, rel=0.05)
            assert meter.quality.downlink_bps == pytest.approx(16e6, rel=0.05)
            await moved(out, 3e6)
            assert meter.quality.uplink_bps == pytest.approx(24e6, rel=0.05)
        assert meter.quality == probed

    metered(Link(up_bps=8e6, down_bps=8e6), run)


def test_a_paced_transfer_leaves_the_uplink_and_tells_its_own_progress() -> None:
    async def run(meter: LinkMeter) -> None:
        await three_probes(meter)
        probed = meter.quality
        with meter.sending(moving("aa", pace=lambda: 4e6)) as paced:
            paced.made(10**9)
            await moved(paced, 0.1e6)
            with meter.sending(moving("bb")) as other:
                other.made(10**9)
                await moved(other, 0.1e6)
                assert meter.quality == probed
                first, second = meter.progress
        assert (first.transfer, first.moved_bytes, second.transfer) == ("aa", 100_000, "bb")
        assert second.goodput_bps == pytest.approx(0.8e6, rel=0.05)
        assert meter.progress == ()

    metered(Link(up_bps=8e6, down_bps=8e6), run)


async def test_probes_fit_their_topics_and_come_back_over_a_bus() -> None:
    meter = LinkMeter(bulk=MemoryBroker().bus(), agent="pi-1", clock=now_s)
    probing = asyncio.create_task(meter.run(60))
    measured = asyncio.Event()
    real = link_quality._Median.add

    def add(median: Any, value: float) -> float:
        measured.set()
        return real(median, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link_quality._Median, "add", add)
        async with asyncio.timeout(10):
            await measured.wait()
    probing.cancel()
    assert meter.quality.round_trip_s is not None


HEADER = (
    "Inter-| sta-|   Quality        |   Discarded packets               | Missed | WE\n"
    " face | tus | link level noise |  nwid  crypt   frag  retry   misc | beacon | 22\n"
)


@pytest.mark.parametrize(
    ("lines", "level"),
    [
        (" wlan0: 0000   54.  -56.  -256        0      0      0      0    120        0\n", -56.0),
        ("wlp2s0: 0000   70   -40   -256        0      0      0      0      0        0\n", -40.0),
        (
            " wlan0: 0000   54.  -56.  -256   0 0 0 0 120 0\n wlan1: 0000   30.  -80.  -256   0 0 0 0 0 0\n",
            -56.0,
        ),
        (" wlan0: 0000   54.  199.  0   0 0 0 0 120 0\n", None),  # a driver that counts from 0 to 255
        (" wlan0: 0000   54.\n", None),
        (" wlan0: 0000   54.  weak  -256   0 0 0 0 120 0\n", None),
        ("", None),
    ],
)
def test_the_signal_is_read_from_the_wireless_table(tmp_path: Path, lines: str, level: float | None) -> None:
    table = tmp_path / "wireless"
    table.write_text(HEADER + lines)
    assert signal_dbm(table) == level


def test_without_wireless_there_is_no_signal(tmp_path: Path) -> None:
    assert signal_dbm(tmp_path / "none") is None
    (tmp_path / "empty").write_text("")
    assert signal_dbm(tmp_path / "empty") is None
    (tmp_path / "noise").write_bytes(b"\xff\xfe\n\n\n\xff")
    assert signal_dbm(tmp_path / "noise") is None


def test_the_signal_is_part_of_the_quality(tmp_path: Path) -> None:
    table = tmp_path / "wireless"
    table.write_text(HEADER + " wlan0: 0000   54.  -56.  -256   0 0 0 0 120 0\n")
    quality = metered(Link(), three_probes, wireless=table).quality
    assert quality.signal_dbm == -56.0
