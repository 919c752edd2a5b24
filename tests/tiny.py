"""A random Llama that is small enough for every test, as a real bundle made by the real preparation.

`python -m tests.tiny DIRECTORY` writes the model directory (it needs torch, so it runs in a process of its own).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.prepare_model import prepare
from scripts.prepare_model.cache import cache_root
from scripts.prepare_model.calibration import SHIPPED

LAYERS, KV_HEADS, QUERY_HEADS, HEAD_DIM, VOCABULARY, WINDOW_TOKENS = 3, 2, 4, 16, 512, 1024
SEED = 7

_KEPT = 4
_ROOT = Path(__file__).resolve().parents[1]


def write_model(directory: Path, *, seed: int = SEED) -> None:
    """The model's Hugging Face directory: seeded weights, and a byte-level tokenizer that knows any text."""
    import tokenizers  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: PLC0415

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
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=QUERY_HEADS * HEAD_DIM,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=WINDOW_TOKENS,
        initializer_range=0.2,  # wide enough that greedy tokens have a margin over rounding
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>").save_pretrained(  # noqa: S106
        directory
    )
    (directory / "texts").mkdir()
    shutil.copy(SHIPPED / "incidents.md", directory / "texts")


def tiny_source(seed: int = SEED) -> Path:
    """The tiny model's directory, kept in the cache for each version of the code that makes it."""
    home = cache_root() / "tests"
    target = home / f"tiny-{_code_digest()}-{seed}" / "tiny"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as scratch:
            made = Path(scratch) / "tiny"
            subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "tests.tiny", str(made), str(seed)], check=True, cwd=_ROOT
            )
            if not target.exists():  # another worker may have been faster
                made.rename(target)
        for old in sorted(home.glob("tiny-*"), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def tiny_bundle(seed: int = SEED) -> Path:
    """The tiny model's bundle, made by the same code as the real one. About 20 s the first time."""
    source = tiny_source(seed)
    return prepare(str(source), texts=source / "texts", root=source.parent).path


def _code_digest() -> str:
    files = [Path(__file__), _ROOT / "edge_agent/model/manifest.py", *(_ROOT / "scripts/prepare_model").rglob("*.*")]
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.suffix in {".py", ".md"}:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    write_model(Path(sys.argv[1]), seed=int(sys.argv[2]))
