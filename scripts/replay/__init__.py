"""Sessions again: what was recorded, in virtual time."""
