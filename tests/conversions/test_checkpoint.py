"""gptx.conversions.checkpoint: checks of tensors against the config; inferred configs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gptx.conversions.checkpoint import (
    Checkpoint,
    StoredTensor,
    infer_config,
    require_openai_settings,
    stored_array,
)
from gptx.errors import ConfigError, WeightsError
from gptx.quantization import Quantization
from tests.support.random_models import CASES

CONFIG = CASES["tiny"]


def stored(**changes: StoredTensor | None) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor | None] = {
        name: stored_array(lambda shape=shape: np.zeros(shape, "<f4"), shape, np.dtype("<f4"))
        for name, shape in CONFIG.tensor_shapes().items()
    }
    return {name: tensor for name, tensor in (found | changes).items() if tensor is not None}


def zeros(*shape: int, dtype: str = "<f4") -> StoredTensor:
    return StoredTensor(shape, np.dtype(dtype), lambda: np.zeros(shape, dtype))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ln_f.bias": None}, "ln_f.bias is missing"),
        (
            {"ln_f.bias": zeros(9)},
            r"ln_f.bias has shape \[9\], expected \[8\]: the weights",
        ),
        ({"ln_f.bias": zeros(8, dtype="<i4")}, "ln_f.bias is of type int32, expected a float"),
        ({"more": zeros(8)}, "tensor more is unknown"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(
    changes: dict[str, StoredTensor | None], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        Checkpoint(CONFIG, stored(**changes))


def test_quantization_of_a_config_without_quantized_tensors_is_dropped() -> None:
    config = replace(CONFIG, quantization=Quantization(64, 8))
    assert Checkpoint(config, stored()).config == CONFIG


def test_a_tensor_is_read_on_each_access() -> None:
    reads = []
    tensor = replace(zeros(8), read=lambda: reads.append(1) or np.zeros(8, "<f4"))
    tensors = Checkpoint(CONFIG, stored(**{"ln_f.bias": tensor})).tensors
    assert not reads
    assert [tensors["ln_f.bias"].shape for _ in range(2)] == [(8,), (8,)]
    assert len(reads) == 2


def test_a_transposed_array_has_gptx_s_layout() -> None:
    tensor = stored_array(
        lambda: np.arange(6).reshape(2, 3), (2, 3), np.dtype("<f4"), transposed=True
    )
    assert tensor.shape == (3, 2)
    np.testing.assert_array_equal(tensor.read(), np.arange(6).reshape(2, 3).T)


def test_a_config_is_inferred_from_shapes() -> None:
    config = replace(CASES["355M"], n_head=1, bos_token_id=None, eos_token_id=None)
    assert infer_config(config.tensor_shapes())[0] == config
    with pytest.raises(ConfigError, match="number of heads is missing, and the width 8"):
        infer_config(CONFIG.tensor_shapes())
    with pytest.raises(WeightsError, match=r"wte\.weight is missing or not a matrix"):
        infer_config({})
    given = replace(CONFIG, quantization=Quantization(64, 8))
    assert infer_config({}, given) == (CONFIG, ())


def test_unsupported_settings_are_named() -> None:
    with pytest.raises(
        ConfigError, match="activation_function is 'relu', X supports only 'gelu_new'"
    ):
        require_openai_settings(CASES["relu"], "X")
    require_openai_settings(CASES["relu"], "X", "activation_function")
