"""The report of replays: one page that opens without a network, its figures as pictures, its numbers as JSON."""

from __future__ import annotations

from scripts.replay.report.page import write_report

__all__ = ["write_report"]
