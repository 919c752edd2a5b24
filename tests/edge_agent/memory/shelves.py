"""A store over a made-up ladder, for made-up caches of any shape."""

from __future__ import annotations

from functools import cache as once
from pathlib import Path

import msgspec

from broker_config.messages import Rung
from edge_agent.kv.cache import Cache
from edge_agent.kv.reader import Expectation
from edge_agent.kv.transform import Transform
from edge_agent.memory import Budget, ContextStore, Shelf, Spill
from edge_agent.memory.budget import System
from edge_agent.model.exchange import expectation
from edge_agent.model.manifest import Manifest, read_manifest
from tests import tiny
from tests.edge_agent.caches import attended, made_up, transform_for

LADDER = tuple(
    Rung(name=name, bits_per_element=bits, kl=kl, agreement=1.0, transformed=name.startswith("klt"))
    for name, bits, kl in (
        ("float32", 32, 0.0),
        ("fp16", 16, 0.001),
        ("klt1", 7, 0.0011),
        ("klt2", 6, 0.0015),
        ("klt4", 4, 0.002),
        ("klt5", 3, 0.005),
        ("klt6", 2.5, 0.009),
        ("klt8", 1.5, 0.05),
    )
)
BASELINES = (
    Rung(name="q8", bits_per_element=8, kl=0.0001, agreement=1.0),
    Rung(name="q4", bits_per_element=4, kl=0.3, agreement=0.9),
    Rung(name="qkvcomm-6", bits_per_element=4.2, kl=0.5, agreement=0.9),
)
TOKENS = 20
PLENTY = System(1 << 40)


def cache_of(*, entries: int = TOKENS, seed: int = 0) -> Cache:
    return attended(made_up(layers=3, heads=2, entries=entries, dim=16, seed=seed))


ONE = cache_of()
TRANSFORM = transform_for(ONE)


@once
def manifest(*, transformed: bool = True) -> Manifest:
    """The tiny model's, with a ladder of ours."""
    return msgspec.structs.replace(
        read_manifest(tiny.tiny_bundle()),
        ladder=LADDER if transformed else LADDER[:2] + BASELINES[:1],
        baselines=BASELINES,
        transform=TRANSFORM.id if transformed else None,
    )


def shelf(*, tightest_kl: float = 0.02, transformed: bool = True) -> Shelf:
    transform: Transform | None = TRANSFORM if transformed else None
    return Shelf(manifest(transformed=transformed), transform, tightest_kl=tightest_kl)


def expected(transform: Transform | None = TRANSFORM) -> Expectation:
    return expectation(manifest(), 1 << 30, transform)


def context_id(name: str) -> str:
    return f"{ord(name):02x}" * 16


def store(
    budget_bytes: float,
    *,
    folder: Path | None = None,
    limit_bytes: int = 1 << 30,
    tightest_kl: float = 0.02,
    high: float = 1.0,
    low: float = 1.0,
    tokens: int = TOKENS,
) -> ContextStore:
    """With contexts a to f held."""
    made = ContextStore(
        shelf(tightest_kl=tightest_kl),
        Budget(limit_bytes=int(budget_bytes), high=high, low=low, system=lambda: PLENTY),
        Spill(folder, limit_bytes, expected(), manifest().weight_precision) if folder else None,
    )
    for name in "abcdef":
        made.add(name, context_id(name), tuple(range(tokens)))
    return made


def rungs(kept: ContextStore) -> dict[str, str]:
    """Of every held context that has a cache, its rung, with * if it is on disk only."""
    found = {}
    for info in kept.infos():
        if info.cached:
            found[info.name] = f"{info.rung}{'' if info.cache_bytes else '*'}"
    return found
