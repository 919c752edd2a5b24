"""What each layer bears: Q-KVComm's sensitivity (eq. 4), its cost in KL divergence, and the attention it gets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_agent.kv.allocation import MIN_BITS
from edge_agent.kv.cache import Cache, Float32, Layer
from edge_agent.kv.profile import Profile
from edge_agent.kv.quantize import dequantize, quantize
from edge_agent.kv.selection import attention_on_context
from scripts import relay
from scripts.prepare_model.answered import Answered

MAX_PASSAGES = 8
"""The KL of every layer alone takes one run of the model each: these are enough to rank by."""


def measure(answered: Answered, on_passage: Callable[[int], None]) -> Profile:
    """The profile of a model on answered passages; with float32 weights, for rounded activations hide small losses.

    on_passage is called with the number of passages done.
    """
    layers = len(answered.manifest.layers)
    error, kl, attention = np.zeros(layers), np.zeros(layers), np.zeros(layers)
    tokens = positions = 0
    for index, reference in enumerate(answered):
        coarse = coarsened(reference.cache)
        tokens += reference.cache.entries
        positions += reference.positions
        attention += attention_on_context(reference.cache)
        for layer in range(layers):
            error[layer] += squared_error(reference.cache.layers[layer], coarse.layers[layer])
            kl[layer] += _divergence(answered, reference, coarse, layer)
        on_passage(index + 1)
    return Profile(
        passages=len(answered),
        tokens=tokens,
        answer_positions=positions,
        error=tuple(float(f"{each:.6g}") for each in error / len(answered)),
        divergence=tuple(float(f"{each:.6g}") for each in kl / positions),
        attention=tuple(float(f"{each:.6g}") for each in attention / len(answered)),
    )


def coarsened(cache: Cache) -> Cache:
    """The cache with every tensor as it comes back from the minimum width."""

    def back(tensor: Float32) -> Float32:
        return dequantize(quantize(tensor, MIN_BITS))

    return Cache(tuple(Layer(back(layer.keys), back(layer.values), layer.positions) for layer in cache.layers))


def squared_error(layer: Layer, coarse: Layer) -> float:
    """‖K - K̂‖² + ‖V - V̂‖² (eq. 4, before the mean over contexts)."""
    keys, values = layer.keys - coarse.keys, layer.values - coarse.values
    return float(np.square(keys, dtype=np.float64).sum() + np.square(values, dtype=np.float64).sum())


def _divergence(answered: Answered, reference: relay.Reference, coarse: Cache, layer: int) -> float:
    """Sum over the answer of the KL that one layer at the minimum width costs."""
    layers = list(reference.cache.layers)
    layers[layer] = coarse.layers[layer]
    log_q = relay.along_behind(answered.prefix, Cache(tuple(layers)), reference)
    return float(relay.divergence(reference.log_p, log_q).sum())
