"""Putting agents on devices: bundles, flashing over SSH, cards, updates of a fleet (docs/flash.md)."""
