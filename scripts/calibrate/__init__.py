"""The statistics by which one model's caches are shifted and scaled for another (Q-KVComm, eqs. 9-11)."""

from scripts.calibrate.pair import calibrate

__all__ = ["calibrate"]
