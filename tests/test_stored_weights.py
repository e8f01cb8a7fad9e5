"""The rules for stored weights: tensors that do not fit the config, equal numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptx.errors import WeightsError
from gptx.random_weights import random_weights
from gptx.stored_weights import check_weights, have_same_numbers
from tests.support.files.safetensors_bytes import MICRO


@pytest.mark.parametrize("shape", [(), (0, 3), (1, 2**18 + 1), (2**18 + 1, 1), (600, 1000)])
def test_numbers_are_compared_by_rows(shape: tuple[int, ...]) -> None:
    a = np.zeros(shape, np.float32)
    assert have_same_numbers(a, a.astype(np.float16))
    assert not have_same_numbers(a, np.zeros((*shape, 1), np.float32))
    if not a.size:
        return
    for at in (0, a.size // 2, a.size - 1):
        b = a.copy()
        b.flat[at] = 1e-30
        assert not have_same_numbers(a, b)
        b.flat[at] = np.nan
        assert not have_same_numbers(a, b)
        assert have_same_numbers(b, b.copy())


def test_missing_tensors_are_named() -> None:
    weights = random_weights(MICRO)
    del weights["h.0.mlp.c_fc.bias"]
    with pytest.raises(WeightsError, match=r"^tensor h\.0\.mlp\.c_fc\.bias is missing"):
        check_weights(weights, MICRO)
    del weights["ln_f.weight"]
    with pytest.raises(WeightsError, match=r"h\.0\.mlp\.c_fc\.bias, ln_f\.weight are missing"):
        check_weights(weights, MICRO)
    with pytest.raises(WeightsError, match=r"^tensors .*wte.* and 13 more are missing"):
        check_weights({}, MICRO)


def test_unknown_tensors_are_named() -> None:
    weights = random_weights(MICRO)
    extra = np.zeros(2, np.float32)
    with pytest.raises(WeightsError, match=r"^tensor h\.1\.ln_1\.bias is unknown"):
        check_weights(weights | {"h.1.ln_1.bias": extra}, MICRO)
    with pytest.raises(WeightsError, match=r"^tensors x, y are unknown"):
        check_weights(weights | {"x": extra, "y": extra}, MICRO)


@pytest.mark.parametrize("shape", [(2, 6, 1), (6, 2), (12,), (2, 5), ()])
def test_a_tensor_of_another_shape_is_named(shape: tuple[int, ...]) -> None:
    """(6, 2) is the layout of torch.nn.Linear in place of the Hub's Conv1D."""
    weights = random_weights(MICRO) | {"h.0.attn.c_attn.weight": np.zeros(shape, np.float32)}
    with pytest.raises(WeightsError) as caught:
        check_weights(weights, MICRO)
    expected = f"tensor h.0.attn.c_attn.weight has shape {list(shape)}, expected [2, 6]"
    assert expected in str(caught.value)


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, np.bool_])
def test_weights_are_floats(dtype: Any) -> None:
    weights: Any = random_weights(MICRO) | {"ln_f.bias": np.zeros(2, dtype)}
    with pytest.raises(WeightsError, match=r"tensor ln_f\.bias is of type \w+, expected a float"):
        check_weights(weights, MICRO)
