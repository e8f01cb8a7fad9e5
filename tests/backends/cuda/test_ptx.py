"""What NVRTC makes of the kernels runs, too, and no access to memory races with another.

With `GPTX_PTX=sm_90` every test of the kernels runs so, which takes some minutes.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.backends.cuda import test_rows as test_cuda_rows
from tests.backends.cuda import test_sampler_kernel as test_cuda_sampling
from tests.backends.cuda.test_attention import Attention
from tests.backends.cuda.test_linear import Product
from tests.emulator import KERNELS, Module, compile_text
from tests.emulator.ptx import translate

pytestmark = pytest.mark.usefixtures("compiled_by_nvrtc")
ONE, TWO = (1, 1, 1), (2, 1, 1)
BLOCK = (64, 1, 1)

RACES = r"""
DEVICE int other() { return (threadIdx.x + 40) % 64; }  // a thread of another warp
DEVICE int neighbor() { return threadIdx.x ^ 1; }

DEVICE void phases(float* x, bool first, bool second) {
    __shared__ float room[64];
    for (int i = 0; i < 3; i++) {
        room[threadIdx.x] = x[threadIdx.x] + i;
        if (first) __syncthreads();
        x[threadIdx.x] = room[other()];
        if (second) __syncthreads();
    }
}
extern "C" __global__ void barriers(float* x) { phases(x, true, true); }
extern "C" __global__ void no_barrier(float* x) { phases(x, false, true); }
extern "C" __global__ void no_second_barrier(float* x) { phases(x, true, false); }

DEVICE void exchange(float* x, bool barrier, int with) {
    DYNAMIC_SHARED(room);
    ((float*)room)[threadIdx.x] = x[threadIdx.x];
    if (barrier) __syncwarp();
    x[threadIdx.x] = ((float*)room)[with];
}
extern "C" __global__ void warp_barrier(float* x) { exchange(x, true, neighbor()); }
extern "C" __global__ void no_warp_barrier(float* x) { exchange(x, false, neighbor()); }
extern "C" __global__ void warp_barrier_between_warps(float* x) { exchange(x, true, other()); }

// A buffer that is filled in the background.
DEVICE void copies(float* x, bool waits, bool again) {
    DYNAMIC_SHARED(room);
    float* buffer = (float*)room;
    copy_async_word(buffer + threadIdx.x, x + threadIdx.x);
    copy_async_commit();
    if (waits) copy_async_wait<0>();
    __syncthreads();
    const float y = buffer[other()];
    if (again) copy_async_word(buffer + threadIdx.x, x + other());
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    x[threadIdx.x] = y;
}
extern "C" __global__ void copies_in_time(float* x) { copies(x, true, false); }
extern "C" __global__ void copies_late(float* x) { copies(x, false, false); }
extern "C" __global__ void copies_over(float* x) { copies(x, true, true); }

// The sum of what the blocks left, by the last one to come.
DEVICE void meet(float* x, float* sums, unsigned* counter, bool all) {
    if (threadIdx.x) return;
    sums[blockIdx.x] = x[blockIdx.x] + 1;
    if (arrive(counter, gridDim.x) < gridDim.x - 1 && !all) return;
    for (int i = 0; i < gridDim.x; i++) x[2] += sums[i];
}
extern "C" __global__ void last_block(float* x, float* sums, unsigned* counter) {
    meet(x, sums, counter, false);
}
extern "C" __global__ void every_block(float* x, float* sums, unsigned* counter) {
    meet(x, sums, counter, true);
}
extern "C" __global__ void blocks(float* x) { x[threadIdx.x] += blockIdx.x + 1; }

