"""Losses and gradients of all backends beside those of transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from gptx.backends import Backend
from gptx.backends.backward import Batch, Dropout, LossFunction, loss_function
from gptx.model import Transformer, forward
from gptx.weights import as_tree
from tests.support.backends import make_backend
from tests.support.gradient_cases import CASES, DROPOUT, FIRST_SEQUENCE, STEP, example
from tests.support.models import drawn_weights
from tests.support.random_models import checksum

GOLDEN = Path(__file__).parents[1] / "golden" / "gradients.npz"

# Of a tensor's norm. The golden gradients are rounded to float32, which is 6e-8 of it at most; the
# generic `gelu` has an error function that is exact to 1.5e-7 only.
FLOAT32, FLOAT64, FLOAT64_GELU = 1e-5, 6e-8, 1e-6


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


def check_case(case: str, backend: Backend, tolerance: float) -> None:
    """Compare the loss and all gradients of a case."""
    config, batch = CASES[case], Batch(*example(case))
    host = drawn_weights(config)
    assert checksum(host) == golden()[f"{case}.crc"]
    dropout = Dropout(**DROPOUT) if case == "dropout" else None
    with backend.scope():
        weights = {name: backend.asarray(x) for name, x in host.items()}
        model = Transformer(config, as_tree(weights), backend)
        function: LossFunction = loss_function(forward, model, dropout=dropout)
        loss, found = function.gradients(
            weights, batch, scale=1 / batch.n_tokens, step=STEP, first_sequence=FIRST_SEQUENCE
        )
        found = {name: backend.to_numpy(g) for name, g in found.items()}
        assert float(loss) == pytest.approx(float(golden()[f"{case}.loss"]), rel=tolerance)
    assert set(found) == set(config.tensor_shapes())
    for name in config.tensor_shapes():
        expected = golden()[f"{case}.{name}"]
        assert found[name].shape == expected.shape
        error = np.linalg.norm(found[name].astype(np.float64) - expected)
        assert error <= tolerance * np.linalg.norm(expected), name


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_transformers(case: str, backend: Backend) -> None:
    check_case(case, backend, FLOAT32)


@pytest.mark.parametrize(
    "name", ["numpy", "numpy-generic", pytest.param("strict", marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("case", CASES)
def test_gradients_in_float64_are_exact(case: str, name: str) -> None:
    tolerance = FLOAT64_GELU if case == "gelu" else FLOAT64
    check_case(case, make_backend(name, dtype="float64"), tolerance)
