"""The fingerprint: the same for the same model wherever it lies, another for any change that a cache would feel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.prepare_model.identity import canonical, configuration_that_matters, fingerprint, tokenizer_digest

CONFIG = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "hidden_size": 64}
ROTARY = [np.array([1.0, 0.1], dtype=np.float32)]


def _tensors() -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(name, rng.normal(size=(3, 4)).astype(np.float32)) for name in ("b.weight", "a.weight", "c.bias")]


def _print(
    tensors: list[tuple[str, np.ndarray]] | None = None,
    config: dict[str, object] | None = None,
    rotary: list[np.ndarray] | None = None,
    tokenizer: str = "t",
) -> str:
    return fingerprint(_tensors() if tensors is None else tensors, config or CONFIG, rotary or ROTARY, tokenizer)


def test_the_order_of_tensors_and_of_fields_does_not_matter() -> None:
    assert _print(list(reversed(_tensors())), dict(reversed(CONFIG.items()))) == _print()


def test_memory_layout_does_not_matter() -> None:
    fortran = [(name, np.asfortranarray(array)) for name, array in _tensors()]
    assert _print(fortran) == _print()


@given(which=st.integers(0, 2), row=st.integers(0, 2), column=st.integers(0, 3))
def test_one_changed_bit_of_a_weight_is_another_model(which: int, row: int, column: int) -> None:
    tensors = _tensors()
    array = tensors[which][1]
    array[row, column] = np.nextafter(array[row, column], np.float32(9))
    assert _print(tensors) != _print()


def test_a_renamed_reshaped_or_retyped_tensor_is_another_model() -> None:
    (name, array), *rest = _tensors()
    others = [("d", array), (name, array.reshape(4, 3)), (name, array.astype(np.float64))]
    assert len({_print(), *(_print([other, *rest]) for other in others)}) == 4


@pytest.mark.parametrize(("field", "value"), [("rope_theta", 100_000.0), ("rms_norm_eps", 1e-6), ("hidden_size", 65)])
def test_a_changed_configuration_is_another_model(field: str, value: float) -> None:
    assert _print(config={**CONFIG, field: value}) != _print()


def test_rotary_frequencies_and_tokenizer_count() -> None:
    turned = [np.array([1.0, 0.1000001], dtype=np.float32)]
    assert len({_print(), _print(rotary=turned), _print(rotary=ROTARY * 2), _print(tokenizer="u")}) == 4


def test_a_number_has_one_spelling() -> None:
    gguf_rounding = float(np.float32(1e-5))
    assert canonical({"eps": gguf_rounding, "theta": 100_000}) == canonical({"theta": 100_000.0, "eps": 1e-5})


def test_paths_versions_and_training_knobs_are_left_out() -> None:
    declared = ["hidden_size", "initializer_range", "use_cache"]
    generic = ["transformers_version", "torch_dtype", "tie_word_embeddings", "model_type"]
    whole = {
        "_name_or_path": "somewhere",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "use_cache": True,
        "transformers_version": "4",
        "torch_dtype": "float32",
        "tie_word_embeddings": True,
        "model_type": "llama",
        "added_by_a_tool": 1,
    }
    kept = configuration_that_matters(whole, declared, generic)
    assert kept == {"hidden_size": 64, "tie_word_embeddings": True, "model_type": "llama"}


def _write(path: Path, content: dict[str, object]) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_the_tokenizer_digest_sees_what_tokenizing_does_and_nothing_else(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    content: dict[str, object] = {"version": "1.0", "truncation": None, "padding": None, "model": model}
    plain = tokenizer_digest(_write(tmp_path / "plain.json", content))
    turned = dict(reversed({**content, "truncation": {"max_length": 5}}.items()))
    assert tokenizer_digest(_write(tmp_path / "turned.json", turned)) == plain
    newer = {**content, "model": {**model, "merges": [["a", "b"]]}}
    assert tokenizer_digest(_write(tmp_path / "newer.json", newer)) == plain
    other = {**content, "model": {**model, "vocab": {"a": 0, "b": 2, "ab": 1}}}
    assert tokenizer_digest(_write(tmp_path / "other.json", other)) != plain
