"""Bundles that are damaged, or hold another graph than the session wants, are refused in one line that says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from broker_config.files import file_digest
from edge_agent.errors import BundleInvalid, ModelUnsupported
from edge_agent.model.manifest import MANIFEST_NAME, MANIFEST_VERSION, read_manifest, verify_digests
from edge_agent.model.session import Model
from edge_agent.model.text import TOKENIZER_NAME, Text
from tests import tiny

NOT_OURS = f"is not a manifest of version {MANIFEST_VERSION}"


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that may be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def _list_again(bundle: Path, name: str) -> None:
    """Put a changed file's size and digest into the manifest, as if it had been made so."""
    path = bundle / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    for entry in manifest["files"]:
        if entry["path"] == name:
            entry |= {"size_bytes": (bundle / name).stat().st_size, "sha256": file_digest(bundle / name)}
    path.write_text(json.dumps(manifest))


def _edit_graph(bundle: Path, edit: Callable[[Any], None]) -> None:
    path = bundle / "model.onnx"
    proto = onnx.load(path, load_external_data=False)
    edit(proto.graph)
    onnx.save(proto, path)
    _list_again(bundle, path.name)


def _rename_input(graph: Any, old: str, new: str) -> None:
    for value in graph.input:
        if value.name == old:
            value.name = new
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def _drop_output(graph: Any, name: str) -> None:
    kept = [value for value in graph.output if value.name != name]
    del graph.output[:]
    graph.output.extend(kept)


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (
            lambda graph: _rename_input(graph, "past_key_values.1.key", "past_key_values.1.latent"),
            r"lacks input past_key_values\.1\.key \(1 missing\)",
        ),
        (lambda graph: _rename_input(graph, "filled", "seqlens_k"), "lacks input filled"),
        (lambda graph: _rename_input(graph, "total_entries", "total"), "lacks input total_entries"),
        (lambda graph: _rename_input(graph, "logit_rows", "rows"), "lacks input logit_rows"),
        (lambda graph: _rename_input(graph, "rotary.0.cos", "cos"), r"lacks input rotary\.0\.cos"),
        (lambda graph: _rename_input(graph, "rotary.0.sin", "sin"), r"lacks input rotary\.0\.sin"),
        (lambda graph: _drop_output(graph, "present.2.value"), r"lacks output present\.2\.value"),
        (lambda graph: _drop_output(graph, "queries.1"), r"lacks output queries\.1"),
        (lambda graph: _drop_output(graph, "keys.0"), r"lacks output keys\.0"),
        (lambda graph: _drop_output(graph, "logits"), "lacks output logits"),
    ],
)
def test_a_graph_that_lacks_something_is_refused_by_name_at_load(
    copied: Path, edit: Callable[[Any], None], line: str
) -> None:
    _edit_graph(copied, edit)
    with pytest.raises(ModelUnsupported, match=line) as caught:
        Model(copied)
    assert "\n" not in str(caught.value)


def test_a_windowed_layer_without_its_bias_is_refused_by_name_at_load(tiny_gemma_bundle: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(tiny_gemma_bundle, tmp_path / "bundle"))
    _edit_graph(copied, lambda graph: _rename_input(graph, "window_bias.2", "bias"))
    with pytest.raises(ModelUnsupported, match=r"lacks input window_bias\.2 \(1 missing\)"):
        Model(copied)


def test_a_graph_that_wants_more_is_refused_by_name_at_load(copied: Path) -> None:
    def edit(graph: Any) -> None:
        graph.input.append(onnx.helper.make_tensor_value_info("token_type_ids", onnx.TensorProto.INT64, [1, None]))

    _edit_graph(copied, edit)
    with pytest.raises(ModelUnsupported, match="wants an input this agent does not know: token_type_ids"):
        Model(copied)


def test_a_manifest_of_more_layers_than_the_graph_has_is_refused_at_load(copied: Path) -> None:
    path = copied / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["layers"].append(manifest["layers"][0])
    path.write_text(json.dumps(manifest))
    with pytest.raises(ModelUnsupported, match=r"lacks input past_key_values\.3\.key \(2 missing\)"):
        Model(copied)


