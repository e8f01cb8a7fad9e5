"""Types of the CUDA kernels for tests."""

from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import bfloat16

from gptx.backends import get_backend

TYPES = {"float": np.float32, "half_t": np.float16, "bf16_t": bfloat16}
ERRORS = {"float": 2e-6, "half_t": 1e-3, "bf16_t": 8e-3}  # relative to the largest number
GENERIC = get_backend("numpy", dtype="float64", generic=True)
every_type = pytest.mark.parametrize("real", TYPES)


def assert_near(given: np.ndarray, expected: np.ndarray, real: str) -> None:
    error = np.abs(given.astype(np.float64) - expected).max()
    assert error <= ERRORS[real] * np.abs(expected).max()
