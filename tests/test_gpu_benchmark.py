"""benchmarks/gpu.py, as far as that goes without a GPU: it has to be right the first time."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from random_models import CASES, random_weights

from gptx.backends import Backend
from gptx.backends.base import OPS
from gptx.bench.speed import weights_bytes
from gptx.config import SIZES, GPT2Config
from gptx.quantization import Quantization
from gptx.weights import check_weights, to_backend

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu
import gpu_checks
import gpu_engines
import gpu_models
import gpu_plan
import gpu_report
import gpu_times

TINY = CASES["355M"]  # its widths are whole groups of 64


def forever() -> float:
    return time.time() + 1000


# Models


@pytest.mark.parametrize("how", [None, Quantization(64, 4), Quantization(64, 8)])
def test_random_weights_are_a_model_of_as_many_bytes(how: Quantization | None) -> None:
    config = replace(TINY, quantization=how)
    weights = gpu_models.random_weights(config, how)
    check_weights(weights, config)
    backend = SimpleNamespace(
        asarray=np.asarray, matrix=np.asarray, quantized=lambda q, table: vars(q)
    )
    tree = to_backend(weights, backend)
    model = SimpleNamespace(gpt2=SimpleNamespace(weights=tree), config=config)
    names = dict.fromkeys(weights)
    assert names.keys() == config.tensor_shapes().keys()
    parts = [x if how is None or isinstance(x, np.ndarray) else x for x in weights.values()]
    size = sum(weights_bytes_of(x) for x in parts) - weights["wpe.weight"].nbytes
    assert gpu_models.read_bytes(config, 4) == size
    if how is None:
        assert weights_bytes(model)[1] == size


def weights_bytes_of(x: Any) -> int:
    if isinstance(x, np.ndarray):
        return x.nbytes
    return x.weight.nbytes + x.scales.nbytes + x.biases.nbytes
