"""What a cache's owner must know of a loaded model: layers, heads, windows, rotary embeddings. Needs torch's model.

Refuses, by name, what could not be moved from one place in a sequence to another.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from edge_agent.model.manifest import LayerSpec
from scripts.prepare_model.errors import ModelRefused

# Rotary types whose inverse frequencies are fixed once the model is loaded. `dynamic` and `longrope` change them with
# the length of the sequence, so that keys of one cache would differ from those of another.
_FIXED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})

# Tokens that end an answer in some chat format, beside those the configuration names.
_ENDING_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "</s>",
)


# Tokens that begin every text of the models that have them, unless the tokenizer's configuration says no.
_LEADING_TOKENS = frozenset({"<bos>", "<s>", "<|begin_of_text|>"})


class Architecture(Struct, frozen=True, kw_only=True):
    """The manifest's description of a model. rotary: inverse frequencies, head_dim/2 of each distinct embedding."""

    layers: tuple[LayerSpec, ...]
    kv_heads: int
    query_heads: int
    head_dim: int
    vocabulary: int
    window_tokens: int
    rotary: tuple[tuple[float, ...], ...]
    eos_ids: tuple[int, ...]


def refuse_if_unsuitable(directory: Path, name: str) -> Any:
    """The configuration of a model directory, if it is a causal language model with fixed rotary positions.

    Raises ModelRefused, which calls the model by `name`, before any weight is read.
    """
    from transformers import AutoConfig  # noqa: PLC0415

    try:
        config = AutoConfig.from_pretrained(directory)
    except (ValueError, OSError) as error:
        raise ModelRefused(f"{name}: config.json is not understood: {str(error).splitlines()[0]}") from None
    architectures = list(getattr(config, "architectures", None) or [])
    causal = any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in architectures)
    if not causal or getattr(config, "is_encoder_decoder", False):
        named = ", ".join(architectures) or config.model_type
        raise ModelRefused(f"{name} is not a causal language model: {named}")
    scaling = getattr(config, "rope_scaling", None) or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in _FIXED_ROPE_TYPES:
        raise ModelRefused(f"{name}: rotary type '{rope_type}' changes with the length of the sequence")
    if getattr(config, "attn_logit_softcapping", None):  # transformers and the export with it drop the cap in silence
        raise ModelRefused(f"{name}: attention scores are capped softly, which an export leaves out")
    return config


def describe(model: Any, tokenizer: Any) -> Architecture:
    """Layers, heads, windows and rotary frequencies of a loaded model. Raises ModelRefused.

    tokenizer: a `tokenizers.Tokenizer`.
    """
    config = model.config
    query_heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // query_heads)
    embeddings, frequencies = _rotary_embeddings(model, head_dim)
    types = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ModelRefused(f"{config.model_type}: layers of type {', '.join(unknown)} keep no plain KV cache")
    windows = _windows(config, types)
    scales = _scales(model, len(types), head_dim)
    layers = tuple(
        LayerSpec(rotary=_rotary_of(kind, embeddings), sliding_window=window, scale=scale)
        for kind, window, scale in zip(types, windows, scales, strict=True)
    )
    return Architecture(
        layers=layers,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or query_heads),
        query_heads=query_heads,
        head_dim=head_dim,
        vocabulary=int(config.vocab_size),
        window_tokens=int(config.max_position_embeddings),
        rotary=tuple(tuple(float(value) for value in row) for row in frequencies),
        eos_ids=_eos_ids(model, tokenizer),
    )


def _rotary_embeddings(model: Any, head_dim: int) -> tuple[list[str], list[NDArray[np.float32]]]:
    """Name and inverse frequencies of each rotary module; names end in `rotary_emb` or `rotary_emb_local`."""
    names, frequencies = [], []
    for name, module in model.named_modules():
        inverse = getattr(module, "inv_freq", None)
        if inverse is None:
            continue
        scaling = float(getattr(module, "attention_scaling", 1.0))
        if scaling != 1.0:
            raise ModelRefused(
                f"{model.config.model_type}: rotary scaling changes the length of keys (by {scaling:.3f})"
            )
        if len(inverse) * 2 != head_dim:
            raise ModelRefused(
                f"{model.config.model_type}: only {2 * len(inverse)} of {head_dim} key dimensions rotate"
            )
        names.append(name.rsplit(".", 1)[-1])
        frequencies.append(inverse.detach().cpu().float().numpy())
    if not names:
        raise ModelRefused(f"{model.config.model_type}: no rotary embedding found; its keys can't be moved")
    if len(names) > 2 or (len(names) == 2 and not names[1].endswith("_local")):
        raise ModelRefused(f"{model.config.model_type}: rotary embeddings {', '.join(names)} are not understood")
    return names, frequencies


def _scales(model: Any, layers: int, head_dim: int) -> list[float]:
    """What each layer multiplies products of queries and keys with."""
    found = {
        int(module.layer_idx): float(module.scaling)
        for _, module in model.named_modules()
        if hasattr(module, "layer_idx") and hasattr(module, "scaling")
    }
    return [found.get(layer, head_dim**-0.5) for layer in range(layers)]


def _rotary_of(kind: str, embeddings: list[str]) -> int:
    return 1 if kind == "sliding_attention" and len(embeddings) == 2 else 0


def _windows(config: Any, types: list[str]) -> list[int | None]:
    size = getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None) is not None:
        return [int(size) if kind == "sliding_attention" and size else None for kind in types]
    return [int(size) if size and getattr(config, "use_sliding_window", True) else None for _ in types]


def leading_ids(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """The beginning-of-sequence token, if the model wants one before every text.

    A chat's opening token (SmolLM2's <|im_start|>) is none, though a configuration may call it so: its texts read worse
    with it.
    """
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = settings.get("bos_token")
    token = named.get("content") if isinstance(named, dict) else named
    if token not in _LEADING_TOKENS or not settings.get("add_bos_token", True):
        return ()
    found = tokenizer.token_to_id(token)
    return () if found is None else (int(found),)


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    ids: set[int] = set()
    for holder in (model.config, getattr(model, "generation_config", None)):
        declared = getattr(holder, "eos_token_id", None)
        ids.update(declared if isinstance(declared, list | tuple) else [] if declared is None else [declared])
    found = (tokenizer.token_to_id(token) for token in _ENDING_TOKENS)
    return tuple(sorted(ids | {token for token in found if token is not None}))
