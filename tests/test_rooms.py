"""The house stands as it was drawn: imports run down only, and no torch gets onto a device."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "broker_config": {"edge_agent", "coordinator", "scripts", "torch", "transformers", "optimum"},
    "edge_agent": {"coordinator", "scripts", "torch", "transformers", "optimum", "onnx"},
    "coordinator": {"edge_agent", "scripts", "torch", "transformers", "optimum"},
}
APART = {"scripts/evaluate": "scripts.bench", "scripts/bench": "scripts.evaluate"}


def _modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


def _imports(path: Path) -> set[str]:
    return {name.split(".")[0] for name in _modules(path)}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_nothing_from_above(room: str) -> None:
    offences = {str(path): bad for path in (ROOT / room).rglob("*.py") if (bad := _imports(path) & FORBIDDEN[room])}
    assert not offences


@pytest.mark.parametrize("room", APART)
def test_the_bench_and_evaluations_meet_only_in_what_both_use(room: str) -> None:
    imported = {name for path in (ROOT / room).rglob("*.py") for name in _modules(path)}
    assert imported
    assert not [name for name in imported if f"{name}.".startswith(f"{APART[room]}.")]


def test_a_running_agents_modules_hold_no_torch() -> None:
    program = (
        "import sys, edge_agent.cli\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} "
        "& {'torch', 'transformers', 'optimum', 'coordinator', 'scripts', 'onnx', 'amqtt'}))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"
