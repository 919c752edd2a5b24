"""Traces: what links were like over time, from files, from other tools, from recorded sessions, or made."""

from __future__ import annotations

from scripts.traces.errors import TraceError, TraceInvalid
from scripts.traces.trace import Sample, Trace, read_trace, write_trace

__all__ = ["Sample", "Trace", "TraceError", "TraceInvalid", "read_trace", "write_trace"]
