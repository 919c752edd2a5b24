"""Keys without phase as the model computed them, kept beside the buffer, whose keys are rotated.

Taking the phase off again would leave rounding in the last bit. With weights in 8 bits that is enough to turn a
rounding of activations somewhere, and such turns change logits as much as the quantization itself does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_agent.kv.cache import Float32


@dataclass(frozen=True, eq=False)
class PlainKeys:
    """Of the tokens of one run, which stand at `start` and after: for each layer (tokens, kv_heads · head_dim)."""

    start: int
    layers: tuple[Float32, ...]

    @property
    def stop(self) -> int:
        return self.start + len(self.layers[0])

    def before(self, position: int) -> PlainKeys | None:
        """Of the tokens before a position; None if there are none."""
        if self.start >= position:
            return None
        return PlainKeys(self.start, tuple(keys[: position - self.start] for keys in self.layers))


def plain_between(kept: Sequence[PlainKeys], start: int, stop: int) -> list[Float32] | None:
    """The keys at positions [start, stop) of each layer, (stop - start, kv_heads · head_dim); None if some lack."""
    parts: list[PlainKeys] = []
    at = start
    for run in kept:
        if at < stop and run.start <= at < run.stop:
            parts.append(PlainKeys(at, tuple(keys[at - run.start : stop - run.start] for keys in run.layers)))
            at = run.stop
    if at < stop or not parts:
        return None
    return [np.concatenate(pieces) for pieces in zip(*(part.layers for part in parts), strict=True)]
