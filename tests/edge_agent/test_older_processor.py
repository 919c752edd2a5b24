"""Integer kernels of a processor that this machine is not: an emulated one without VNNI gives what this one does."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edge_agent.model import kernels, session
from edge_agent.model.session import Runtime
from scripts.prepare_model.graph import weights as quantized
from scripts.prepare_model.graph.storing import save
from tests.scripts.graphs import graph_of, node, normal

EMULATOR = shutil.which("qemu-x86_64-static")
HASWELL = ("-cpu", "Haswell")  # AVX2, without VNNI
CHANNELS, OUTPUTS = 64, 48

RUN = """
import sys
from pathlib import Path
import numpy as np
from edge_agent.model.session import Runtime
graph, feeds, found = map(Path, sys.argv[1:])
np.save(found, Runtime().session(graph).run(None, {"x": np.load(feeds)})[0])
"""


def _graph(form: str, weights: NDArray[np.float32], path: Path) -> None:
    graph = graph_of([node("MatMul", ["x", "w"], "y")], {"w": weights}, ["y"],
                     inputs={"x": (onnx.TensorProto.FLOAT, ["t", CHANNELS])})  # fmt: skip
    product = graph.nodes[0]
    if form == "columns":
        scale, zero = (
            graph.weight("scale", np.array(1 / 127, dtype="f4")),
            graph.weight("zero", np.array(128, dtype="u1")),
        )
        rounded = graph.node("QuantizeLinear", ["x", scale, zero], "rounded")
        graph.replace(product, [rounded, quantized._integer_product(graph, product, ["rounded", scale, zero], "y")])
    else:
        quantized._as_blocks(graph, product, bits=8)
    save(graph, path)


def test_the_product_that_is_tried_is_the_one_that_is_meant() -> None:
    graph = onnx.load_from_string(kernels._PRODUCT).graph
    assert [(node.op_type, list(node.input)) for node in graph.node] == [("MatMulInteger", ["a", "b"])]
    weights = onnx.numpy_helper.to_array(graph.initializer[0])
    assert (weights.dtype, weights.tolist()) == (np.int8, [[127]] * 4)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_only_processors_without_vnni_saturate() -> None:
    said = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    vnni = "avx512_vnni" in said or "avx_vnni" in said
    assert kernels.products_saturate() == (platform.machine() == "x86_64" and not vnni)


def test_where_products_saturate_weights_become_unsigned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "products_saturate", lambda: True)
    assert Runtime().options().get_session_config_entry("session.x64quantprecision") == "1"
    monkeypatch.setattr(session, "products_saturate", lambda: False)
    with pytest.raises(RuntimeError):
        Runtime().options().get_session_config_entry("session.x64quantprecision")


@pytest.mark.skipif(
    EMULATOR is None or platform.machine() != "x86_64", reason="needs qemu-x86_64-static (package qemu-user-static)"
)
@pytest.mark.parametrize("form", ["columns", "blocks"])
def test_products_of_large_values_do_not_saturate_without_vnni(form: str, tmp_path: Path) -> None:
    weights = np.clip(normal(CHANNELS, OUTPUTS), -1, 1)
    weights[:, ::3] = 1
    x = np.clip(normal(5, CHANNELS, seed=1), -1, 1)
    x[0] = 1
    graph, feeds, found = (tmp_path / name for name in ("model.onnx", "x.npy", "y.npy"))
    _graph(form, weights, graph)
    np.save(feeds, x)
    program = [str(EMULATOR), *HASWELL, sys.executable, "-c", RUN, str(graph), str(feeds), str(found)]
    subprocess.run(program, check=True, capture_output=True, timeout=120)
    here = Runtime().session(graph).run(None, {"x": x})[0]
    np.testing.assert_allclose(np.load(found), here, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(here, x @ weights, atol=0.3)
