"""Arrays by their short names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Flags = NDArray[np.bool_]


def column(values: Sequence[float]) -> Floats:
    """One number for each link, or channel, or request."""
    return np.array(values, dtype=np.float64)
