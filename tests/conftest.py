"""Fixtures: backends, small random models, files of models."""
# ruff: noqa: E402

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

# Each worker has a core: further threads of OpenBLAS would wait for one, and spin meanwhile.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest

# pytest rewrites the assertions of test files, and of the modules registered before their import.
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

# Compile the kernels for all formats together: tests need all of them.
os.environ.setdefault("GPTX_KERNELS", "float32,int8,int4")

# A shell's background job ignores Ctrl-C, which tests send; so would the programs that they start.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Tests that the second of two workers begins with: most of them need none of the kernels that the
# first one compiles for more than a minute.
WITHOUT_KERNELS = (
    "backends/cuda", "backends/test_backward.py", "backends/test_g", "conversions/containers",
    "conversions/vocabularies", "emulator", "hub", "test_package.py", "tokenization", "training",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests without kernels where the second half of all tests begins."""
    folder = Path(__file__).parent

    def needs_kernels(item: pytest.Item) -> bool:
        return not item.path.relative_to(folder).as_posix().startswith(WITHOUT_KERNELS)

    others = [item for item in items if needs_kernels(item)]
    half = len(items) // 2
    items[:] = others[:half] + [x for x in items if not needs_kernels(x)] + others[half:]


def pytest_collection_finish() -> None:
    """Leave the modules and the tests themselves out of each run of the garbage collector."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_stand_in_is_left() -> Iterator[None]:
    """Uninstall the stand-in for CuPy after each test."""
    yield
    STAND_IN.close()


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each way to run the model; an absent backend is a skip."""
    return make_backend(request.param)


@pytest.fixture(params=["numpy", "mlx", "cupy", "cupy-cpu", "strict"])
def library(request: pytest.FixtureRequest) -> Backend:
    """One backend of each array library."""
    return make_backend(request.param)


# Forward passes that differ: compiled, op by op, generic; each with float or quantized weights.
FLOATS, INT4 = None, Quantization(32, 4)
SMALL = [
    ("numpy", FLOATS),
    ("numpy", INT4),
    ("numpy-ops", FLOATS),
    ("mlx", FLOATS),
    ("mlx", INT4),
    ("cupy", FLOATS),
    ("cupy", INT4),
    ("cupy-cpu", INT4),
    ("strict", FLOATS),
]
SMALL_CONFIG = replace(CASES["124M"], n_layer=2, n_head=3)


@lru_cache
def _small_model(name: str, quantization: Quantization | None) -> Model:
    return make_model(SMALL_CONFIG, make_backend(name), quantization=quantization)


@pytest.fixture(
    params=SMALL,
    ids=[f"{'int4' if quantization else 'floats'}-{name}" for name, quantization in SMALL],
)
def small(request: pytest.FixtureRequest) -> Model:
    """A small model; tests of the session share it and do not change it."""
    make_backend(request.param[0])  # skips the test, or installs the stand-in for CuPy
    return _small_model(*request.param)


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
    """The embedded model on NumPy, shared by all tests."""
    return gptx.load("shakespeare")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a model folder: `folder(case, **options of write_model)`."""

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
