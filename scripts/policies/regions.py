"""Where tokens, cache and split win for one link: by what the optimum policy chooses over link rate and compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from msgspec import Struct

from coordinator.latency import Scenario
from coordinator.policy.optimum import OptimumPolicy
from coordinator.policy.shares import Shares
from scripts.policies.profiles import Profile, profiles
from scripts.policies.scenarios import link_of, round_of, whole

CONTEXT_TOKENS = 512
DEVICES = ("pi-4", "pi-5", "orin-nano")
RATES_MBPS = (0.3, 1_000.0)
PREFILL_TPS = (10.0, 10_000.0)

Medium = Literal["tokens", "split", "cache"]
MEDIA: tuple[Medium, ...] = ("tokens", "split", "cache")


class Region(Struct, frozen=True, kw_only=True):
    """One map: media[j][i] at prefill j and rate i; gain: best binary's E2E over optimum's, less one.

    ready: whether the sender's cache is. device_tps: prefill of the device itself.
    """

    device: str
    title: str
    ready: bool
    device_tps: float
    rates_mbps: tuple[float, ...]
    prefill_tps: tuple[float, ...]
    media: tuple[tuple[Medium, ...], ...]
    gain: tuple[tuple[float, ...], ...]

    def area(self, medium: Medium) -> float:
        """The share of the (logarithmic) map."""
        return sum(row.count(medium) for row in self.media) / (len(self.rates_mbps) * len(self.prefill_tps))


class Span(Struct, frozen=True, kw_only=True):
    """Between two devices alike: what is chosen at each rate, and what that gains on the best binary."""

    device: str
    title: str
    ready: bool
    slices: bool
    rates_mbps: tuple[float, ...]
    media: tuple[Medium, ...]
    gain: tuple[float, ...]


class Regions(Struct, frozen=True, kw_only=True):
    """Maps (with slices), and what holds between devices alike (with and without)."""

    maps: tuple[Region, ...]
    spans: tuple[Span, ...]


def grid(points: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Rates and prefills of a map."""
    return (
        tuple(np.geomspace(*RATES_MBPS, points).tolist()),
        tuple(np.geomspace(*PREFILL_TPS, max(3, round(0.75 * points))).tolist()),
    )


def steps(points: int) -> int:
    """Rows of maps, and spans."""
    return 2 * len(DEVICES) * (len(grid(points)[1]) + 2)


def regions(points: int, hear: Callable[[str], None]) -> Regions:
    """For every device with the cache ready and not; hear is told before each row."""
    cases = [(device, ready) for ready in (True, False) for device in DEVICES]
    return Regions(
        maps=tuple(_region(device, points, hear, ready=ready) for device, ready in cases),
        spans=tuple(
            _span(device, points, hear, ready=ready, slices=slices)
            for device, ready in cases
            for slices in (True, False)
        ),
    )


def lone_link(profile: Profile, rate_mbps: float, receiver_tps: float, *, ready: bool) -> Scenario:
    """A context of CONTEXT_TOKENS from such a device to one that prefills at receiver_tps and codes in proportion."""
    link = link_of(
        0,
        0,
        tokens=CONTEXT_TOKENS,
        sender_speed=profile.speed(),
        receiver_speed=profile.speed(receiver_tps / profile.prefill_tps),
        channels=(("sender/up", rate_mbps * 1e6), ("receiver/down", rate_mbps * 1e6)),
        cached=ready,
    )
    return round_of([link], slices=True)


def chosen(scenario: Scenario) -> tuple[Medium, float]:
    """The medium that optimum chooses for a lone link, and what that gains on tokens, and on the cache at any rung."""
    shares = Shares(scenario)
    best = OptimumPolicy().choose(shares)
    own, tokens = float(best.own[0]), float(shares.table.tokens[0])
    caches = [shares.allocate(np.zeros(1), places) for places in shares.table.ladders.worthwhile]
    binary_s = min(each.e2e_s for each in (shares.allocate(shares.table.tokens), *caches))
    medium: Medium = "tokens" if own >= tokens else "cache" if own == 0 else "split"
    return medium, binary_s / best.e2e_s - 1


def _region(device: str, points: int, hear: Callable[[str], None], *, ready: bool) -> Region:
    profile = profiles()[device]
    rates, prefills = grid(points)
    media, gains = [], []
    for tps in prefills:
        hear(f"{profile.title}, {tps:.0f} tokens/s")
        row = [chosen(lone_link(profile, mbps, tps, ready=ready)) for mbps in rates]
        media.append(tuple(medium for medium, _ in row))
        gains.append(tuple(gain for _, gain in row))
    return Region(
        device=device,
        title=profile.title,
        ready=ready,
        device_tps=profile.prefill_tps,
        rates_mbps=rates,
        prefill_tps=prefills,
        media=tuple(media),
        gain=tuple(gains),
    )


def _span(device: str, points: int, hear: Callable[[str], None], *, ready: bool, slices: bool) -> Span:
    profile = profiles()[device]
    hear(f"{profile.title}, alike")
    rates, _ = grid(points)
    row = []
    for mbps in rates:
        scenario = lone_link(profile, mbps, profile.prefill_tps, ready=ready)
        row.append(chosen(scenario if slices else whole(scenario)))
    return Span(
        device=device,
        title=profile.title,
        ready=ready,
        slices=slices,
        rates_mbps=rates,
        media=tuple(medium for medium, _ in row),
        gain=tuple(gain for _, gain in row),
    )
