"""Ten minutes of a coverage-guided fuzzer on payloads."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = int(os.environ.get("KVBUS_FUZZ_S", "600"))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this platform")
def test_no_bytes_crash_hang_or_swell_the_reader(tmp_path: Path) -> None:
    limits = [f"-max_total_time={SECONDS}", "-timeout=5", "-rss_limit_mb=1024", "-max_len=8192"]
    command = [sys.executable, "-m", "tests.edge_agent.fuzz_payload", str(tmp_path), *limits]
    done = subprocess.run(
        [*command, f"-artifact_prefix={tmp_path}/"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    assert "DONE" in done.stderr or "Done" in done.stderr, done.stderr[-2_000:]
