"""Memory that the store gives back is the system's again: measured as resident memory, in a process of its own."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from edge_agent.kv.cache import Cache, Layer
from edge_agent.memory import Budget, ContextStore, Shelf, Spill
from edge_agent.memory.budget import System
from edge_agent.memory.relief import trim
from edge_agent.model.exchange import expectation
from tests.edge_agent.caches import transform_for
from tests.edge_agent.memory.shelves import context_id, manifest, rungs

LAYERS, HEADS, HEAD_DIM, TOKENS = 30, 3, 64, 300
CACHES = 8
MEGA = 1e6


def _cache(seed: int) -> Cache:
    """As large as a real one of TOKENS tokens: 14 MB."""
    rng = np.random.default_rng(seed)
    positions = np.arange(TOKENS, dtype=np.int32)
    shape = (HEADS, TOKENS, HEAD_DIM)
    return Cache(
        tuple(
            Layer(
                rng.standard_normal(shape, dtype=np.float32),
                rng.standard_normal(shape, dtype=np.float32),
                positions,
            )
            for _ in range(LAYERS)
        )
    )


async def _measure(folder: Path) -> dict[str, list[float]]:
    """Resident and booked MB: with all caches as floats, tightened, on disk."""
    transform = transform_for(_cache(0), finest=0.05)
    mine = manifest()
    form = msgspec.structs.replace(
        mine, layers=mine.layers[:1] * LAYERS, kv_heads=HEADS, head_dim=HEAD_DIM, transform=transform.id
    )
    system = System(1 << 40)
    store = ContextStore(
        Shelf(form, transform, tightest_kl=0.02),
        Budget(limit_bytes=1 << 40, system=lambda: system),
        Spill(folder, 1 << 40, expectation(form, 1 << 40, transform), form.weight_precision),
    )
    for number in range(CACHES):
        store.add("abcdefgh"[number], context_id("abcdefgh"[number]), tuple(range(TOKENS)))
    ids = tuple(range(TOKENS))
    for _ in range(2):  # what is made once is made, the libraries' buffers too
        coded = await asyncio.to_thread(store.shelf.put, _cache(0), "klt2", context_id("a"), ids)
        await asyncio.to_thread(store.shelf.put, coded, "klt4", context_id("a"), ids)
    found: dict[str, list[float]] = {}

    def note(name: str) -> None:
        gc.collect()
        trim()
        found[name] = [psutil.Process().memory_info().rss / MEGA, store.cache_bytes / MEGA]

    note("empty")
    for number in range(CACHES):
        await store.put(context_id("abcdefgh"[number]), _cache(number))
    note("floats")
    store._budget = Budget(limit_bytes=int(0.5 * store.cache_bytes), low=0.8, system=lambda: system)
    await store.relieve()
    note("tightened")
    assert "float32" in rungs(store).values()
    store._budget = Budget(limit_bytes=int(0.03 * store.cache_bytes), low=0.8, system=lambda: system)
    await store.relieve()
    note("on disk")
    assert any(rung.endswith("*") for rung in rungs(store).values())
    return found


@pytest.mark.timeout(300)
def test_resident_memory_falls_with_what_is_tightened_and_spilled(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for before, after in (("floats", "tightened"), ("floats", "on disk")):
        booked = found[before][1] - found[after][1]
        resident = found[before][0] - found[after][0]
        assert booked > 60
        assert resident > 0.6 * booked, (
            found
        )  # the rest is buffers of the libraries, and what lies between what is kept
    assert found["floats"][0] - found["empty"][0] > 0.9 * found["floats"][1]


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_measure(Path(sys.argv[1])))))  # noqa: T201
