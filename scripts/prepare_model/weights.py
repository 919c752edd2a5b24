"""In how many bits a bundle's weights are."""

from __future__ import annotations

from enum import StrEnum


class Weights(StrEnum):
    """Choices of weight precision. fp32: exact; int8: fast and nearly exact; int4: smallest, with a loss that shows."""

    FP32 = "fp32"
    INT8 = "int8"
    INT4 = "int4"


DEFAULT_WEIGHTS = Weights.INT8
