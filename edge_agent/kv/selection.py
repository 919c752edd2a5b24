"""Which layers are sent (methods.md 1.1): by attention on the context and a Gaussian prior on depth, as Q-KVComm does
(eqs. 1-3), or by what they cost.

Eq. (1) as printed, the mean of softmax rows over all heads and positions, is 1/T for every layer and ranks nothing. Our
reading: the share of attention that the context's last tokens (32 of them) pay to context tokens other than the first
four, where attention sinks lie; averaged over heads, scaled over the layers to 0-1 like the prior.

How much attention a layer pays says little of what its absence costs. Ours, `by` divergence, sends the layers whose
coarse quantization alone changes the answers most, by the profile in the bundle. On SmolLM2 with 0.7 of the layers in
fp16 the loss on SQuAD is 0.05 nats where the paper's choice costs 0.35 (docs/qkvcomm.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edge_agent.errors import CacheInvalid, RecipeInvalid
from edge_agent.kv.cache import Cache

Float64 = npt.NDArray[np.float64]

SINK_TOKENS = 4


@dataclass(frozen=True)
class Selection:
    """ratio of the layers is sent; alpha weighs attention against the prior, whose mean and spread are shares of depth.

    by: attention (with the prior), or divergence, which uses neither. The paper gives the ratio, 0.7; its α, γ_μ and
    γ_σ are "configurable", centred on the middle layers.
    Raises RecipeInvalid for values that make no sense.
    """

    ratio: float = 0.7
    alpha: float = 0.5
    prior_mean: float = 0.5
    prior_spread: float = 0.25
    by: Literal["attention", "divergence"] = "attention"

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise RecipeInvalid(f"{self.ratio:g} of the layers: the share must be above 0 and at most 1")
        if not 0 <= self.alpha <= 1:
            raise RecipeInvalid(f"alpha {self.alpha:g}: must be 0 to 1")
        if not self.prior_spread > 0:
            raise RecipeInvalid(f"prior spread {self.prior_spread:g}: must be above 0")


def gaussian_prior(layers: int, mean: float, spread: float) -> Float64:
    """P_l (eq. 2), float64 (layers,): μ = mean · layers, σ = spread · layers, l from 0."""
    depth = np.arange(layers, dtype=np.float64)
    prior: Float64 = np.exp(-((depth - mean * layers) ** 2) / (2 * (spread * layers) ** 2))
    return prior


def attention_on_context(cache: Cache) -> Float64:
    """The share of attention on a context's tokens but its first four, by layer, float64 (layers,), 0-1.

    Raises CacheInvalid if the attention mass was not kept when the context was read.
    """
    shares = []
    for index, layer in enumerate(cache.layers):
        if layer.mass is None:
            raise CacheInvalid(f"layer {index}: its attention mass was not kept, layers can't be chosen by it")
        shares.append(layer.mass[:, layer.positions >= SINK_TOKENS].sum(axis=1, dtype=np.float64).mean())
    return np.array(shares)


def layer_scores(attention: Float64, selection: Selection) -> Float64:
    """S_l (eq. 3) from each layer's attention (any scale), float64 (layers,), 0-1. Equal attentions all count as 0."""
    spread = float(np.ptp(attention))
    scaled = (attention - attention.min()) / spread if spread > 0 else np.zeros_like(attention)
    prior = gaussian_prior(len(attention), selection.prior_mean, selection.prior_spread)
    scores: Float64 = selection.alpha * scaled + (1 - selection.alpha) * prior
    return scores


def best_layers(scores: Float64 | Sequence[float], ratio: float) -> tuple[int, ...]:
    """The layers with the best scores, round(ratio · layers) of them but at least one, rising. Ties: the earlier."""
    count = max(1, round(ratio * len(scores)))
    order = sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))
    return tuple(sorted(order[:count]))
