"""Kernels read each weight once, in full sectors, with few bank conflicts (access counter)."""

from __future__ import annotations

import numpy as np
import pytest

from tests.backends.cuda.test_attention import AttentionCase
from tests.backends.cuda.test_linear import LinearCase, linear
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
