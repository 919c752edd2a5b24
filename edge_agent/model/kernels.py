"""What the integer kernels of this processor do with large values."""

from __future__ import annotations

import base64
from functools import cache

import numpy as np
import onnxruntime as ort

_PRODUCT = base64.b64decode(
    "CAg6WAoYCgFhCgFiEgF5Ig1NYXRNdWxJbnRlZ2VyEgFnKg8IBAgBEANCAWJKBH9/f39aEwoBYRIOCgwIAhIICgIIAQoCCARiEwoBeRIOCgwIBhII"
    "CgIIAQoCCAFCBAoAEA0="
)
"""An ONNX graph, since a device has no package that writes one: y = MatMulInteger(a uint8 (1, 4), b int8 (4, 1)), with
127 everywhere in b."""


@cache
def products_saturate() -> bool:
    """Whether onnxruntime's products of unsigned activations with signed weights lose what 16 bits do not hold.

    On x86-64 without VNNI they do, since two neighbouring products are added in 16 bits. Found by computing one, in
    a few milliseconds: onnxruntime's own check takes processors with AMX for such.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(_PRODUCT, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"a": np.full((1, 4), 255, dtype=np.uint8)})[0]
    return int(found[0, 0]) != 4 * 255 * 127
