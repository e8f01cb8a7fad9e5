"""Kernels read each weight once, in whole sectors, and their warps hardly meet in shared memory.

That decides how fast they can be on a GPU, and takes none to see: `cuda_on_cpu/accesses.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from gptx.backends.cuda import linear as cupy_launch
from tests.backends.cuda.test_attention import Attention
from tests.backends.cuda.test_linear import Product
from tests.emulator import compile_text
from tests.emulator.accesses import Cost, costs, traced

pytestmark = pytest.mark.usefixtures("compiled_by_nvrtc")

BFLOAT16, INT4 = ("bfloat16", 0, 0), ("bfloat16", 4, 64)

PATTERNS = r"""
extern "C" __global__ void patterns(const float* x, float* out) {
    __shared__ float room[33][32];
    room[threadIdx.x][1] = x[8 * threadIdx.x];
    room[32][threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = room[32][2];
}
"""


def test_patterns_have_their_known_costs() -> None:
    x, out = np.arange(256, dtype=np.float32), np.zeros(32, np.float32)
    with traced() as launches:
        compile_text(PATTERNS, {}).launch("patterns", (1, 1, 1), (32, 1, 1), [x, out])
    found = costs(launches[0])
    assert launches[0].name == "patterns"
    assert found[0] == Cost(2 * 128, 4 + 32, 4 + 4)  # neighbors, and one in each sector
    assert found[1] == Cost(128, 4, 4)
    assert found["shared"] == Cost(3 * 128, 1 + 32 + 1, 3)  # a row, a column, one for all


@pytest.mark.parametrize(
    ("kind", "normed"), [(BFLOAT16, True), (INT4, False)], ids=["bfloat16", "int4"]
)
def test_a_step_reads_each_weight_once(
    kind: tuple[str, int, int], normed: bool, random: np.random.Generator
) -> None:
    product = Product(random, kind, 1, 768, 96)
    launch = product.few_rows(12, normed=normed)
    with traced() as launches:
        product.run(launch)
    found = costs(launches[0])
    n_bytes = product.parts[0].nbytes
    assert found[4 if normed else 1] == Cost(n_bytes, n_bytes // 32, n_bytes // 32)
    assert found["shared"].cost < 1.2 * found["shared"].least


def test_a_step_reads_each_key_and_value_once(random: np.random.Generator) -> None:
    position, D = 640, 64
    attention = Attention(random, starts=[position], splits=5, H=1)
    with traced() as launches:
        attention.check()
    (found,) = map(costs, launches)
    cached = 2 * position * D * 2  # bytes
    assert cached <= found[-1].n_bytes < 1.02 * cached  # and what is written
    assert found["shared"].cost < 1.2 * found["shared"].least


def test_a_tile_reads_each_weight_once(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = 32, 32
    monkeypatch.setattr(cupy_launch, "TILES", {tile: cupy_launch.TILES[tile]})
    product = Product(random, INT4, 32, 768, 64)
    with traced() as launches:
        product.run(product.tiles())
    found, n_bytes = costs(launches[0]), product.parts[0].nbytes
    assert found[1] == Cost(n_bytes, n_bytes // 32, n_bytes // 32)
    assert found["shared"].cost < 1.2 * found["shared"].least
