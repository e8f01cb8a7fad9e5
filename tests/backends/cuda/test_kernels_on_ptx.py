"""Each kernel on the PTX path, with the race detector.

`GPTX_PTX=sm_90` runs all tests of kernels on that path.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.backends.cuda import test_layer_norm, test_sampler
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
