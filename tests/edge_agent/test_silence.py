"""An agent tells nobody of itself but its own broker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_SUPPRESSED = ("CI", "GITHUB_ACTIONS", "TF_BUILD", "ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED")
"""Where onnxruntime is silent by itself; PYTEST_… too."""


@pytest.mark.parametrize("first", ["edge_agent.model.session", "scripts.prepare_model", "scripts.bench"])
def test_onnxruntime_keeps_no_number_of_the_device_and_reports_to_nobody(first: str, tmp_path: Path) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _SUPPRESSED and not name.startswith(("PYTEST", "XDG"))
    }
    program = (
        f"import {first}, os\n"
        "import onnxruntime as ort\n"
        "ort.SessionOptions(); ort.get_available_providers(); ort.set_default_logger_severity(4)\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "HOME": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "1"
    assert not list(tmp_path.rglob("*onnxruntime*"))
    assert not (tmp_path / ".cache" / "Microsoft").exists()
