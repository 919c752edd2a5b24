"""Scenarios as wild as fleets may be, by seed: every term of the model that a policy must get right, in any mixture."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import numpy as np

from broker_config.messages import CodecSpeed, Speed
from coordinator.latency import RequestTerms, Scenario
from coordinator.numbers import Floats
from coordinator.policy.rungs import allowed_rungs
from coordinator.policy.shares import Shares
from tests.coordinator.builders import CAPS, LADDER, digest, instance, make_link, random_speed

Channels = tuple[tuple[str, float], ...]


def wild_scenario(
    seed: int, links: int | None = None, *, fdma: bool = False, complete: bool = False, quadratic: bool | None = None
) -> Scenario:
    """One to eight links, mostly up to four.

    Receivers, their requests, senders with several links, texts that are still to be generated, cells, cells behind a
    broker and wires of their own, what others leave of them, slices or none, floors, memory pressure, deadlines,
    kept rungs, speeds by codec. complete: all is measured. quadratic: whether prefill slows with length.
    """
    dice = random.Random(seed)
    count = links or dice.choice([1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 6, 8])
    receivers = dice.choice([1, 1, 2, 3])
    slows = dice.random() < 0.3 if quadratic is None else quadratic
    speeds = {f"rx-{index}": _speed(dice, slows=slows) for index in range(receivers)}
    senders = [f"pi-{index}" for index in range(dice.choice([1, 2, count, count, count]))]
    speeds |= {sender: _speed(dice, slows=slows) for sender in senders}
    rtts_s = {agent: dice.choice([0.0, dice.uniform(0.001, 0.1)]) for agent in speeds}
    ways = _Ways(dice, speeds)
    requests = tuple(
        RequestTerms(
            request=instance(index),
            receiver=f"rx-{index % receivers}",
            question_tokens=dice.randint(1, 60),
            deadline_s=dice.choice([None, None, 10 ** dice.uniform(-1, 2)]),
            quality_floor=dice.choice([0.02, 0.02, 0.1, 0.002, 1e-6]),
        )
        for index in range(receivers + dice.choice([0, 0, 0, 1, 2]))
    )
    made = []
    for index in range(count):
        request = index if index < len(requests) else dice.randrange(len(requests))
        terms = requests[request]
        sender = dice.choice(senders) if len(senders) < count else senders[index]
        pressure = dice.choice([0.2, 0.2, 0.2, 0.75, 0.85, 0.95])
        dark = not complete and dice.random() < 0.06
        unknown = not complete and dice.random() < 0.05
        channels = () if dark else ways.channels(sender, terms.receiver)
        kept = dice.choice([None, "lossless", "int8", "int4"])
        made.append(
            make_link(
                request=request,
                sender=sender,
                receiver=terms.receiver,
                context=f"c-{index}",
                context_id=digest(index),
                tokens=int(10 ** dice.uniform(0, 3.3)),
                cached=(cached := dice.random() < 0.6),
                generated=not cached and dice.random() < 0.4,
                kept=kept if cached else None,
                sender_speed=None if unknown else speeds[sender],
                receiver_speed=speeds[terms.receiver],
                sender_rtt_s=rtts_s[sender],
                receiver_rtt_s=rtts_s[terms.receiver],
                receiver_overhead_s=ways.overheads_s[terms.receiver],
                link_bps=0.0 if dark else min(bps for _, bps in channels),
                channels=channels,
                snr=10 ** dice.uniform(0, 4) if fdma else 0.0,
                rungs=allowed_rungs(LADDER, terms.quality_floor, pressure, CAPS),
            )
        )
    used = {link.request for link in made}
    number = {old: new for new, old in enumerate(sorted(used))}
    return Scenario(
        requests=tuple(terms for index, terms in enumerate(requests) if index in used),
        links=tuple(replace(link, request=number[link.request]) for link in made),
        airtime_free=ways.free,
        slice_tokens=dice.choice([None, 16, 32, 32, 64, 256]),
        tie_fraction=0.0,
    )


class _Ways:
    """How agents are wired."""

    def __init__(self, dice: random.Random, agents: dict[str, Speed]) -> None:
        self._dice, self._kind = dice, dice.choice(["cell", "cells", "wires", "mixed"])
        self._bps = {agent: 10 ** dice.uniform(5, 9) for agent in agents}
        self._cell = {agent: f"cell-{dice.randrange(2)}" for agent in agents}
        self._cell_bps = 10 ** dice.uniform(6, 8.5)
        self.overheads_s = {agent: dice.choice([0.0, 0.0, dice.uniform(0, 0.5)]) for agent in agents}
        names = ["cell-0", "cell-1", "rx-0/down"]
        self.free = {name: dice.uniform(0.05, 1) for name in names if dice.random() < 0.25}

    def channels(self, sender: str, receiver: str) -> Channels:
        """What a link passes."""
        up_bps, down_bps = (self._cell_bps * self._dice.uniform(0.3, 1) for _ in range(2))
        wires = ((f"{sender}/up", self._bps[sender]), (f"{receiver}/down", self._bps[receiver]))
        if self._kind == "cell":
            return (("cell-0", up_bps), ("cell-0", down_bps))
        if self._kind == "cells":
            return ((self._cell[sender], up_bps), (self._cell[receiver], down_bps))
        return wires if self._kind == "wires" else ((self._cell[sender], up_bps), wires[1])


def _speed(dice: random.Random, *, slows: bool) -> Speed:
    speed = msgspec.structs.replace(
        random_speed(dice), prefill_s_per_token2=10 ** dice.uniform(-8, -5.5) if slows else 0.0
    )
    if dice.random() < 0.8:
        return speed
    codec = CodecSpeed(
        codec="int", encode_elements_per_s=10 ** dice.uniform(6, 8), decode_elements_per_s=10 ** dice.uniform(6, 8)
    )
    return msgspec.structs.replace(speed, codecs=(codec,))


def linear(scenario: Scenario, **changes: object) -> Scenario:
    """The same under A1-A5, but for what is changed: airtime, text at hand, one rung a link, no slices."""
    links = tuple(replace(link, generated=False, rungs=link.rungs[:1], snr=0.0) for link in scenario.links)
    return replace(scenario, links=links, slice_tokens=None, tie_fraction=0.0, **changes)  # type: ignore[arg-type]


def random_split(shares: Shares, seed: int) -> Floats:
    """Any number of own tokens wherever a cache may travel, (K,)."""
    part = np.random.default_rng(seed).choice([0.0, 0.25, 0.5, 0.9, 1.0], size=shares.table.count)
    return np.asarray(np.where(shares.may_cache, np.floor(part * shares.table.tokens), shares.table.tokens))
