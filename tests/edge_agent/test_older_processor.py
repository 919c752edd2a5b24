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
    site = quantized.sites(graph)[0]
    if form == "fixed":
        quantized._as_fixed(graph, site, 1 / 127)
    else:
        quantized._as_blocks(graph, site.nodes[0], bits=8)
    save(graph, path)


@pytest.mark.skipif(
    EMULATOR is None or platform.machine() != "x86_64", reason="needs qemu-x86_64-static (package qemu-user-static)"
)
@pytest.mark.parametrize("form", ["fixed", "blocks"])
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