extern "C" __global__ void early_weight(const float* weight, float* x) {
    const float w = weight[threadIdx.x];
    wait_for_previous();
    x[threadIdx.x] *= w;
}
extern "C" __global__ void early_input(const float* weight, float* x) {
    const float y = x[threadIdx.x];
    wait_for_previous();
    x[threadIdx.x] = y * weight[threadIdx.x];
}
extern "C" __global__ void early_output(float* weight, const float* x) {
    weight[threadIdx.x] = threadIdx.x;
    wait_for_previous();
    weight[threadIdx.x] += x[threadIdx.x];
}
"""


@pytest.fixture
def module() -> Module:
    return compile_text(RACES, {})


@pytest.fixture
def x() -> np.ndarray:
    return np.arange(1, 65, dtype=np.float32)


@pytest.mark.parametrize("name", ["barriers", "warp_barrier", "copies_in_time"])
def test_accesses_in_order_are_no_race(module: Module, name: str, x: np.ndarray) -> None:
    before = x.copy()
    module.launch(name, ONE, BLOCK, [x], 256)
    assert (x != before).all()


@pytest.mark.parametrize(
    "name",
    [
        *("no_barrier", "no_second_barrier", "no_warp_barrier", "warp_barrier_between_warps"),
        *("copies_late", "copies_over"),
    ],
)
def test_a_missing_barrier_is_a_race(module: Module, name: str, x: np.ndarray) -> None:
    for seed in range(5):
        with pytest.raises(AssertionError, match=rf"{name}\.ptx:\d+: a race: it (reads|writes)"):
            module.launch(name, ONE, BLOCK, [x], 256, seed=seed)


def test_blocks_are_in_order_by_a_counter(module: Module, x: np.ndarray) -> None:
    sums, counter = np.zeros(2, np.float32), np.zeros(1, np.uint32)
    module.launch("last_block", TWO, BLOCK, [x, sums, counter])
    assert x[2] == 3 + 2 + 3
    with pytest.raises(AssertionError, match="a race"):
        module.launch("every_block", TWO, BLOCK, [x, sums, counter])
    with pytest.raises(AssertionError, match=r"a race: it reads .* thread 0 of block 0 writes"):
        module.launch("blocks", TWO, ONE, [x])


def test_only_weights_are_read_before_the_wait(module: Module, x: np.ndarray) -> None:
    weight = np.full(64, 2, np.float32)
    module.launch("early_weight", ONE, BLOCK, [weight, x])
    np.testing.assert_array_equal(x, np.arange(2, 130, 2))
    for name in ("early_input", "early_output"):
        with pytest.raises(AssertionError, match="touched before the wait for the kernel ahead"):
            module.launch(name, ONE, BLOCK, [weight, x])


def test_an_unknown_instruction_is_told() -> None:
    ptx = ".visible .entry f(\n\t.param .u64 f_param_0\n)\n{\n\ttex.2d.v4.f32 %r1, %r2;\n}\n"
    with pytest.raises(AssertionError, match=r"f: tex\.2d\.v4\.f32 is not known"):
        translate(ptx, {"f": "int* x"})


# The kernels, each in one kind.


def test_rows_are_normalized(random: np.random.Generator) -> None:
    test_cuda_rows.test_layer_norms_are_the_generic_one("bf16_t", 257, random)


def test_attention_is_the_generic_one(random: np.random.Generator) -> None:
    Attention(random, starts=[0, 64, 200]).check()
    Attention(random, starts=[0, 37], new=[70, 66], H=1).check()


def test_few_rows_are_multiplied(random: np.random.Generator) -> None:
    product = Product(random, ("bfloat16", 0, 0), 2, 160, 45)
    for normed in (False, True):
        product.check(product.few_rows(normed=normed))


def test_more_rows_are_multiplied_in_tiles(random: np.random.Generator) -> None:
    product = Product(random, ("bfloat16", 4, 32), 70, 160, 45)
    product.check(product.tiles())


def test_tokens_are_drawn(random: np.random.Generator) -> None:
    kernels = compile_text((KERNELS / "sampler.cu").read_text("utf-8"), {})
    test_cuda_sampling.test_draws_from_a_whole_vocabulary(kernels, random)
