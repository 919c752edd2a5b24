"""Fleets and scenarios for the tests: small ones by hand, random ones by seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from broker_config.messages import ContextInfo, LinkQuality, Memory, ModelInfo, Presence, Rung, Speed, Telemetry
from coordinator.fleet import Fleet, apply
from coordinator.latency import Link, RequestTerms, Scenario
from coordinator.policy import PressureCaps

ELEMENTS_PER_TOKEN = 11_520

LADDER = (
    Rung(name="lossless", bits_per_element=32.02, kl=0.0, agreement=1.0),
    Rung(name="fp16", bits_per_element=16.02, kl=1e-5, agreement=1.0),
    Rung(name="int8", bits_per_element=8.5, kl=0.001, agreement=0.995),
    Rung(name="int6", bits_per_element=6.4, kl=0.006, agreement=0.98),
    Rung(name="int4", bits_per_element=4.4, kl=0.018, agreement=0.95),
    Rung(name="int3", bits_per_element=3.4, kl=0.09, agreement=0.85),
)
CAPS = PressureCaps(((0.70, 9.0), (0.80, 6.5), (0.90, 4.5)))
"""For that ladder."""
MODEL = ModelInfo(
    name="SmolLM2-135M-Instruct",
    fingerprint="a" * 32,
    tokenizer="b" * 32,
    prefix="c" * 32,
    weight_precision="int8",
    elements_per_token=ELEMENTS_PER_TOKEN,
    bytes_per_token_id=2,
    window_tokens=8_192,
    ladder=LADDER,
)
SPEED = Speed(
    prefill_fixed_s=0.02,
    prefill_tps=150.0,
    decode_tps=12.0,
    encode_elements_per_s=6e7,
    decode_elements_per_s=1.2e8,
)


def instance(number: int) -> str:
    return f"{number:016x}"


def digest(number: int) -> str:
    return f"{number:032x}"


def context(name: str = "report", tokens: int = 400, *, cached: bool = True, **changes: Any) -> ContextInfo:
    number = int.from_bytes(name.encode()[:16], "big")
    fields: dict[str, Any] = {
        "context_id": digest(number),
        "name": name,
        "tokens": tokens,
        "cached": cached,
        "cache_bytes": 4 * ELEMENTS_PER_TOKEN * tokens if cached else 0,
        "rung": "lossless" if cached else None,
    }
    return ContextInfo(**(fields | changes))


def presence(agent: str, number: int = 1, state: str = "online", model: ModelInfo | None = MODEL) -> Presence:
    return Presence(
        agent=agent, instance=instance(number), state="online" if state == "online" else "offline", model=model
    )


def telemetry(
    agent: str,
    number: int = 1,
    sequence: int = 0,
    *,
    pressure: float = 0.3,
    link: LinkQuality | None = None,
    speed: Speed | None = SPEED,
    contexts: Iterable[ContextInfo] = (),
) -> Telemetry:
    return Telemetry(
        agent=agent,
        instance=instance(number),
        sequence=sequence,
        uptime_s=1.0,
        memory=Memory(
            pressure=pressure,
            cache_bytes=0,
            cache_budget_bytes=1,
            available_bytes=1 << 32,
            total_bytes=1,
            resident_bytes=1,
        ),
        link=link or LinkQuality(round_trip_s=0.02, uplink_bps=2e7, downlink_bps=3e7),
        speed=speed,
        contexts=tuple(contexts),
    )


def fleet_of(*reports: Telemetry, now_s: float = 0.0, models: dict[str, ModelInfo | None] | None = None) -> Fleet:
    """A fleet in which each of these agents is online."""
    fleet = Fleet()
    for report in reports:
        model = (models or {}).get(report.agent, MODEL)
        fleet = apply(fleet, Presence(agent=report.agent, instance=report.instance, state="online", model=model), now_s)
        fleet = apply(fleet, report, now_s)
    return fleet


def make_link(**changes: object) -> Link:
    """A cached context of 400 tokens over 20 Mbit/s, that may use the 8-bit rung and better ones."""
    link = Link(
        request=0,
        sender="pi-1",
        receiver="pi-9",
        context="report",
        context_id=digest(1),
        tokens=400,
        elements_per_token=ELEMENTS_PER_TOKEN,
        bytes_per_token_id=2,
        cached=True,
        reference=LADDER[0],
        sender_speed=SPEED,
        receiver_speed=SPEED,
        sender_rtt_s=0.02,
        receiver_rtt_s=0.01,
        link_bps=2e7,
        channels=(("pi-1/up", 2e7), ("pi-9/down", 3e7)),
        rungs=(LADDER[2], LADDER[1], LADDER[0]),
    )
    return replace(link, **changes)  # type: ignore[arg-type]


def scenario_of(links: Sequence[Link], **changes: object) -> Scenario:
    """One request for each receiver that the links name."""
    receivers = sorted({link.receiver for link in links})
    requests = tuple(
        RequestTerms(request=instance(index), receiver=receiver, question_tokens=20)
        for index, receiver in enumerate(receivers)
    )
    numbered = tuple(replace(link, request=receivers.index(link.receiver)) for link in links)
    return replace(Scenario(requests=requests, links=numbered), **changes)  # type: ignore[arg-type]


def random_scenario(seed: int, links: int, receivers: int = 1, *, shared: bool | None = None) -> Scenario:
    """Devices from a Pi 4 to a small GPU on a Wi-Fi cell (shared) or on links of their own, contexts of any length."""
    dice = random.Random(seed)
    shared = dice.random() < 0.5 if shared is None else shared
    cell_bps = 10 ** dice.uniform(6.3, 8.3)
    speeds = [random_speed(dice) for _ in range(receivers)]
    downs = [cell_bps if shared else 10 ** dice.uniform(6.5, 8.5) for _ in range(receivers)]
    made: list[Link] = []
    for index in range(links):
        to = index % receivers
        up = cell_bps * dice.uniform(0.3, 1) if shared else 10 ** dice.uniform(6, 8)
        made.append(
            make_link(
                sender=f"pi-{index}",
                receiver=f"rx-{to}",
                context_id=digest(index),
                tokens=int(10 ** dice.uniform(1.5, 3.2)),
                cached=dice.random() < 0.6,
                sender_speed=random_speed(dice),
                receiver_speed=speeds[to],
                sender_rtt_s=dice.uniform(0.001, 0.08),
                receiver_rtt_s=0.01,
                link_bps=min(up, downs[to]),
                channels=(("cell", up), ("cell", downs[to]))
                if shared
                else ((f"pi-{index}/up", up), (f"rx-{to}/down", downs[to])),
                rungs=tuple(reversed(LADDER[: dice.randint(2, 5)])),
            )
        )
    return scenario_of(made)


def random_speed(dice: random.Random) -> Speed:
    scale = 10 ** dice.uniform(-0.5, 0.7)
    return Speed(
        prefill_fixed_s=dice.uniform(0, 0.05),
        prefill_tps=150 * scale * dice.uniform(0.5, 2),
        decode_tps=12 * scale,
        encode_elements_per_s=6e7 * scale * dice.uniform(0.5, 2),
        decode_elements_per_s=1.2e8 * scale * dice.uniform(0.5, 2),
    )
