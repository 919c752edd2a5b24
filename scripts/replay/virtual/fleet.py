"""What agents in virtual time know of each other: their links, transfers under way, and what caches weigh."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from broker_config.messages import ModelInfo
from scripts.replay.virtual.broker import Access
from scripts.replay.virtual.store import Context
from scripts.replay.virtual.transfer import Slice, Transfers


class Neighbours:
    """Of one run. size_noise: how far a context's cache differs from its rung's size, as a standard deviation of the
    logarithm; the same cache always weighs the same.
    """

    def __init__(self, model: ModelInfo, accesses: Mapping[str, Access], *, size_noise: float, seed: int) -> None:
        self.model, self.transfers = model, Transfers()
        self._accesses, self._size_noise, self._seed = accesses, size_noise, seed
        self._bits = {rung.name: rung.bits_per_element for rung in (*model.baselines, *model.ladder)}
        self._factors: dict[tuple[str, str], float] = {}

    def access(self, agent: str) -> Access:
        """An agent's link."""
        return self._accesses[agent]

    def slice_bytes(self, context: Context, part: Slice, rung: str) -> int:
        """What entries of these tokens weigh."""
        elements = (part.stop - part.start) * self.model.elements_per_token
        return max(1, math.ceil(elements * self._bits[rung] * self._factor(context.context_id, rung) / 8))

    def after(self, sender: str, receiver: str) -> float:
        """Seconds of a signal between two agents."""
        return self.access(sender).delay_s() + self.access(receiver).delay_s()

    def _factor(self, context_id: str, rung: str) -> float:
        if rung in {"float32", "fp16"}:
            return 1.0
        name = context_id, rung
        if name not in self._factors:
            dice = random.Random(f"{self._seed} {context_id} {rung}")
            self._factors[name] = dice.lognormvariate(0.0, self._size_noise)
        return self._factors[name]
