"""Fixtures: every backend that is here, small random models, the shared files if they are there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_on_cpu
import cupy_on_cpu
import numpy as np
import pytest
from random_models import CASES, random_weights, write_model

import gptx
from gptx.backends import Backend, get_backend
from gptx.config import GPT2Config
from gptx.errors import BackendError
from gptx.generation import Model
from gptx.hub import ModelFiles
from gptx.model import GPT2
from gptx.quantization import Quantization, Quantized, dequantize
from gptx.weights import TABLES, fingerprint, quantize_weights, to_backend

# pytest explains the assertions of test files alone, unless it is told of others.
pytest.register_assert_rewrite("bad_input_helpers", "cli_helpers", "hub_helpers")

# Each way to run the one model: name -> arguments of get_backend.
BACKENDS: dict[str, dict[str, Any]] = {
    "numpy": {"backend": "numpy"},
    "numpy-ops": {"backend": "numpy", "compile": False},
    "numpy-generic": {"backend": "numpy", "generic": True},
    "mlx": {"backend": "mlx"},
    "mlx-generic": {"backend": "mlx", "generic": True},
    "cupy": {"backend": "cupy"},
    "cupy-cpu": {"backend": "cupy"},  # on the stand-in for CuPy, which needs no GPU
    "strict": {"backend": "array_api_strict"},
}

STAND_IN = ExitStack()  # what is there instead of CuPy until the end of a test

SHARED = Path(__file__).resolve().parents[2] / "shared"


def make_backend(name: str, **options: Any) -> Backend:
    """A backend by its name above, or a visible skip with the reason that it gives."""
    arguments = BACKENDS[name] | options
    if name == "cupy-cpu":
        STAND_IN.enter_context(cupy_on_cpu.installed())
    if arguments["backend"] == "array_api_strict":
        arguments["backend"] = pytest.importorskip("array_api_strict")
    try:
        return get_backend(**arguments)
    except BackendError as error:
        if name == "cupy-cpu":  # nothing is absent
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def no_stand_in_is_left() -> Iterator[None]:
    """The next test finds the real CuPy, or none."""
    yield
    STAND_IN.close()


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn; one that is absent is skipped with its reason."""
    return make_backend(request.param)


def make_model(
    config: GPT2Config, backend: Backend, weights: Any = None, how: Quantization | None = None
) -> Model:
    """A model of random weights (or the given ones), quantized if `how` says so, without files and
    without a tokenizer."""
    found = random_weights(config) if weights is None else weights
    found, config = quantize_weights(found, config, how)
    nowhere = Path("random")
    files = ModelFiles("random", nowhere, nowhere, (), {}, None)
    with backend.scope():
        gpt2 = GPT2(config, to_backend(found, backend), backend)
        return Model(gpt2, files, fingerprint(found))


def floats_of(weights: Any) -> dict[str, np.ndarray]:
    """The weights of a quantized model as floats, in the Hub's layout."""
    floats = {}
    for name, x in weights.items():
        if isinstance(x, Quantized):
            x = dequantize(x) if name in TABLES else dequantize(x).T
        floats[name] = x
    return floats


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
def compiled_by_nvrtc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What CUDA kernels are on the emulator: what NVRTC makes of them, and not for other tests."""
    with cupy_on_cpu.installed():
        from gptx.backends.cupy_kernels import kernel
    monkeypatch.setattr(cuda_on_cpu, "architecture", "sm_90")
    kernel.cache_clear()
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


def shared(path: str) -> Path:
    """A file of the shared folder; in CI it has to be there, elsewhere its absence is a skip."""
    found = SHARED / path
    if not found.exists() and not os.environ.get("CI"):
        pytest.skip(f"{found.name} is not there (it is not part of the repository)")
    assert found.exists(), f"CI has no {found}"
    return found


@pytest.fixture
def random() -> np.random.Generator:
    """The same random numbers in every run."""
    return np.random.default_rng(0)