def test_a_transform_that_is_not_the_manifests_is_refused_at_load(copied: Path) -> None:
    path = copied / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"transform": "9" * 32}))
    with pytest.raises(BundleInvalid, match=r"transform\.npz is not the transform of this model"):
        Model(copied)
    path.write_text(json.dumps(manifest | {"transform": None}))
    assert Model(copied).transform is None


def _no_graph(path: Path) -> None:
    path.write_bytes(b"not a graph" * 100)


def _cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.onnx", _no_graph, r"model\.onnx can't be loaded: "),
        ("model.onnx", _cut_in_half, r"model\.onnx can't be loaded: "),
        ("model.onnx.weights", _cut_in_half, r"model\.onnx can't be loaded: "),
        ("rotate.onnx", _no_graph, r"rotate\.onnx can't be loaded: "),
    ],
)
def test_a_graph_that_is_none_is_refused_in_one_line(
    copied: Path, name: str, damage: Callable[[Path], None], said: str
) -> None:
    damage(copied / name)
    _list_again(copied, name)
    with pytest.raises(ModelUnsupported, match=said) as caught:
        Model(copied)
    assert "\n" not in str(caught.value)


def _missing_bundle(bundle: Path) -> None:
    shutil.rmtree(bundle)


def _missing_file(name: str) -> Callable[[Path], None]:
    return lambda bundle: (bundle / name).unlink()


def _cut_file(name: str) -> Callable[[Path], None]:
    return lambda bundle: _cut_in_half(bundle / name)


def _cut_manifest(bundle: Path) -> None:
    path = bundle / MANIFEST_NAME
    path.write_text(path.read_text()[:-40])


def _manifest_with(**fields: object) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        path = bundle / MANIFEST_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (_missing_bundle, r"no model bundle at .*: manifest\.json is missing; run `make prepare-model`"),
        (_missing_file("model.onnx"), r"lacks model\.onnx; prepare it again"),
        (_missing_file("model.onnx.weights"), r"lacks model\.onnx\.weights; prepare it again"),
        (_missing_file("rotate.onnx"), r"lacks rotate\.onnx; prepare it again"),
        (_cut_file("model.onnx"), r"is truncated: model\.onnx has \d+ bytes of \d+; prepare it again"),
        (_cut_file("model.onnx.weights"), r"truncated: model\.onnx\.weights has \d+ bytes of \d+; prepare it again"),
        (_cut_manifest, NOT_OURS),
        (_manifest_with(manifest_version=MANIFEST_VERSION - 1), f"{NOT_OURS}: .*manifest_version"),
        (_manifest_with(manifest_version=MANIFEST_VERSION + 1), f"{NOT_OURS}: .*manifest_version"),
        (_manifest_with(layers=[{"rotary": 0}] * tiny.LAYERS), f"{NOT_OURS}: .*`scale`"),
        (
            _manifest_with(layers=[{"rotary": 0, "scale": 0.0}] * tiny.LAYERS),
            f"{NOT_OURS}: .*scale",
        ),
        (_manifest_with(rotary=[[1.0, 0.5]]), "rotary frequencies must be 8 per embedding"),
        (
            _manifest_with(layers=[{"rotary": 1, "scale": 0.25}] * tiny.LAYERS),
            "a layer names a rotary embedding that is not there",
        ),
    ],
)
def test_a_damaged_bundle_is_refused_in_one_line(copied: Path, damage: Callable[[Path], None], line: str) -> None:
    damage(copied)
    with pytest.raises(BundleInvalid, match=line) as caught:
        Model(copied)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_found_by_the_digests(copied: Path) -> None:
    path = copied / TOKENIZER_NAME
    data = bytearray(path.read_bytes())
    data[1_000] ^= 1
    path.write_bytes(bytes(data))
    manifest = read_manifest(copied)
    with pytest.raises(BundleInvalid, match=r"tokenizer\.json is damaged; prepare it again"):
        verify_digests(copied, manifest)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version": "1.0"', b"\xff\xfe"])
def test_a_corrupt_tokenizer_is_refused_in_one_line(copied: Path, content: bytes) -> None:
    (copied / TOKENIZER_NAME).write_bytes(content)
    _list_again(copied, TOKENIZER_NAME)
    with pytest.raises(BundleInvalid, match=r"tokenizer\.json is not a tokenizer") as caught:
        Text(copied, read_manifest(copied))
    assert "\n" not in str(caught.value)
