"""The race detector, the access counter and the PTX translator."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.emulator import Module, compile_text, compiled_by
from tests.emulator.access_counter import Cost, costs, traced_launches
from tests.emulator.ptx_translator import translate

ONE, TWO = (1, 1, 1), (2, 1, 1)
BLOCK = (64, 1, 1)

RACES = r"""
DEVICE int other() { return (threadIdx.x + 40) % 64; }  // a thread of another warp
DEVICE int neighbor() { return threadIdx.x ^ 1; }

DEVICE void phases(float* x, bool first, bool second) {
    __shared__ float shared[64];
    for (int i = 0; i < 3; i++) {
        shared[threadIdx.x] = x[threadIdx.x] + i;
        if (first) __syncthreads();
        x[threadIdx.x] = shared[other()];
        if (second) __syncthreads();
    }
}
extern "C" __global__ void barriers(float* x) { phases(x, true, true); }
extern "C" __global__ void no_barrier(float* x) { phases(x, false, true); }
extern "C" __global__ void no_second_barrier(float* x) { phases(x, true, false); }

DEVICE void exchange(float* x, bool barrier, int with) {
    DYNAMIC_SHARED(raw);
    ((float*)raw)[threadIdx.x] = x[threadIdx.x];
    if (barrier) __syncwarp();
    x[threadIdx.x] = ((float*)raw)[with];
}
extern "C" __global__ void warp_barrier(float* x) { exchange(x, true, neighbor()); }
extern "C" __global__ void no_warp_barrier(float* x) { exchange(x, false, neighbor()); }
extern "C" __global__ void warp_barrier_between_warps(float* x) { exchange(x, true, other()); }

// A buffer that asynchronous copies fill.
DEVICE void copies(float* x, bool waits, bool again) {
    DYNAMIC_SHARED(raw);
    float* buffer = (float*)raw;
    copy_async_4(buffer + threadIdx.x, x + threadIdx.x);
    copy_async_commit();
    if (waits) copy_async_wait<0>();
    __syncthreads();
    const float y = buffer[other()];
    if (again) copy_async_4(buffer + threadIdx.x, x + other());
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    x[threadIdx.x] = y;
}
extern "C" __global__ void copies_in_time(float* x) { copies(x, true, false); }
extern "C" __global__ void copies_without_wait(float* x) { copies(x, false, false); }
extern "C" __global__ void copies_into_use(float* x) { copies(x, true, true); }

// The last block that arrives adds up the results of all blocks.
DEVICE void add_results(float* x, float* sums, unsigned* counter, bool all) {
    if (threadIdx.x) return;
    sums[blockIdx.x] = x[blockIdx.x] + 1;
    if (arrive(counter, gridDim.x) < gridDim.x - 1 && !all) return;
    for (int i = 0; i < gridDim.x; i++) x[2] += sums[i];
}
extern "C" __global__ void last_block(float* x, float* sums, unsigned* counter) {
    add_results(x, sums, counter, false);
}
extern "C" __global__ void every_block(float* x, float* sums, unsigned* counter) {
    add_results(x, sums, counter, true);
}
extern "C" __global__ void blocks(float* x) { x[threadIdx.x] += blockIdx.x + 1; }

