"""Types of array libraries as the dtype of a backend."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gptx.backends import get_backend
from gptx.errors import BackendError


class TorchType:
    """A type whose only name is its `str`, as in PyTorch and MLX."""

    def __str__(self) -> str:
        return "torch.float64"


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (np.float32, "float32"),
        (np.dtype(np.float64), "float64"),
        (SimpleNamespace(name="float64"), "float64"),
        (TorchType(), "float64"),
        (None, "float32"),
    ],
)
def test_a_type_has_the_meaning_of_its_name(dtype: Any, name: str) -> None:
    backend = get_backend("numpy", dtype=dtype, cache_dtype=dtype)
    assert (backend.dtype, backend.cache_dtype) == (name, name)


def test_types_of_mlx() -> None:
    mx = pytest.importorskip("mlx.core")
    assert get_backend("mlx", dtype=mx.bfloat16).dtype == "bfloat16"
    assert get_backend("mlx", cache_dtype=mx.float16).cache_dtype == "float16"


@pytest.mark.parametrize(("dtype", "name"), [(float, "float"), (np.int8, "int8"), (5, "5")])
def test_a_type_that_a_backend_does_not_compute_in(dtype: Any, name: str) -> None:
    with pytest.raises(BackendError, match=f"dtype is '{name}', the numpy backend computes in"):
        get_backend("numpy", dtype=dtype)
