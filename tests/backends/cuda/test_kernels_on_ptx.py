"""Each kernel on the PTX path, with the race detector.

`GPTX_PTX=sm_90` runs all tests of kernels on that path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.backends.cuda import test_layer_norm, test_sampler, test_training
from tests.backends.cuda.test_attention import AttentionCase
from tests.backends.cuda.test_linear import LinearCase
from tests.emulator import compile_text

pytestmark = [pytest.mark.ptx, pytest.mark.usefixtures("ptx_path")]


def test_layer_norm_on_ptx(random: np.random.Generator) -> None:
    test_layer_norm.test_layer_norms_agree_with_the_generic_op("bf16_t", 257, random)


def test_attention_on_ptx(random: np.random.Generator) -> None:
    AttentionCase(random, starts=[0, 64, 200]).check()
    AttentionCase(random, starts=[0, 37], new=[70, 66], H=1).check()


def test_gemv_on_ptx(random: np.random.Generator) -> None:
    case = LinearCase(random, ("bfloat16", 0, 0), 2, 160, 45)
    for with_layer_norm in (False, True):
        case.check(case.plan_gemv(with_layer_norm=with_layer_norm))


def test_gemm_on_ptx(random: np.random.Generator) -> None:
    case = LinearCase(random, ("bfloat16", 4, 32), 70, 160, 45)
    case.check(case.plan_gemm())


def test_sampler_on_ptx(random: np.random.Generator) -> None:
    kernels = compile_text(test_sampler.SOURCE, {})
    test_sampler.test_draws_from_a_large_vocabulary(kernels, random)


TRAINING: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "attention-float32": (test_training.test_attention_and_its_gradient, ("float32", 8, 40)),
    "attention-bfloat16": (test_training.test_attention_and_its_gradient, ("bfloat16", 64, 66)),
    "pattern": (test_training.test_the_ops_of_attention, ("bfloat16",)),
    "linear": (test_training.test_sums_of_many_rows_are_split, ("bfloat16",)),
    "layer_norm": (test_training.test_layer_norm_vjp, ("bfloat16", 257)),
    "gelu_new": (test_training.test_activation_vjp, ("bfloat16", "gelu_new")),
    "gelu": (test_training.test_activation_vjp, ("float16", "gelu")),
    "embed": (test_training.test_embed_vjp, ("bfloat16", 131)),
    "dropout": (test_training.test_dropout, ("bfloat16", 37)),
    "adamw": (test_training.test_adamw_update, ("mixed",)),
    "squared_norm": (test_training.test_squared_norm, ("float16",)),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_on_ptx(name: str, random: np.random.Generator) -> None:
    test, arguments = TRAINING[name]
    test(*arguments, random)


def test_cross_entropy_on_ptx(random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    test_training.test_cross_entropy("bfloat16", 75, 3, random, monkeypatch)
