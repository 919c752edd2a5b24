"""The model bundle on disk: what `scripts.prepare_model` writes and an agent loads.

A bundle is a directory: manifest.json, the ONNX model (and its external data, if any), tokenizer.json, and the
model's licence. manifest.json is written last and lists every other file with its size and SHA-256, so that a bundle
that was cut short is never mistaken for a whole one.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from broker_config.files import file_digest
from broker_config.messages import ModelInfo, Rung
from broker_config.messages.base import Digest
from edge_agent.errors import BundleInvalid
from edge_agent.kv.profile import Profile

MANIFEST_VERSION = 5
MANIFEST_NAME = "manifest.json"

Positive = Annotated[int, Meta(ge=1, le=2**31)]


class FileEntry(Struct, frozen=True, kw_only=True):
    """One file of the bundle."""

    path: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    size_bytes: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class LayerSpec(Struct, frozen=True, kw_only=True):
    """What one layer's attention is like: an index into `rotary`, its sliding window (None: full), and what products of
    queries and keys are multiplied with."""

    rotary: Annotated[int, Meta(ge=0, le=64)]
    sliding_window: Positive | None = None
    scale: Annotated[float, Meta(gt=0)]


class Prompt(Struct, frozen=True, kw_only=True):
    """The versioned prompt. prefix is prefilled first, always; then every context as context_format; then the facts
    that came with the contexts, if any; then the question.

    Each piece is tokenized by itself without special tokens; prefix_ids are the prefix's token ids.
    `{text}`, `{facts}` and `{question}` are the places of the content.
    """

    version: Positive
    prefix: str
    prefix_ids: Annotated[tuple[int, ...], Meta(min_length=1)]
    context_format: str
    facts_format: str
    question_format: str
    stop: tuple[str, ...]


class Precision(Struct, frozen=True, kw_only=True):
    """What one choice of weights takes and costs, measured when the bundle was made, over `tokens` of given text.

    load_s: on the machine that prepared it. nll_nats: mean negative log likelihood of a token (perplexity is its
    exponential); kl_nats and agreement: mean KL divergence from float32 weights and share of equal argmaxes.
    """

    weights: str
    size_bytes: Annotated[int, Meta(ge=0)]
    load_s: float
    tokens: Positive
    nll_nats: float
    kl_nats: Annotated[float, Meta(ge=0)]
    agreement: Annotated[float, Meta(ge=0, le=1)]

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll_nats)


class Manifest(Struct, frozen=True, kw_only=True):
    """manifest.json.

    fingerprint is of the source tensors, configuration, rope and tokenizer, never of the ONNX file. rotary holds the
    inverse frequencies (float32 values, head_dim/2 of them) of each distinct rotary embedding of the model. transform:
    the id of the one in the bundle, if it has one. ladder: most faithful first; baselines: rungs measured beside it.
    """

    manifest_version: Annotated[int, Meta(ge=MANIFEST_VERSION, le=MANIFEST_VERSION)] = MANIFEST_VERSION
    name: Annotated[str, Meta(min_length=1, max_length=128)]
    source: str
    fingerprint: Digest
    tokenizer_digest: Digest
    weight_precision: str
    precisions: tuple[Precision, ...] = ()
    model_file: str
    layers: Annotated[tuple[LayerSpec, ...], Meta(min_length=1, max_length=512)]
    kv_heads: Positive
    query_heads: Positive
    head_dim: Positive
    vocabulary: Positive
    window_tokens: Positive
    rotary: Annotated[tuple[tuple[float, ...], ...], Meta(min_length=1)]
    eos_ids: tuple[int, ...]
    prompt: Prompt
    ladder: tuple[Rung, ...]
    baselines: tuple[Rung, ...] = ()
    ladder_measured_on: str
    profile: Profile | None = None
    transform: Digest | None = None
    files: tuple[FileEntry, ...]
    made_with: dict[str, str]

    @property
    def elements_per_token(self) -> int:
        """Cache elements (keys and values of all layers) of one token."""
        return 2 * len(self.layers) * self.kv_heads * self.head_dim

    @property
    def prefix_id(self) -> str:
        """Digest of the prompt's prefix: caches made after another prefix do not fit."""
        ids = ",".join(map(str, self.prompt.prefix_ids))
        return hashlib.sha256(f"{self.prompt.version}:{ids}".encode()).hexdigest()[:32]

    def info(self) -> ModelInfo:
        """What an agent says of this model on the bus."""
        return ModelInfo(
            name=self.name,
            fingerprint=self.fingerprint,
            tokenizer=self.tokenizer_digest,
            prefix=self.prefix_id,
            weight_precision=self.weight_precision,
            elements_per_token=self.elements_per_token,
            bytes_per_token_id=2 if self.vocabulary <= 2**16 else 4,
            window_tokens=self.window_tokens,
            transform=self.transform,
            ladder=self.ladder,
            baselines=self.baselines,
        )


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle, with every listed file present at its listed size.

    Raises BundleInvalid, naming the file or field. Sizes are compared, digests are not: see `verify_digests`.
    """
    path = bundle / MANIFEST_NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise BundleInvalid(
            f"no model bundle at {bundle}: {MANIFEST_NAME} is missing; run `make prepare-model`"
        ) from None
    except OSError as error:
        raise BundleInvalid(f"model bundle at {bundle} can't be read: {error.strerror}") from None
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.DecodeError as error:
        raise BundleInvalid(f"{path} is not a manifest of version {MANIFEST_VERSION}: {error}") from None
    for entry in manifest.files:
        try:
            size = (bundle / entry.path).stat().st_size
        except OSError:
            raise BundleInvalid(f"model bundle at {bundle} lacks {entry.path}; prepare it again") from None
        if size != entry.size_bytes:
            raise BundleInvalid(
                f"model bundle at {bundle} is truncated: {entry.path} has {size} bytes of {entry.size_bytes}; "
                "prepare it again"
            )
    half = manifest.head_dim // 2
    if any(len(frequencies) != half for frequencies in manifest.rotary):
        raise BundleInvalid(f"{path}: rotary frequencies must be {half} per embedding")
    if any(layer.rotary >= len(manifest.rotary) for layer in manifest.layers):
        raise BundleInvalid(f"{path}: a layer names a rotary embedding that is not there")
    return manifest


def verify_digests(bundle: Path, manifest: Manifest) -> None:
    """Read every file of the bundle and compare its SHA-256. Raises BundleInvalid, naming the file."""
    for entry in manifest.files:
        if file_digest(bundle / entry.path) != entry.sha256:
            raise BundleInvalid(f"model bundle at {bundle}: {entry.path} is damaged; prepare it again")
