"""Rounds to be planned: one link at a time, senders around one receiver, and random ones by a written distribution."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import log2

from broker_config.messages import DEFAULT_QUALITY_FLOOR, Rung, Speed
from coordinator.latency import EXACT_RUNG, Link, RequestTerms, Scenario
from coordinator.policy import PressureCaps
from coordinator.policy.rungs import allowed_rungs
from scripts.policies.profiles import profiles

ELEMENTS_PER_TOKEN = 11_520
QUESTION_TOKENS = 24
SLICE_TOKENS = 32
# SmolLM2's, as its bundle measured it.
LADDER = (
    Rung(name="klt6", bits_per_element=1.13, kl=0.0171, agreement=0.95, transformed=True),
    Rung(name="klt5", bits_per_element=1.54, kl=0.0090, agreement=0.96, transformed=True),
    Rung(name="klt4", bits_per_element=1.96, kl=0.0067, agreement=0.96, transformed=True),
    Rung(name="klt2", bits_per_element=3.05, kl=0.0041, agreement=0.97, transformed=True),
    Rung(name="fp16", bits_per_element=16.0, kl=0.0038, agreement=0.98),
    Rung(name=EXACT_RUNG, bits_per_element=32.0, kl=0.0, agreement=1.0),
)
RUNGS = allowed_rungs(LADDER, DEFAULT_QUALITY_FLOOR, 0.0, PressureCaps())


class Network(StrEnum):
    """How channels are shared."""

    OWN = "own"
    CELL = "cell"
    FDMA = "fdma"


@dataclass(frozen=True, kw_only=True)
class Radio:
    """One band of a wireless cell, shared in frequency."""

    hertz: float
    snr_db: float

    @property
    def snr(self) -> float:
        """Over the whole band."""
        return float(10 ** (self.snr_db / 10))

    @property
    def bps(self) -> float:
        """Of the whole band (Shannon)."""
        return self.hertz * log2(1 + self.snr)


def link_of(
    index: int,
    receiver: int,
    *,
    tokens: int,
    sender_speed: Speed,
    receiver_speed: Speed,
    channels: tuple[tuple[str, float], ...],
    cached: bool = True,
    generated: bool = False,
    snr: float = 0.0,
    rtt_s: float = 0.01,
    receiver_rtt_s: float = 0.01,
) -> Link:
    """The context of sender number index for receiver number receiver, whose request has the same number."""
    return Link(
        request=receiver,
        sender=f"sender-{index}",
        receiver=f"receiver-{receiver}",
        context=f"context-{index}",
        context_id=f"{index:032x}",
        tokens=tokens,
        elements_per_token=ELEMENTS_PER_TOKEN,
        bytes_per_token_id=2,
        cached=cached,
        reference=LADDER[-1],
        sender_speed=sender_speed,
        receiver_speed=receiver_speed,
        sender_rtt_s=rtt_s,
        receiver_rtt_s=receiver_rtt_s,
        link_bps=min(bps for _, bps in channels),
        channels=channels,
        snr=snr,
        generated=generated,
        rungs=RUNGS,
    )


def round_of(links: Sequence[Link], *, slices: bool) -> Scenario:
    """One request a receiver. E2E is all that counts: nothing of it is given for quality (tie_fraction 0)."""
    receivers = 1 + max(link.request for link in links)
    return Scenario(
        requests=tuple(
            RequestTerms(request=f"{index:016x}", receiver=f"receiver-{index}", question_tokens=QUESTION_TOKENS)
            for index in range(receivers)
        ),
        links=tuple(links),
        slice_tokens=SLICE_TOKENS if slices else None,
        tie_fraction=0.0,
    )


def whole(scenario: Scenario) -> Scenario:
    """The same without streaming."""
    return replace(scenario, slice_tokens=None)


def random_round(seed: int, network: Network | None = None, links: int | None = None) -> Scenario:
    """A round with slices, drawn as docs/policies.md says; a network and a number of links can be held.

    links      2-10 to 1-3 receivers in turn, evenly
    devices    Pi 4, Pi 5, Orin Nano or one x86 thread, evenly; each × 10^U(-0.15, 0.15)
    contexts   10^U(2, 3.3) tokens; 7 of 10 have their cache ready
    network    evenly: links of their own (senders 10^U(6.3, 8) bit/s, receivers 10^U(6.7, 8.5)); a Wi-Fi cell that
               every context passes twice (10^U(6.7, 8.5) for all, each agent at 0.3-1 of it); a band of 10^U(6, 7.3)
               Hz shared by FDMA, senders at -5 to 25 dB
    latency    round trip of 2-40 ms at senders, 10 ms at receivers
    """
    dice = random.Random(seed)
    count = dice.randint(2, 10)
    count = count if links is None else links
    receivers = min(dice.randint(1, 3), count) if links is None else max(1, count // 10)
    drawn = list(Network)[dice.randrange(3)]
    network = drawn if network is None else network
    speeds = [_random_speed(dice) for _ in range(receivers)]
    base = 10 ** dice.uniform(6.7, 8.5)
    hertz = 10 ** dice.uniform(6, 7.3)
    downs = [_down(dice, network, base) for _ in range(receivers)]
    made = []
    for index in range(count):
        to = index % receivers
        channels, snr = _channels(dice, network, index, to, base=base, hertz=hertz, down=downs[to])
        made.append(
            link_of(
                index,
                to,
                tokens=int(10 ** dice.uniform(2, 3.3)),
                cached=dice.random() < 0.7,
                sender_speed=_random_speed(dice),
                receiver_speed=speeds[to],
                channels=channels,
                snr=snr,
                rtt_s=dice.uniform(0.002, 0.04),
            )
        )
    return round_of(made, slices=True)


def _random_speed(dice: random.Random) -> Speed:
    return dice.choice(list(profiles().values())).speed(10 ** dice.uniform(-0.15, 0.15))


def _down(dice: random.Random, network: Network, base: float) -> float:
    return base * dice.uniform(0.3, 1) if network is Network.CELL else 10 ** dice.uniform(6.7, 8.5)


def _channels(
    dice: random.Random, network: Network, index: int, to: int, *, base: float, hertz: float, down: float
) -> tuple[tuple[tuple[str, float], ...], float]:
    """The channels of a link and its SNR."""
    if network is Network.OWN:
        return ((f"sender-{index}/up", 10 ** dice.uniform(6.3, 8)), (f"receiver-{to}/down", down)), 0.0
    if network is Network.CELL:
        # Of two receivers and their senders: a cell of very many links would be full for ever.
        cell = f"cell-{to // 2}"
        return ((cell, base * dice.uniform(0.3, 1)), (cell, down)), 0.0
    radio = Radio(hertz=hertz, snr_db=dice.uniform(-5, 25))
    return ((f"band-{to // 2}", radio.bps),), radio.snr
