"""What makes two models the same model: tensors, configuration, rotary frequencies and tokenizer.

The fingerprint is of the source as transformers loads it in float32, never of the ONNX file: another exporter, another
precision, another directory or another sharding of the same weights give the same fingerprint, and a single changed
weight gives another. Caches of equal fingerprints fit each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGEST_HEX_DIGITS = 32  # 128 bits

# Fields of a configuration that change no logit of an inference run.
_IDLE_FIELDS = frozenset({"attention_dropout", "embd_pdrop", "initializer_range", "pretraining_tp", "use_cache"})


def fingerprint(
    tensors: Iterable[tuple[str, NDArray[Any]]],
    configuration: Mapping[str, Any],
    rotary: Iterable[NDArray[np.float32]],
    tokenizer: str,
) -> str:
    """128 bits of SHA-256 over everything that decides what a cache of this model holds.

    tensors: unique (name, array) pairs in any order; rotary: inverse frequencies, in the order of the manifest;
    tokenizer: the tokenizer's digest.
    """
    digest = hashlib.sha256(b"kvbus model fingerprint 1\n")
    for name, array in sorted(tensors, key=lambda pair: pair[0]):
        little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name}:{little.dtype.name}:{list(little.shape)}\n".encode())
        digest.update(little.data.cast("B") if little.size else b"")
    digest.update(canonical(configuration))
    for frequencies in rotary:
        digest.update(np.asarray(frequencies, dtype="<f4").tobytes())
        digest.update(b"\n")
    digest.update(tokenizer.encode())
    return digest.hexdigest()[:DIGEST_HEX_DIGITS]


def configuration_that_matters(
    values: Mapping[str, Any], declared: Iterable[str], generic: Iterable[str]
) -> dict[str, Any]:
    """The fields of a configuration that its own model class declares, without paths, versions and training knobs.

    values: the whole configuration; declared: the names the model's configuration class knows; generic: the names
    every configuration has (names of token ids, return types, generation defaults).
    """
    kept = (set(declared) - set(generic) - _IDLE_FIELDS) | {"model_type", "tie_word_embeddings"}
    return {name: values[name] for name in sorted(kept) if name in values and not name.startswith("_")}


def tokenizer_digest(tokenizer_json: Path) -> str:
    """128 bits of SHA-256 of what a tokenizer.json does: order of keys, truncation and padding do not count."""
    content = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    for setting in ("truncation", "padding"):
        content.pop(setting, None)
    model = content.get("model", {})
    if isinstance(model.get("merges"), list):  # written as "a b" by older versions, as ["a", "b"] by newer ones
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return hashlib.sha256(canonical(content)).hexdigest()[:DIGEST_HEX_DIGITS]


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and one spelling per number: floats as float32 holds them, whole ones as integers."""
    return json.dumps(_normal(value), sort_keys=True, separators=(",", ":"), allow_nan=True).encode()


def _normal(value: Any) -> Any:
    if isinstance(value, float):
        single = float(np.float32(value))
        return int(single) if single.is_integer() else single
    if isinstance(value, Mapping):
        return {str(key): _normal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_normal(item) for item in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)
