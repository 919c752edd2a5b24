"""Memory pressure of a device: the largest of three terms (design: memory pressure)."""

from __future__ import annotations

from pathlib import Path

import psutil

from broker_config.messages import Memory

PRESSURE_STALL = Path("/proc/pressure/memory")


def measure(cache_bytes: int, cache_budget_bytes: int, stall: Path = PRESSURE_STALL) -> Memory:
    """Now. pressure = max(caches over their budget, 1 - MemAvailable/MemTotal, share of time stalled on memory)."""
    system = psutil.virtual_memory()
    stalled = stalled_share(stall)
    terms = [cache_bytes / cache_budget_bytes if cache_budget_bytes else 1.0, 1 - system.available / system.total]
    return Memory(
        pressure=min(1.0, max(0.0, *terms, stalled or 0.0)),
        cache_bytes=cache_bytes,
        cache_budget_bytes=cache_budget_bytes,
        available_bytes=system.available,
        total_bytes=system.total,
        resident_bytes=psutil.Process().memory_info().rss,
        stalled_share=stalled,
    )


def stalled_share(path: Path = PRESSURE_STALL) -> float | None:
    """Share of the last 10 s in which some task waited for memory (PSI), None where the kernel has no PSI."""
    try:
        fields = dict(field.split("=") for field in path.read_text().splitlines()[0].split()[1:])
        return min(1.0, max(0.0, float(fields["avg10"]) / 100))
    except (OSError, ValueError, IndexError, KeyError):
        return None
