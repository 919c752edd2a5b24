"""From a source to an ONNX graph with past, checked against the source. Runs in the worker process, with torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray

from scripts.prepare_model import identity
from scripts.prepare_model.architecture import Architecture
from scripts.prepare_model.errors import ExportFailed, ModelRefused
from scripts.prepare_model.export_graph import MODEL_FILE, ExportGraph
from scripts.prepare_model.gguf_tokenizer import write_tokenizer

LARGEST_LOGIT_DIFFERENCE = 1e-2
_ROTATION_SHIFT = 37  # any odd number: far enough to turn every frequency
_ROTATION_TOLERANCE = 2e-3  # of the largest key of the layer; float32 rounding leaves about 1e-5


class Check(Struct, frozen=True, kw_only=True):
    """How far the exported graph is from the source on a real text."""

    largest_logit_difference: float
    equal_tokens: int
    compared_tokens: int

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest_logit_difference:.1e}, "
            f"{self.equal_tokens} of {self.compared_tokens} greedy tokens equal"
        )


def from_gguf(gguf: Path, into: Path) -> None:
    """A GGUF file as a Hugging Face directory: float32 safetensors, configuration, tokenizer. Raises ModelRefused."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.save_pretrained(into)
    if not write_tokenizer(gguf, into):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.save_pretrained(into)


def load(directory: Path) -> Any:
    """The causal language model of a directory, float32, ready to run."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ModelRefused(f"{directory.name} can't be loaded: {str(error).splitlines()[0]}") from error
    return model.eval()


def fingerprint(model: Any, architecture: Architecture, tokenizer: str) -> str:
    """The identity of a loaded model. Tied tensors count once, so that it does not matter whether a file held both."""
    from transformers import PretrainedConfig  # noqa: PLC0415

    config = model.config
    matters = identity.configuration_that_matters(
        config.to_dict(), type(config)().to_dict(), PretrainedConfig().to_dict()
    )
    rotary = [np.array(row, dtype=np.float32) for row in architecture.rotary]
    return identity.fingerprint(_tensors(model), matters, rotary, tokenizer)


def export(directory: Path, into: Path) -> None:
    """model.onnx (and its external data) of a model directory, with past, by optimum. Raises ExportFailed."""
    from optimum.exporters.onnx import main_export  # noqa: PLC0415

    try:
        main_export(
            str(directory),
            output=into,
            task="text-generation-with-past",
            do_validation=False,
            device="cpu",
            dtype="fp32",
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ExportFailed(f"optimum can't export {directory.name}: {str(error).splitlines()[0]}") from error
    if not (into / MODEL_FILE).is_file():
        raise ExportFailed(f"optimum wrote no {MODEL_FILE} for {directory.name}")


def check_rotation(model: Any, ids: list[int], architecture: Architecture) -> None:
    """Refuse a model whose keys do not turn with their position as half-split rotary frequencies say.

    The same tokens are read at two places; keys without phase must agree in every layer. So interleaved rotation,
    layers without positions, or a cache that holds no plain keys are found out whatever the configuration says.
    """
    count = min(len(ids), *(layer.sliding_window or len(ids) for layer in architecture.layers))
    tokens = torch.tensor([ids[:count]])
    here = torch.arange(count)[None]
    before, after = (
        _forward(model, tokens, position_ids=here + shift).past_key_values for shift in (0, _ROTATION_SHIFT)
    )
    for index, layer in enumerate(architecture.layers):
        frequencies = torch.tensor(architecture.rotary[layer.rotary])
        try:
            first, second = before[index][0], after[index][0]
            turned = _turn(first, frequencies, _ROTATION_SHIFT)
            apart = float((turned - second).abs().max()) / float(second.abs().max())
        except (TypeError, IndexError, KeyError, RuntimeError) as error:
            raise ModelRefused(f"{model.config.model_type}: layer {index} keeps no plain keys") from error
        if not apart < _ROTATION_TOLERANCE:
            raise ModelRefused(
                f"{model.config.model_type}: keys of layer {index} do not turn as half-split rotary positions do"
            )


def check_export(model: Any, graph: ExportGraph, ids: list[int], *, greedy: int = 16) -> Check:
    """Logits of a text, then greedy tokens with past, from onnxruntime and from transformers. Raises ExportFailed."""
    graph.restart()
    ours = graph.run(np.array([ids], dtype=np.int64))[0]
    theirs = _forward(model, torch.tensor([ids]))
    difference = float(np.abs(ours - theirs.logits[0].numpy()).max())
    if not difference <= LARGEST_LOGIT_DIFFERENCE:
        raise ExportFailed(
            f"the exported graph differs from its source: largest logit difference {difference:.3g}, "
            f"at most {LARGEST_LOGIT_DIFFERENCE:g} is accepted"
        )
    past, last, equal = theirs.past_key_values, theirs.logits[0, -1].numpy(), 0
    own = ours[-1]
    for _ in range(greedy):
        token = int(np.argmax(last))
        if int(np.argmax(own)) != token:
            break
        equal += 1
        step = _forward(model, torch.tensor([[token]]), past_key_values=past)
        past, last = step.past_key_values, step.logits[0, -1].numpy()
        own = graph.run(np.array([[token]], dtype=np.int64))[0, -1]
    if equal < greedy and abs(float(last[int(np.argmax(own))] - last.max())) > LARGEST_LOGIT_DIFFERENCE:
        raise ExportFailed(f"the exported graph's answer leaves its source's after {equal} greedy tokens")
    return Check(largest_logit_difference=difference, equal_tokens=equal, compared_tokens=greedy)


def sample(
    graph: ExportGraph, first_id: int, never: list[int], *, count: int, tokens: int, seed: int
) -> list[list[int]]:
    """Texts of the model's own, as ids: drawn at temperature 1 after `first_id`, which is left out.

    never: ids that are not drawn (those that would end a text).
    """
    graph.restart(batch=count)
    rng = np.random.default_rng(seed)
    rows = np.full((count, 1), first_id, dtype=np.int64)
    drawn = []
    for _ in range(tokens):
        logits = graph.run(rows)[:, -1].astype(np.float64)
        logits[:, never] = -np.inf
        noise = rng.gumbel(size=logits.shape)
        rows = np.argmax(logits + noise, axis=-1)[:, None]
        drawn.append(rows)
    return [[int(token) for token in row] for row in np.concatenate(drawn, axis=1)]


def _forward(model: Any, ids: Any, **more: Any) -> Any:
    with torch.no_grad():
        return model(ids, use_cache=True, **more)


def _tensors(model: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    seen: set[tuple[int, int]] = set()
    for name, tensor in sorted(model.state_dict().items()):
        place = (tensor.data_ptr(), tensor.numel())
        if place in seen and tensor.numel():
            continue
        seen.add(place)
        yield name, tensor.detach().cpu().contiguous().numpy()


def _turn(keys: Any, frequencies: Any, by: int) -> Any:
    """Keys (batch, heads, entries, head_dim) turned on by so many positions, half-split."""
    cosine, sine = torch.cos(frequencies * by), torch.sin(frequencies * by)
    first, second = keys.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
