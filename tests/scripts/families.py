"""Random models of the families a preparation may meet, each as optimum exports it.

`python -m tests.scripts.families DIRECTORY` writes them all (it needs torch, so it runs in a process of its own).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from broker_config.files import file_digest
from edge_agent.kv.cache import Float32
from edge_agent.model.manifest import FileEntry, Manifest, Prompt
from edge_agent.model.session import Model
from scripts.prepare_model.architecture import Architecture
from scripts.prepare_model.cache import cache_root, locked, shaping_versions
from scripts.prepare_model.export_graph import MODEL_FILE
from scripts.prepare_model.weights import Weights
from scripts.prepare_model.worker import RewriteJob, rewrite_all

VOCABULARY, WINDOW_TOKENS, SLIDING_WINDOW = 256, 1024, 24
_KEPT = 2
_ROOT = Path(__file__).resolve().parents[2]

_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": WINDOW_TOKENS,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

# Head dimensions differ from hidden / heads where a family allows it, scales from head_dim ** -0.5.
_GEMMA = {
    "sliding_window": SLIDING_WINDOW,
    "query_pre_attn_scalar": 40,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "llama-untied": ("Llama", {"tie_word_embeddings": False}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-scaled-rotary": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama-odd-width": ("Llama", {"hidden_size": 80, "intermediate_size": 72, "head_dim": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": SLIDING_WINDOW}),
    "gemma3": ("Gemma3Text", _GEMMA),
    "gemma2-uncapped": ("Gemma2", _GEMMA | {"attn_logit_softcapping": None}),
    "granite": ("Granite", {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 3.0}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {}),
}
REFUSED = {"phi3": "layer 0, keys: no rotary embedding stands before the cache"}
"""Families whose graphs are not rewritten, and why: Phi-3 puts a part that does not rotate, of no size, behind keys."""

UNDERSTOOD = tuple(name for name in FAMILIES if name not in REFUSED)


class Family(Struct, frozen=True, kw_only=True):
    """An exported model: its directory holds model.onnx."""

    directory: Path
    architecture: Architecture

    @property
    def graph(self) -> Path:
        return self.directory / MODEL_FILE

    @property
    def sliding(self) -> bool:
        return any(layer.sliding_window for layer in self.architecture.layers)


def family(name: str) -> Family:
    """A family's export, kept in the cache for each version of what makes it. All are made at once, in a minute."""
    home = cache_root() / "tests"
    target = home / f"families-{_digest()}"
    with locked(home, lambda: None):  # another worker may be at it
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=home, prefix=".tmp-") as scratch:
                made = Path(scratch) / "families"
                command = [sys.executable, "-W", "ignore", "-m", "tests.scripts.families", str(made)]
                subprocess.run(command, check=True, cwd=_ROOT, capture_output=True)
                made.rename(target)
        for old in sorted(home.glob("families-*"), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    directory = target / name
    raw = (directory / "architecture.json").read_bytes()
    return Family(directory=directory, architecture=msgspec.json.decode(raw, type=Architecture))


def texts(count: int, tokens: int, *, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Random token ids."""
    drawn = np.random.default_rng(seed).integers(1, VOCABULARY, size=(count, tokens))
    return tuple(tuple(row) for row in drawn.tolist())


def rewrite_family(found: Family, into: Path) -> dict[Weights, Path]:
    """Bundles of a family in all weight precisions, by the code that makes real ones."""
    scratch = into / "work"
    scratch.mkdir(parents=True)
    job = RewriteJob(
        scratch=str(scratch),
        export=str(found.directory),
        into=str(into),
        architecture=found.architecture,
        texts=texts(8, 96),
    )
    rewrite_all(job, lambda _: None)
    for weights in Weights:
        write_manifest(into / weights, found.architecture, weights)
    return {weights: into / weights for weights in Weights}


def write_manifest(bundle: Path, architecture: Architecture, weights: str) -> None:
    """A manifest by which a graph runs."""
    files = tuple(
        FileEntry(path=path.name, size_bytes=path.stat().st_size, sha256=file_digest(path))
        for path in sorted(bundle.iterdir())
    )
    manifest = Manifest(
        name="family",
        source="random",
        fingerprint="0" * 32,
        tokenizer_digest="0" * 32,
        weight_precision=weights,
        model_file=MODEL_FILE,
        layers=architecture.layers,
        kv_heads=architecture.kv_heads,
        query_heads=architecture.query_heads,
        head_dim=architecture.head_dim,
        vocabulary=architecture.vocabulary,
        window_tokens=architecture.window_tokens,
        rotary=architecture.rotary,
        eos_ids=architecture.eos_ids,
        prompt=Prompt(
            version=1, prefix="", prefix_ids=(1,), context_format="", facts_format="", question_format="", stop=()
        ),
        ladder=(),
        ladder_measured_on="nothing",
        files=files,
        made_with={},
    )
    (bundle / "manifest.json").write_bytes(msgspec.json.encode(manifest))


def read(bundle: Path, ids: tuple[int, ...], *, chunk: int = 128) -> tuple[Float32, Float32, Float32]:
    """Logits (tokens, vocabulary), keys without phase and values (layers, kv_heads, tokens, head_dim) of a text."""
    live = Model(bundle, prefill_chunk=chunk).new_context()
    logits = live.prefill(ids, all_logits=True)
    cache = live.extract(0, len(ids))
    keys, values = (np.stack([getattr(layer, kind) for layer in cache.layers]) for kind in ("keys", "values"))
    return logits, keys, values


def write_families(into: Path) -> None:
    """Export all families."""
    import tokenizers  # noqa: PLC0415
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    from scripts.prepare_model import export  # noqa: PLC0415
    from scripts.prepare_model.architecture import describe  # noqa: PLC0415

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    for seed, (name, (kind, more)) in enumerate(FAMILIES.items()):
        torch.manual_seed(seed)
        directory = into / name
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**_SIZE | more))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases begin at nought, norms at one: leaving them out would not show
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(into / f"{name}.source")
        loaded = export.load(into / f"{name}.source")
        directory.mkdir()
        (directory / "architecture.json").write_bytes(msgspec.json.encode(describe(loaded, tokenizer)))
        export.export(into / f"{name}.source", directory / "onnx")
        for path in (directory / "onnx").glob("model.onnx*"):
            path.rename(directory / path.name)
        shutil.rmtree(directory / "onnx")
        shutil.rmtree(into / f"{name}.source")


def _digest() -> str:
    digest = hashlib.sha256(repr((_SIZE, FAMILIES, shaping_versions())).encode())
    for path in (
        Path(__file__),
        *(_ROOT / "scripts/prepare_model" / name for name in ("export.py", "architecture.py")),
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    write_families(Path(sys.argv[1]))