extern "C" __global__ void reads_weight_before_sync(const float* weight, float* x) {
    const float w = weight[threadIdx.x];
    grid_dependency_sync();
    x[threadIdx.x] *= w;
}
extern "C" __global__ void reads_input_before_sync(const float* weight, float* x) {
    const float y = x[threadIdx.x];
    grid_dependency_sync();
    x[threadIdx.x] = y * weight[threadIdx.x];
}
extern "C" __global__ void writes_output_before_sync(float* weight, const float* x) {
    weight[threadIdx.x] = threadIdx.x;
    grid_dependency_sync();
    weight[threadIdx.x] += x[threadIdx.x];
}
"""

PATTERNS = r"""
extern "C" __global__ void patterns(const float* x, float* out) {
    __shared__ float shared[33][32];
    shared[threadIdx.x][1] = x[8 * threadIdx.x];
    shared[32][threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = shared[32][2];
}
"""


@pytest.fixture(autouse=True)
def ptx_path() -> Iterator[None]:
    with compiled_by("sm_90"):
        yield


@pytest.fixture
def module() -> Module:
    return compile_text(RACES, {})


@pytest.fixture
def x() -> np.ndarray:
    return np.arange(1, 65, dtype=np.float32)


def test_smoke_of_the_ptx_path(module: Module, x: np.ndarray) -> None:
    """Run one kernel, find one race and count accesses; the marker `ptx` runs all other tests."""
    expected = x.copy()
    for i in range(3):
        expected = np.roll(expected + i, -40)
    with traced_launches() as launches:
        module.launch("barriers", ONE, BLOCK, [x], 256)
    assert x.tolist() == expected.tolist()
    found = costs(launches[0])
    assert found["shared"].cost == found["shared"].minimum == 3 * 2 * 2
    with pytest.raises(AssertionError, match=r"no_barrier\.ptx:\d+: a race: it (reads|writes)"):
        module.launch("no_barrier", ONE, BLOCK, [x], 256)


@pytest.mark.ptx
@pytest.mark.parametrize("name", ["barriers", "warp_barrier", "copies_in_time"])
def test_ordered_accesses_are_no_race(module: Module, name: str, x: np.ndarray) -> None:
    before = x.copy()
    module.launch(name, ONE, BLOCK, [x], 256)
    assert (x != before).all()


@pytest.mark.ptx
@pytest.mark.parametrize(
    "name",
    [
        *("no_barrier", "no_second_barrier", "no_warp_barrier", "warp_barrier_between_warps"),
        *("copies_without_wait", "copies_into_use"),
    ],
)
def test_a_missing_barrier_is_a_race(module: Module, name: str, x: np.ndarray) -> None:
    for seed in range(5):
        with pytest.raises(AssertionError, match=rf"{name}\.ptx:\d+: a race: it (reads|writes)"):
            module.launch(name, ONE, BLOCK, [x], 256, seed=seed)


@pytest.mark.ptx
def test_an_atomic_counter_orders_blocks(module: Module, x: np.ndarray) -> None:
    sums, counter = np.zeros(2, np.float32), np.zeros(1, np.uint32)
    module.launch("last_block", TWO, BLOCK, [x, sums, counter])
    assert x[2] == 3 + 2 + 3
    with pytest.raises(AssertionError, match="a race"):
        module.launch("every_block", TWO, BLOCK, [x, sums, counter])
    with pytest.raises(AssertionError, match=r"a race: it reads .* thread 0 of block 0 writes"):
        module.launch("blocks", TWO, ONE, [x])


@pytest.mark.ptx
def test_only_weights_may_be_read_before_grid_dependency_sync(
    module: Module, x: np.ndarray
) -> None:
    weight = np.full(64, 2, np.float32)
    module.launch("reads_weight_before_sync", ONE, BLOCK, [weight, x])
    np.testing.assert_array_equal(x, np.arange(2, 130, 2))
    for name in ("reads_input_before_sync", "writes_output_before_sync"):
        with pytest.raises(AssertionError, match="is accessed before grid_dependency_sync"):
            module.launch(name, ONE, BLOCK, [weight, x])


@pytest.mark.ptx
def test_access_patterns_have_their_known_costs() -> None:
    x, out = np.arange(256, dtype=np.float32), np.zeros(32, np.float32)
    with traced_launches() as launches:
        compile_text(PATTERNS, {}).launch("patterns", (1, 1, 1), (32, 1, 1), [x, out])
    found = costs(launches[0])
    assert launches[0].name == "patterns"
    assert found[0] == Cost(2 * 128, 4 + 32, 4 + 4)  # neighbors, and one in each sector
    assert found[1] == Cost(128, 4, 4)
    assert found["shared"] == Cost(3 * 128, 1 + 32 + 1, 3)  # a row, a column, one for all


@pytest.mark.ptx
def test_an_unsupported_instruction_is_an_error() -> None:
    ptx = ".visible .entry f(\n\t.param .u64 f_param_0\n)\n{\n\ttex.2d.v4.f32 %r1, %r2;\n}\n"
    with pytest.raises(AssertionError, match=r"f: tex\.2d\.v4\.f32 is not supported"):
        translate(ptx, {"f": "int* x"})
