"""Kernels read each weight once, in full sectors, with few bank conflicts (access counter)."""

from __future__ import annotations

import numpy as np
import pytest

from gptx.backends import Positions
from tests.backends.cuda.test_attention import AttentionCase
from tests.backends.cuda.test_linear import LinearCase, linear
from tests.backends.cuda.test_training import Ops
from tests.emulator.access_counter import Cost, costs, traced_launches

pytestmark = [pytest.mark.ptx, pytest.mark.usefixtures("ptx_path")]

BFLOAT16, INT4 = ("bfloat16", 0, 0), ("bfloat16", 4, 64)


@pytest.mark.parametrize(
    ("variant", "with_layer_norm"), [(BFLOAT16, True), (INT4, False)], ids=["bfloat16", "int4"]
)
def test_gemv_reads_each_weight_once(
    variant: tuple[str, int, int], with_layer_norm: bool, random: np.random.Generator
) -> None:
    case = LinearCase(random, variant, 1, 768, 96)
    with traced_launches() as launches:
        case.run(case.plan_gemv(12, with_layer_norm=with_layer_norm))
    found = costs(launches[0])
    n_bytes = case.arrays[0].nbytes
    assert found[4 if with_layer_norm else 1] == Cost(n_bytes, n_bytes // 32, n_bytes // 32)
    assert found["shared"].cost < 1.2 * found["shared"].minimum


def test_attention_decode_reads_each_key_and_value_once(random: np.random.Generator) -> None:
    position, D = 640, 64
    case = AttentionCase(random, starts=[position], splits=5, H=1)
    with traced_launches() as launches:
        case.check()
    (found,) = map(costs, launches)
    cached = 2 * position * D * 2  # bytes
    assert cached <= found[-1].n_bytes < 1.02 * cached  # and the writes
    assert found["shared"].cost < 1.2 * found["shared"].minimum


def test_gemm_reads_each_weight_once(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = 32, 32
    monkeypatch.setattr(linear, "GEMM_TILES", {tile: linear.GEMM_TILES[tile]})
    case = LinearCase(random, INT4, 32, 768, 64)
    with traced_launches() as launches:
        case.run(case.plan_gemm())
    found, n_bytes = costs(launches[0]), case.arrays[0].nbytes
    assert found[1] == Cost(n_bytes, n_bytes // 32, n_bytes // 32)
    assert found["shared"].cost < 1.2 * found["shared"].minimum


def test_the_gradient_of_an_activation_reads_and_writes_each_number_once(
    random: np.random.Generator,
) -> None:
    g, x = random.normal(size=(2, 1, 24, 256))
    ops = Ops("bfloat16")
    with traced_launches() as launches:
        ops.run("gelu_new_vjp", g, x, wanted=(True,))
    found, n_bytes = costs(launches[0]), 2 * g.size
    for array in range(3):
        assert found[array] == Cost(n_bytes, n_bytes // 32, n_bytes // 32)


def test_adamw_reads_and_writes_each_number_once(random: np.random.Generator) -> None:
    ops, shape = Ops("bfloat16"), (64, 48)
    host = [np.abs(random.normal(size=shape)).astype(np.float32) for _ in range(3)]
    w, m, v = ([ops.to_device(x)] for x in host)
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "step": 1, "grad_scale": 1.0}
    gradients = [ops.to_device(random.normal(size=shape))]
    with traced_launches() as launches:
        ops.run("adamw_update", w, gradients, m, v, decays=[0.1], **numbers)
    found = costs(launches[0])[-1]  # the tensors are no arguments: a table has their addresses
    assert found.n_bytes == w[0].size * (2 + 3 * 2 * 4)
    assert found.cost < 1.1 * found.minimum


def test_attention_in_training_has_no_bank_conflicts(random: np.random.Generator) -> None:
    ops, T, D = Ops("bfloat16"), 66, 64
    heads = ops.backend.split_heads(ops.to_device(random.normal(size=(1, T, 3 * D))), 1)
    at, g = Positions(np.arange(T)[None], T, True, np.asarray), random.normal(size=(1, T, D))
    with traced_launches() as launches:
        ops.run("attention", *heads, at, 0.1)
        ops.run("attention_vjp", g, *heads, at, 0.1, wanted=(True, True, True))
    for launch in launches:
        found = costs(launch)["shared"]
        assert found.cost < 1.2 * found.minimum, launch.name
