"""What transformers computes in float64, from joined caches with entries missing. In a process of its own, for torch.

`python -m tests.edge_agent.by_transformers MODEL GIVEN FOUND` reads a Given as JSON and writes arrays as .npz. Nothing
of the agent's code is used: caches are prefilled whole by transformers, keys are turned with complex numbers, and
entries that are missing are hidden by masks that only the question and the answer wear.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from tests import tiny

Float64 = npt.NDArray[np.float64]

MASS_QUERIES = 32
_ROOT = Path(__file__).resolve().parents[2]


class Context(Struct, frozen=True):
    """A context: its ids, and for each layer the positions of missing entries; by_head: for each KV head, too."""

    ids: tuple[int, ...]
    hidden: tuple[tuple[int, ...], ...] = ((),) * tiny.LAYERS
    by_head: tuple[tuple[tuple[int, ...], ...], ...] = ()

    def missing(self, layer: int, head: int) -> set[int]:
        """Positions whose entries a KV head lacks."""
        return set(self.by_head[layer][head] if self.by_head else self.hidden[layer])


class Case(Struct, frozen=True, kw_only=True):
    """Contexts behind the prefix, each prefilled alone behind it, then a question and an answer of `steps` tokens.

    Gives `NAME logits` (1 + steps, vocabulary), `NAME tokens` (steps,), and `NAME mass`, (layers, kv_heads, positions):
    the attention of the question's last queries.
    """

    name: str
    contexts: tuple[Context, ...] = ()
    question: tuple[int, ...]
    steps: int = 0


class Given(Struct, frozen=True, kw_only=True):
    """What to compute. texts: read in one piece by transformers as it is, which gives `text N`, logits of every token.
    moved: read from each of `starts`, which gives `keys START LAYER` and `values START LAYER`."""

    prefix: tuple[int, ...]
    cases: tuple[Case, ...] = ()
    texts: tuple[tuple[int, ...], ...] = ()
    moved: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()


def compute(source: Path, given: Given, found: Path) -> dict[str, Float64]:
    """Have it computed. found: where the arrays may be put."""
    command = [sys.executable, "-W", "ignore", "-m", __name__, str(source), "/dev/stdin", str(found)]
    text = msgspec.json.encode(given)
    done = subprocess.run(command, cwd=_ROOT, input=text, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    with np.load(found) as arrays:
        return dict(arrays)


class _Reference:
    """A model in float64, whose attention masks are made here."""

    def __init__(self, source: Path) -> None:
        import torch  # noqa: PLC0415
        from transformers import AutoModelForCausalLM, DynamicCache  # noqa: PLC0415

        torch.set_num_threads(1)
        self._torch, self._new_cache = torch, DynamicCache
        self._model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").double().eval()
        config = self._model.config
        count = config.num_hidden_layers
        sliding = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or [""] * count]
        self._windows = [config.sliding_window if each else None for each in sliding]
        bases = [config.rope_local_base_freq if each else config.rope_theta for each in sliding]
        half = config.head_dim // 2
        self._frequencies = [base ** (-np.arange(half) / half) for base in bases]
        self._kv_heads = config.num_key_value_heads
        self._masks: list[Any] | None = None
        for layer, module in enumerate(self._model.model.layers):
            module.self_attn.register_forward_pre_hook(self._hook(layer), with_kwargs=True)

    def _hook(self, layer: int) -> Any:
        def hook(_: Any, arguments: Any, named: dict[str, Any]) -> Any:
            return (arguments, named if self._masks is None else named | {"attention_mask": self._masks[layer]})

        return hook

    def read(
        self,
        ids: Sequence[int],
        past: Any = None,
        *,
        start: int | None = None,
        hidden: Sequence[Sequence[set[int]]] | None = None,
    ) -> Any:
        """Read ids after a cache; hidden: masks made here, without these positions in each layer and KV head."""
        torch = self._torch
        past = past or self._new_cache()
        held = past.get_seq_length()
        at = np.arange(len(ids)) + (held if start is None else start)
        self._masks = None if hidden is None else [self._mask(layer, at, hidden[layer]) for layer in range(len(hidden))]
        with torch.no_grad():
            return self._model(
                torch.tensor([list(ids)]),
                past_key_values=past,
                position_ids=torch.from_numpy(at)[None],
                use_cache=True,
                output_attentions=True,
            )

    def _mask(self, layer: int, at: npt.NDArray[np.int64], hidden: Sequence[set[int]]) -> Any:
        columns = np.arange(at[-1] + 1)
        masked = columns[None] > at[:, None]
        window = self._windows[layer]
        if window is not None:
            masked |= at[:, None] - columns[None] >= window
        heads = np.stack([masked | np.isin(columns, sorted(missing))[None] for missing in hidden])
        of_queries = np.repeat(heads, self._model.config.num_attention_heads // self._kv_heads, axis=0)
        return self._torch.from_numpy(np.where(of_queries, -1e300, 0.0))[None]

    def case(self, prefix: Sequence[int], case: Case) -> dict[str, Float64]:
        past, hidden = self._joined(prefix, case.contexts)
        out = self.read(case.question, past, hidden=hidden)
        found = {f"{case.name} mass": np.stack([self._mass(each) for each in out.attentions])}
        rows, tokens = [out.logits[0, -1].numpy()], []
        for _ in range(case.steps):
            tokens.append(int(rows[-1].argmax()))
            out = self.read(tokens[-1:], out.past_key_values, hidden=hidden)
            rows.append(out.logits[0, -1].numpy())
        return found | {f"{case.name} logits": np.stack(rows), f"{case.name} tokens": np.array(tokens)}

    def _mass(self, weights: Any) -> Float64:
        """Weights (1, query_heads, queries, positions), their mean over the last queries and the heads of a group."""
        last = weights[0, :, -MASS_QUERIES:].numpy().astype(np.float64)
        mass: Float64 = last.reshape(self._kv_heads, -1, last.shape[-1]).mean(1)
        return mass

    def _joined(self, prefix: Sequence[int], contexts: Sequence[Context]) -> tuple[Any, list[list[set[int]]]]:
        layers = range(len(self._windows))
        hidden: list[list[set[int]]] = [[set() for _ in range(self._kv_heads)] for _ in layers]
        if not prefix:
            return None, hidden
        joined, at = self.states(self.read(prefix)), len(prefix)
        for context in contexts:
            stood = np.arange(len(prefix), len(prefix) + len(context.ids))
            for layer, (keys, values) in enumerate(self.states(self.read([*prefix, *context.ids]))):
                for head, missing in enumerate(hidden[layer]):
                    missing |= {at + position for position in context.missing(layer, head)}
                keys = self._turned(layer, keys[:, :, len(prefix) :], -stood)  # noqa: PLW2901
                keys = self._turned(layer, keys, stood - len(prefix) + at)  # noqa: PLW2901
                held = joined[layer]
                joined[layer] = (
                    np.concatenate([held[0], keys], 2),
                    np.concatenate([held[1], values[:, :, len(prefix) :]], 2),
                )
            at += len(context.ids)
        past = self._new_cache()
        for layer, (keys, values) in enumerate(joined):
            past.update(self._torch.from_numpy(keys), self._torch.from_numpy(values), layer)
        return past, hidden

    @staticmethod
    def states(out: Any) -> list[tuple[Float64, Float64]]:
        return [(layer.keys.numpy(), layer.values.numpy()) for layer in out.past_key_values.layers]

    def _turned(self, layer: int, keys: Float64, positions: npt.NDArray[Any]) -> Float64:
        half = keys.shape[-1] // 2
        numbers = keys[..., :half] + 1j * keys[..., half:]
        numbers = numbers * np.exp(1j * np.outer(positions, self._frequencies[layer]))
        return np.concatenate([numbers.real, numbers.imag], axis=-1)


def _main(source: str, given_path: str, found_path: str) -> None:
    given = msgspec.json.decode(Path(given_path).read_bytes(), type=Given)
    reference = _Reference(Path(source))
    found: dict[str, Any] = {}
    for case in given.cases:
        found |= reference.case(given.prefix, case)
    for number, text in enumerate(given.texts):
        found[f"text {number}"] = reference.read(text).logits[0].numpy()
    for start in given.starts:
        for layer, (keys, values) in enumerate(reference.states(reference.read(given.moved, start=start))):
            found[f"keys {start} {layer}"], found[f"values {start} {layer}"] = keys[0], values[0]
    np.savez(found_path, **found)


if __name__ == "__main__":
    _main(*sys.argv[1:])
