"""What is read off a loaded model, and which models are refused. Each runs in a process of its own, which has torch."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

_CODE = """
    import json, sys, tempfile
    from pathlib import Path
    import msgspec, tokenizers, torch, transformers
    from scripts.prepare_model.architecture import describe, refuse_if_unsuitable
    from scripts.prepare_model.errors import ModelRefused
    from scripts.prepare_model.export import check_rotation

    size = dict(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=6, intermediate_size=64,
        vocab_size=64, initializer_range=0.2, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    torch.manual_seed(0)
    for kind, more in json.loads(sys.argv[1]):
        config = getattr(transformers, kind + "Config")(**size, **more)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        config.architectures = [type(model).__name__]
        try:
            with tempfile.TemporaryDirectory() as directory:
                config.save_pretrained(directory)
                refuse_if_unsuitable(Path(directory), "it")
            found = describe(model, tokenizer)
            check_rotation(model, [i % 60 for i in range(80)], found)
            print(msgspec.json.encode(found).decode())
        except ModelRefused as error:
            print(json.dumps(str(error)))
"""


def _look_at(*models: tuple[str, dict[str, Any]]) -> list[Any]:
    """Of each random model: its architecture as a dictionary, or the line that refuses it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(_CODE), json.dumps(models)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(('{"layers', '"'))]
    assert len(found) == len(models), done.stderr
    return found


@pytest.mark.slow
def test_gemma_has_two_rotary_bases_and_windows_in_most_layers() -> None:
    (gemma,) = _look_at(("Gemma3Text", {"sliding_window": 24, "sliding_window_pattern": 3, "head_dim": 16}))
    layers = [(layer["rotary"], layer["sliding_window"]) for layer in gemma["layers"]]
    assert layers == [(1, 24), (1, 24), (0, None)] * 2
    assert gemma["rotary"][0][1] == pytest.approx(1_000_000 ** (-1 / 8), rel=1e-5)
    assert gemma["rotary"][1][1] == pytest.approx(10_000 ** (-1 / 8), rel=1e-5)


@pytest.mark.slow
def test_usual_families_are_taken() -> None:
    qwen, mistral, scaled = _look_at(
        ("Qwen3", {"head_dim": 32}),
        ("Mistral", {"sliding_window": 32}),
        ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    )
    assert (qwen["head_dim"], qwen["kv_heads"], qwen["query_heads"]) == (32, 2, 4)
    assert [layer["sliding_window"] for layer in mistral["layers"]] == [32] * 6
    assert scaled["rotary"][0][0] == 0.5


@pytest.mark.slow
def test_what_could_not_be_moved_is_refused_by_name() -> None:
    factors = [1.0] * 8
    said = _look_at(
        ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        ("Llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "short_factor": factors,
                                    "long_factor": factors}}),
        ("Llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}),
        ("SmolLM3", {"no_rope_layer_interval": 4}),
        ("Cohere", {}),
        ("Phi", {}),
        ("Gemma2", {"head_dim": 16}),
    )  # fmt: skip
    wanted = (
        "rotary type 'dynamic' changes with the length",
        "rotary type 'longrope' changes with the length",
        "rotary scaling changes the length of keys",
        "smollm3: keys of layer 3 do not turn as half-split",
        "cohere: keys of layer 0 do not turn as half-split",
        "phi: only 8 of 16 key dimensions rotate",
        "it: attention scores are capped softly",
    )
    assert all(isinstance(line, str) for line in said)
    assert [words for words, line in zip(wanted, said, strict=True) if words not in line] == []
