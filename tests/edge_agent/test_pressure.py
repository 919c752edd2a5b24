"""Memory pressure is the largest of its terms."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.pressure import measure, stalled_share

PSI = "some avg10={} avg60=1.00 avg300=0.50 total=12345\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=0\n"


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine of 1,000 bytes, 700 of them available."""
    machine = SimpleNamespace(total=1_000, available=700)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    return machine


@pytest.mark.parametrize(
    ("caches", "available", "stalled", "pressure"),
    [
        (10, 700, "0.00", 0.3),  # the system's memory
        (80, 700, "12.50", 0.8),  # its own budget
        (10, 900, "45.00", 0.45),  # stalls
        (250, 900, "0.00", 1.0),  # never above 1
        (0, 1_000, "0.00", 0.0),
    ],
)
def test_the_largest_term_is_the_pressure(  # noqa: PLR0917
    system: SimpleNamespace, tmp_path: Path, caches: int, available: int, stalled: str, pressure: float
) -> None:
    system.available = available
    stall = tmp_path / "memory"
    stall.write_text(PSI.format(stalled))
    memory = measure(caches, 100, stall)
    assert memory.pressure == pytest.approx(pressure)
    assert (memory.cache_bytes, memory.cache_budget_bytes) == (caches, 100)
    assert (memory.available_bytes, memory.total_bytes) == (available, 1_000)
    assert memory.stalled_share == pytest.approx(float(stalled) / 100)
    assert memory.resident_bytes > 0


def test_without_a_budget_there_is_no_room(system: SimpleNamespace, tmp_path: Path) -> None:
    assert measure(0, 0, tmp_path / "none").pressure == 1.0


def test_this_machine_has_a_pressure() -> None:
    memory = measure(0, 100)
    assert 0 < memory.pressure <= 1
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_a_kernel_without_psi_has_no_stalled_share(system: SimpleNamespace, tmp_path: Path) -> None:
    assert stalled_share(tmp_path / "none") is None
    memory = measure(10, 100, tmp_path / "none")
    assert memory.stalled_share is None
    assert memory.pressure == pytest.approx(0.3)


@given(content=st.binary(max_size=60))
def test_whatever_the_kernel_writes_is_a_share_or_nothing(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "psi"
    for written in (content, b"some avg10=" + content):
        path.write_bytes(written)
        share = stalled_share(path)
        assert share is None or 0 <= share <= 1
