"""The tiny models in sessions, and what they read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_agent.engine import Engine
from edge_agent.model.session import DEFAULT_PREFILL_CHUNK, LiveContext, Model
from edge_agent.model.text import Text
from tests import tiny

FAMILIES = {"llama": tiny.tiny_bundle, "gemma": tiny.tiny_gemma_bundle}

TOLERANCE = {"fp32": 1e-4, "int8": 0.3, "int4": 0.5}
"""How far logits may be apart, whose standard deviation is 1.6, when the same is computed in other pieces.

A run over one token sums in another order than a run over several. In float32 that is the last bits: 2e-5 was seen.
With activations in 8 bits it turns a rounding here and there, and that shows as the quantization itself does: 0.07 was
seen at int8, 0.13 at int4.
"""

CLOSE = TOLERANCE["fp32"]


@cache
def model(chunk: int = 128, *, family: str = "llama", weights: str = "fp32") -> Model:
    """A tiny model, loaded once for each size of chunk."""
    return Model(FAMILIES[family](weights=weights), prefill_chunk=chunk)


@asynccontextmanager
async def started_engine(bundle: Path, *, chunk: int = DEFAULT_PREFILL_CHUNK) -> AsyncIterator[Engine]:
    """A started engine that prefills so many tokens a turn."""
    loaded = Model(bundle, prefill_chunk=chunk)
    made = Engine(loaded, Text(bundle, loaded.manifest))
    await made.start()
    try:
        yield made
    finally:
        made.close()


def read(ids: Sequence[int], *, chunk: int = 128, family: str = "llama", weights: str = "fp32") -> LiveContext:
    live = model(chunk, family=family, weights=weights).new_context()
    live.prefill(ids)
    return live


def far(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    return float(np.abs(one - other).max())
