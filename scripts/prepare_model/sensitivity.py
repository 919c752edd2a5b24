"""What a model's answers owe to each entry of a context's cache: gradients, by torch. Runs in the worker process.

A context is read behind the prompt's prefix; then a question and the greedy answer are read behind a cache whose
entries are leaves of the graph, answers are drawn from what comes out, and their log-probabilities are followed back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edge_agent.kv.cache import Float32, Int32
from edge_agent.kv.transform import Transform
from edge_agent.model.rotary import unrotate
from scripts.prepare_model.answered import Asked
from scripts.prepare_model.architecture import Architecture
from scripts.prepare_model.errors import ExportFailed
from scripts.prepare_model.fitting import Moments

ANSWER_TOKENS = 16
DRAWS = 4
"""Answers drawn for each passage. On SmolLM2 half as many lose 10 % more at the same bits."""
SEED = 7


@dataclass(frozen=True, eq=False, kw_only=True)
class Followed:
    """A loaded model whose answers are followed back. prefix: the prompt's; ends: tokens that end an answer."""

    model: Any
    architecture: Architecture
    prefix: tuple[int, ...]
    ends: Set[int]

    def fit(self, asked: Sequence[Asked], on_passage: Callable[[int], None]) -> tuple[Transform, Transform]:
        """The transform of the model's caches, and one that was fitted to every second passage only, the first among
        them: what the other passages lose with it is honest. on_passage is called with the number of passages done.

        Raises ExportFailed if the model's cache can't be followed.
        """
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        draw = torch.Generator().manual_seed(SEED)
        shape = self.architecture
        halves = [Moments(len(shape.layers), 2 * shape.kv_heads * shape.head_dim) for _ in range(2)]
        try:
            for index, each in enumerate(asked):
                self._add(halves[index % 2], each, draw)
                on_passage(index + 1)
            return (halves[0] + halves[1]).fit(), halves[0].fit()
        except (TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
            raise ExportFailed(f"{self.model.config.model_type}: its cache can't be followed: {error}") from error

    def _add(self, moments: Moments, asked: Asked, draw: torch.Generator) -> None:
        """Entries and gradients of one context."""
        start, layers = len(self.prefix), self.architecture.layers
        read = _read(self.model, [*self.prefix, *asked.context], _cache([])).past_key_values
        whole = [(read[layer][0], read[layer][1]) for layer in range(len(layers))]
        answer = self._greedy(whole, asked.question)
        leaves = [tensor[:, :, start:].clone().requires_grad_() for pair in whole for tensor in pair]
        joined = [
            (torch.cat([keys[:, :, :start], own_keys], 2), torch.cat([values[:, :, :start], own_values], 2))
            for (keys, values), own_keys, own_values in zip(whole, leaves[::2], leaves[1::2], strict=True)
        ]
        logits = self.model(torch.tensor([[*asked.question, *answer]]), past_key_values=_cache(joined)).logits[0]
        log_p = torch.log_softmax(logits[len(asked.question) - 1 :].double(), -1)
        found = _gradients(log_p, leaves, draw)
        positions = np.arange(start, start + len(asked.context), dtype=np.int32)
        for layer, spec in enumerate(layers):
            frequencies = np.array(self.architecture.rotary[spec.rotary], dtype=np.float32)
            at = 2 * layer
            moments.add(layer, _rows(leaves[at].detach(), leaves[at + 1].detach(), positions, frequencies))
            for drawn in found:
                moments.add_gradients(layer, _rows(drawn[at], drawn[at + 1], positions, frequencies))
        moments.rows += len(asked.context)
        moments.samples += DRAWS * len(log_p)

    def _greedy(self, cache: Sequence[tuple[Any, Any]], question: Sequence[int]) -> list[int]:
        past, ids, answer = _cache(cache), list(question), list[int]()
        while len(answer) < ANSWER_TOKENS - 1:
            token = int(_read(self.model, ids, past).logits[0, -1].argmax())
            if token in self.ends:
                break
            answer.append(token)
            ids = [token]
        return answer


def _gradients(log_p: Any, leaves: Sequence[Any], draw: torch.Generator) -> list[tuple[Any, ...]]:
    """Of the log-probability of DRAWS answers drawn from it, at each leaf."""
    drawn = torch.multinomial(log_p.detach().exp(), DRAWS, replacement=True, generator=draw)
    return [
        torch.autograd.grad(log_p.gather(1, drawn[:, [each]]).sum(), leaves, retain_graph=each + 1 < DRAWS)
        for each in range(DRAWS)
    ]


def _rows(keys: Any, values: Any, positions: Int32, frequencies: Float32) -> Float32:
    """Keys (or gradients at them) without phase, then values, of each entry: float32 (entries, width)."""
    both = np.stack([unrotate(keys[0].numpy(), positions, frequencies), values[0].numpy()])
    rows: Float32 = both.transpose(2, 0, 1, 3).reshape(len(positions), -1)
    return rows


def _read(model: Any, ids: Sequence[int], past: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([list(ids)]), past_key_values=past, use_cache=True)


def _cache(layers: Sequence[tuple[Any, Any]]) -> Any:
    """A cache that keeps all entries, of layers with a sliding window too: their masks say what is seen."""
    from transformers import DynamicCache  # noqa: PLC0415

    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache
