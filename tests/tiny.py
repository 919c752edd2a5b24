"""A random Llama and a random Gemma that are small enough for every test, as real bundles made by the real preparation.

`python -m tests.tiny FAMILY DIRECTORY SEED` writes a model directory (it needs torch, so it runs in a process of its
own).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.prepare_model import prepare
from scripts.prepare_model.cache import cache_root
from scripts.prepare_model.calibration import SHIPPED

LAYERS, KV_HEADS, QUERY_HEADS, HEAD_DIM, VOCABULARY, WINDOW_TOKENS = 3, 2, 4, 16, 512, 1024
SEED = 7

GEMMA_WINDOW = 24
"""The sliding window of the tiny Gemma, in positions."""

GEMMA_LAYERS = ("sliding_attention", "full_attention", "sliding_attention")

_KEPT = 4
_ROOT = Path(__file__).resolve().parents[1]


def write_model(directory: Path, *, seed: int = SEED) -> None:
    """The Llama's Hugging Face directory: seeded weights, and a byte-level tokenizer that knows any text."""
    import torch  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(seed)
    _save(LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **_shape())), directory)


def write_gemma(directory: Path, *, seed: int = SEED) -> None:
    """The same of a Gemma 3: sliding windows among full layers, two rotary bases, norms on queries and keys."""
    import torch  # noqa: PLC0415
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig  # noqa: PLC0415

    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        num_hidden_layers=len(GEMMA_LAYERS),
        layer_types=list(GEMMA_LAYERS),
        sliding_window=GEMMA_WINDOW,
        query_pre_attn_scalar=HEAD_DIM,
        rope_theta=100_000.0,
        rope_local_base_freq=1_000.0,
        pad_token_id=0,
        **_shape(),
    )
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(-0.4, 0.4)  # they are zeros in a new model, and would hide what becomes of them
    _save(model, directory)


def _shape() -> dict[str, Any]:
    """What the configurations of both families have in common."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": QUERY_HEADS * HEAD_DIM,
        "intermediate_size": 96,
        "num_attention_heads": QUERY_HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": WINDOW_TOKENS,
        "initializer_range": 0.2,  # wide enough that greedy tokens have a margin over rounding
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _save(model: Any, directory: Path) -> None:
    import tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([str(path) for path in sorted(SHIPPED.glob("*.md"))], trainer)
    model.save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>").save_pretrained(  # noqa: S106
        directory
    )
    (directory / "texts").mkdir()
    shutil.copy(SHIPPED / "incidents.md", directory / "texts")


def tiny_source(seed: int = SEED) -> Path:
    """The tiny Llama's directory, kept in the cache for each version of the code that makes it."""
    return _source("tiny", seed)


def tiny_gemma_source(seed: int = SEED) -> Path:
    """The tiny Gemma's directory, kept likewise."""
    return _source("gemma", seed)


def _source(family: str, seed: int) -> Path:
    home = cache_root() / "tests"
    target = home / f"{family}-{_code_digest()}-{seed}" / family
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as scratch:
            made = Path(scratch) / family
            subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "tests.tiny", family, str(made), str(seed)],
                check=True,
                cwd=_ROOT,
            )
            if not target.exists():  # another worker may have been faster
                made.rename(target)
        for old in sorted(home.glob(f"{family}-*"), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def tiny_bundle(seed: int = SEED, weights: str = "fp32") -> Path:
    """The tiny model's bundle, made by the same code as the real one. About 20 s the first time.

    Its weights are float32 unless said otherwise, so that what differs by more than rounding is a mistake.
    """
    return _bundle(tiny_source(seed), weights)


def tiny_gemma_bundle(seed: int = SEED, weights: str = "fp32") -> Path:
    """The tiny Gemma's bundle."""
    return _bundle(tiny_gemma_source(seed), weights)


def _bundle(source: Path, weights: str) -> Path:
    return prepare(str(source), weights=weights, texts=source / "texts", root=source.parent).path


def _code_digest() -> str:
    files = [Path(__file__), _ROOT / "edge_agent/model/manifest.py", *(_ROOT / "scripts/prepare_model").rglob("*.*")]
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.suffix in {".py", ".md"}:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    {"tiny": write_model, "gemma": write_gemma}[sys.argv[1]](Path(sys.argv[2]), seed=int(sys.argv[3]))
