"""transformers' QuantizedCache as a peer: its own quantization, with a backend that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edge_agent.kv.cache import Cache
from scripts.peers.method import Method, assembled

Backend = Literal["quanto", "hqq"]
_BACKENDS: dict[Backend, tuple[str, str]] = {"quanto": ("optimum.quanto", "optimum-quanto"), "hqq": ("hqq", "hqq")}
"""The module and the package of each."""
_AXES: dict[Backend, int] = {"quanto": 0, "hqq": 1}
"""As transformers recommends: with both, a group is 64 neighbours in a head's entries."""


@dataclass(frozen=True)
class Kept:
    """A filled QuantizedCache. nothing: a float16 tensor (1, kv_heads, 0, head_dim), to read it by."""

    cache: Any
    nothing: Any

    @property
    def nbytes(self) -> int:
        """Of what it holds of the tokens: its layers have no name for that but private ones."""
        return sum(_bytes((layer._quantized_keys, layer._quantized_values)) for layer in self.cache.layers)


def quantized_cache(name: str, *, backend: Backend, bits: int, threads: int) -> Method[Kept]:
    """A prefill's keys and values in a QuantizedCache, given in fp16, so that its scales are; as attention reads them.

    threads: of torch, in all that follows.
    Raises ImportError, naming the package, where transformers or the backend is missing.
    """
    module, package = _BACKENDS[backend]
    for needed, distribution in (("torch", "torch"), ("transformers", "transformers"), (module, package)):
        if not _installed(needed):
            raise ImportError(f"{distribution} is not installed")
    import torch  # noqa: PLC0415  heavy, and the export extra's

    torch.set_num_threads(threads)

    def encode(cache: Cache) -> Kept:
        return _filled(cache, backend, bits)

    return Method(name, encode, _read, lambda kept: kept.nbytes, packages=("transformers", package))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that it would be in
        return False


def _filled(cache: Cache, backend: Backend, bits: int) -> Kept:
    import torch  # noqa: PLC0415
    from transformers import PretrainedConfig, QuantizedCache  # noqa: PLC0415

    config = PretrainedConfig(num_hidden_layers=len(cache.layers))
    kept = QuantizedCache(backend, config, nbits=bits, axis_key=_AXES[backend], axis_value=_AXES[backend])
    for index, layer in enumerate(cache.layers):
        keys, values = (torch.from_numpy(array.astype(np.float16))[None] for array in (layer.keys, layer.values))
        kept.update(keys, values, index)
    return Kept(kept, keys[:, :, :0])


def _read(kept: Kept) -> Cache:
    """All of it, by updates that add no tokens."""
    pairs = (kept.cache.update(kept.nothing, kept.nothing, index) for index in range(len(kept.cache.layers)))
    return assembled([tensor[0].float().numpy() for pair in pairs for tensor in pair])


def _bytes(held: Any) -> int:
    """Of all tensors in what a backend made: in tuples, in dictionaries, and those that others consist of."""
    if hasattr(held, "__tensor_flatten__"):
        return _bytes([getattr(held, part) for part in held.__tensor_flatten__()[0]])
    if hasattr(held, "element_size"):
        return int(held.numel() * held.element_size())
    if isinstance(held, Mapping):
        return _bytes(list(held.values()))
    return sum(map(_bytes, held)) if isinstance(held, Iterable) and not isinstance(held, str) else 0
