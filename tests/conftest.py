"""Fixtures: every backend that is here, small random models, files of models."""
# ruff: noqa: E402

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# pytest rewrites the assertions of test files only; others have to be named before their import.
pytest.register_assert_rewrite("tests.support", "tests.emulator")

import gptx
from gptx.backends import Backend
from gptx.generation.text_model import Model
from gptx.quantization import Quantization
from gptx.random_weights import random_weights
from tests.emulator import compiled_by, cupy_stand_in
from tests.support.backends import BACKENDS, STAND_IN, make_backend
from tests.support.models import make_model
from tests.support.random_models import CASES, write_model


@pytest.fixture(autouse=True)
def no_stand_in_is_left() -> Iterator[None]:
    """The next test finds the real CuPy, or none."""
    yield
    STAND_IN.close()


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn; one that is absent is skipped with its reason."""
    return make_backend(request.param)


INT4 = Quantization(32, 4)
SMALL = [
    pytest.param((name, how), id=f"{'int4' if how else 'floats'}-{name}")
    for name in BACKENDS
    for how in (None, INT4)
    if how or name != "cupy-cpu"
]


@pytest.fixture(params=SMALL)
def small(request: pytest.FixtureRequest) -> Model:
    """A shrunk 124M on each backend, with float weights and with quantized ones."""
    name, how = request.param
    config = CASES["124M"]
    if name == "cupy-cpu":  # a head takes it long, however narrow
        config = replace(config, n_layer=2, n_head=3)
    return make_model(config, make_backend(name), how=how)


@pytest.fixture
def ptx_path() -> Iterator[None]:
    """Run CUDA kernels on the emulator's PTX path: compiled by NVRTC."""
    with cupy_stand_in.installed():
        from gptx.backends.cuda.compiler import kernel

        kernel.cache_clear()
        with compiled_by("sm_90"):
            yield
        kernel.cache_clear()


@pytest.fixture(scope="session")
def shakespeare() -> Model:
    """The embedded model on NumPy."""
    return gptx.load("shakespeare")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a model folder: `folder(case="124M", **options of write_model)`."""

    def write(case: str = "tiny", name: str = "model", **options: Any) -> Path:
        config = CASES[case]
        weights = options.pop("weights", None) or random_weights(config)
        (tmp_path / name).mkdir(exist_ok=True)
        return write_model(tmp_path / name, config, weights, **options)

    return write


@pytest.fixture
def random() -> np.random.Generator:
    """The same random numbers in every run."""
    return np.random.default_rng(0)
