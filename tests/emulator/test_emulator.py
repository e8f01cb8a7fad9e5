"""The CUDA emulator: results of correct kernels, and reports of faults in bad ones."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.emulator import Module, compile_text, compiled_by

ONE = (1, 1, 1)
WARP = (32, 1, 1)
TYPES = {"half": np.float16, "bf16": ml_dtypes.bfloat16}

GOOD = r"""
extern "C" __global__ void indices(int* out) {
    int i = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    out[block * blockDim.x * blockDim.y * blockDim.z + i] = block * 1000 + i;
}

extern "C" __global__ void shuffles(const float* x, float* out, unsigned* bits) {
    int lane = threadIdx.x % WARP;
    out += threadIdx.x;
    float mine = x[threadIdx.x];
    out[0] = __shfl_xor_sync(FULL_MASK, mine, 5);
    out[64] = __shfl_sync(FULL_MASK, mine, 3);
    out[128] = __shfl_down_sync(FULL_MASK, mine, 2);
    out[192] = __shfl_up_sync(FULL_MASK, mine, 2);
    out[256] = __shfl_sync(FULL_MASK, mine, 9, 8);
    out[320] = __shfl_down_sync(FULL_MASK, mine, 2, 8);
    out[384] = warp_sum(mine);
    out[448] = warp_max(mine);
    bits[threadIdx.x] = __ballot_sync(FULL_MASK, mine > 0 && lane != 7);
}

// Each phase reads what threads of other warps wrote in the phase before.
extern "C" __global__ void reverse_often(int* x, int n_times) {
    DYNAMIC_SHARED(raw);
    int* shared = (int*)raw;
    for (int i = 0; i < n_times; i++) {
        shared[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
        x[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x] + 1;
        __syncthreads();
    }
}

extern "C" __global__ void count(unsigned* arrived, int* last_block, float* sum) {
    if (threadIdx.x == 0) {
        __threadfence();
        if (atomicAdd(arrived, 1u) == gridDim.x - 1) *last_block = blockIdx.x;
    }
    atomicAdd(sum, 0.5f);
}

template <class T> DEVICE void products(const T* a, const T* b, float* c) {
    DYNAMIC_SHARED(raw);
    T* tiles = (T*)raw;  // a [16, 16], b [8, 16]
    int lane = threadIdx.x, group = lane / 4, t = lane % 4;
    for (int i = lane; i < 256; i += WARP) tiles[i] = a[i];
    for (int i = lane; i < 128; i += WARP) tiles[256 + i] = b[i];
    __syncwarp();
    unsigned x[4], y[4];
    int tile = lane / 8, row = lane % 8;
    ldmatrix(x, tiles + (row + tile % 2 * 8) * 16 + tile / 2 * 8);
    ldmatrix(y, tiles + 256 + row * 16 + tile % 2 * 8);
    float sums[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    mma(sums, x, {y[0], y[1]}, T{});
    for (int i = 0; i < 4; i++) c[(group + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}
extern "C" __global__ void products_half(const half_t* a, const half_t* b, float* c) {
    products(a, b, c);
}
extern "C" __global__ void products_bf16(const bf16_t* a, const bf16_t* b, float* c) {
    products(a, b, c);
}

// x [8, 32]: four tiles side by side.
extern "C" __global__ void transposed_tiles(const half_t* x, unsigned* out) {
    DYNAMIC_SHARED(raw);
    half_t* tiles = (half_t*)raw;
    for (int i = threadIdx.x; i < 256; i += WARP) tiles[i] = x[i];
    __syncwarp();
    unsigned y[4];
    ldmatrix_transposed(y, tiles + threadIdx.x % 8 * 32 + threadIdx.x / 8 * 8);
    for (int i = 0; i < 4; i++) out[i * WARP + threadIdx.x] = y[i];
}

template <class T> DEVICE void round_trip(const float* x, T* rounded, float* back, int n) {
    for (int i = threadIdx.x; i < n; i += WARP) {
        rounded[i] = from_float<T>(x[i]);
        back[i] = to_float(rounded[i]);
    }
}
extern "C" __global__ void round_half(const float* x, half_t* rounded, float* back, int n) {
    round_trip(x, rounded, back, n);
}
extern "C" __global__ void round_bf16(const float* x, bf16_t* rounded, float* back, int n) {
    round_trip(x, rounded, back, n);
}

extern "C" __global__ void copies(const float* x, float* before, float* after) {
    DYNAMIC_SHARED(raw);
    float* shared = (float*)raw + threadIdx.x * 12;
    for (int i = 0; i < 3; i++) {
        copy_async(shared + 4 * i, x + 4 * i, i != 1);
        copy_async_commit();
    }
    copy_async_wait<1>();
    for (int i = 0; i < 12; i++) before[i] = shared[i];
    copy_async_wait<0>();
    for (int i = 0; i < 12; i++) after[i] = shared[i];
}

extern "C" __global__ void integers(const unsigned long long* a, unsigned long long* out) {
    out[0] = __umul64hi(a[0], a[1]);
    out[1] = __clz((int)a[2]);
    out[2] = a[0];
    atomicMax(out + 2, a[1]);
}
"""

BAD = r"""
extern "C" __global__ void some_leave(float* x) {
    if (threadIdx.x < 3) return;
    __syncthreads();
}
extern "C" __global__ void two_barriers(float* x) {
    if (threadIdx.x < 32) __syncthreads();
    else
        __syncthreads();
}
extern "C" __global__ void some_lanes_leave(float* x) {
    if (threadIdx.x > 60) return;
    x[0] = warp_sum(x[0]);
}
extern "C" __global__ void lanes_disagree(float* x) {
    if (threadIdx.x % 2) x[0] = warp_sum(x[0]);
    else x[0] = warp_max(x[0]);
}
extern "C" __global__ void half_a_warp(float* x) {
    x[0] = __shfl_xor_sync(0xffffu, x[0], 1);
}
extern "C" __global__ void beyond_shared(float* x) {
    DYNAMIC_SHARED(raw);
    ((float*)raw)[threadIdx.x] = 1.0f;
}
extern "C" __global__ void before_shared(float* x) {
    DYNAMIC_SHARED(raw);
    ((float*)raw)[-1] = 1.0f;
}
extern "C" __global__ void reads_behind(float* x, const float* y) { x[0] = y[4]; }
extern "C" __global__ void writes_behind(float* x) { x[64] = 0.0f; }
extern "C" __global__ void writes_before(float* x) { x[-1] = 0.0f; }
extern "C" __global__ void misaligned_load(float* x) { x[0] = load(x + 1).word[0]; }
extern "C" __global__ void misaligned_copy(float* x) {
    DYNAMIC_SHARED(raw);
    copy_async(raw + 8, x);
}
extern "C" __global__ void misaligned_word(unsigned char* x) { *(unsigned*)(x + 2) = 1; }
extern "C" __global__ void load_from_shared(float* x) {
    DYNAMIC_SHARED(raw);
    x[0] = load(raw).word[0];
}
extern "C" __global__ void tiles_from_global(float* x) {
    unsigned y[4];
    ldmatrix(y, x);
}
extern "C" __global__ void register_index(float* x, int n) {
    float y[4] = {};
    for (int i = 0; i <= n; i++) y[i] += i;
    x[0] = y[0];
}
extern "C" __global__ void wide_shift(unsigned* x, int by) { x[0] = 1u << by; }
extern "C" __global__ void divides(int* x, int by) { x[0] /= by; }
extern "C" __global__ void __launch_bounds__(128, 2) bounded(float* x) {}
extern "C" __global__ void uninitialized(float* x) {
    DYNAMIC_SHARED(raw);
    __shared__ float fixed[4];
    x[0] = ((float*)raw)[threadIdx.x];
    x[1] = fixed[threadIdx.x];
    ((float*)raw)[threadIdx.x] = fixed[threadIdx.x] = 1.0f;
}
extern "C" __global__ void no_barrier(int* x) {
    __shared__ int shared[256];
    shared[threadIdx.x] = threadIdx.x;
    x[threadIdx.x] = shared[255 - threadIdx.x];
}
"""


PATHS = [pytest.param("", id="g++"), pytest.param("sm_90", id="PTX", marks=pytest.mark.ptx)]


@pytest.fixture(scope="module", params=PATHS)
def good(request: pytest.FixtureRequest) -> Module:
    with compiled_by(request.param):
        return compile_text(GOOD, {})


@pytest.fixture(scope="module")
def bad() -> Module:
    """Kernels with faults, on the g++ path: PTX has no lines of the source."""
    with compiled_by(""):
        return compile_text('#line 1 "bad.cu"\n' + BAD, {})


def test_threads_have_their_indices(good: Module) -> None:
    out = np.zeros((2 * 3 * 4, 5 * 3 * 2), np.int32)
    good.launch("indices", (2, 3, 4), (5, 3, 2), [out])
    np.testing.assert_array_equal(out, np.arange(24)[:, None] * 1000 + np.arange(30))


@pytest.mark.parametrize("seed", [1, 2])
def test_warp_shuffles_and_votes(good: Module, seed: int, random: np.random.Generator) -> None:
    x = random.normal(size=(2, 32)).astype(np.float32)
    out, bits = np.zeros((8, 2, 32), np.float32), np.zeros((2, 32), np.uint32)
    good.launch("shuffles", ONE, (64, 1, 1), [x, out, bits], seed=seed)
    lane = np.arange(32)
    sources = [
        lane ^ 5,
        np.full(32, 3),
        np.where(lane < 30, lane + 2, lane),
        np.where(lane < 2, lane, lane - 2),
        lane // 8 * 8 + 1,
        np.where(lane % 8 < 6, lane + 2, lane),
    ]
    for got, source in zip(out, sources, strict=False):
        np.testing.assert_array_equal(got, x[:, source])
    tree = x.copy()
    for n in (16, 8, 4, 2, 1):
        tree = tree[:, :n] + tree[:, n : 2 * n]
    np.testing.assert_array_equal(out[6], np.broadcast_to(tree, x.shape))
    np.testing.assert_array_equal(out[7], np.broadcast_to(x.max(1, keepdims=True), x.shape))
    votes = ((x > 0) & (lane != 7)) @ (1 << lane)
    np.testing.assert_array_equal(bits, np.broadcast_to(votes[:, None], x.shape))


@pytest.mark.parametrize("n_threads", [1, 33, 1024])
def test_block_barriers(good: Module, n_threads: int) -> None:
    x = np.arange(n_threads, dtype=np.int32)
    good.launch("reverse_often", ONE, (n_threads, 1, 1), [x, np.int32(5)], 4 * n_threads)
    np.testing.assert_array_equal(x, np.arange(n_threads)[::-1] + 5)


def test_atomics(good: Module) -> None:
    arrived, last, total = np.zeros(1, np.uint32), np.zeros(1, np.int32), np.zeros(1, np.float32)
    good.launch("count", (7, 1, 1), (64, 1, 1), [arrived, last, total])
    assert (arrived[0], last[0], total[0]) == (7, 6, 7 * 64 / 2)


@pytest.mark.parametrize("name", TYPES)
def test_mma_of_tiles_is_a_matrix_product(
    good: Module, name: str, random: np.random.Generator
) -> None:
    a = random.normal(size=(16, 16)).astype(TYPES[name])
    b = random.normal(size=(8, 16)).astype(TYPES[name])
    c = np.zeros((16, 8), np.float32)
    good.launch(f"products_{name}", ONE, WARP, [a, b, c], 2 * (256 + 128))
    expected = 1 + a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_allclose(c, expected, rtol=0, atol=1e-5)


def test_ldmatrix_transposed(good: Module) -> None:
    x = np.arange(256, dtype=np.uint16).reshape(8, 32)
    out = np.zeros((4, 8, 4), np.uint32)  # lane 4i + j: two neighbors of row i
    good.launch("transposed_tiles", ONE, WARP, [x.view(np.float16), out], 512)
    got = out.view(np.uint16).reshape(4, 8, 8)
    np.testing.assert_array_equal(got, x.reshape(8, 4, 8).transpose(1, 2, 0))


@pytest.mark.parametrize("name", TYPES)
def test_conversion_to_16_bits_rounds_to_nearest_even(good: Module, name: str) -> None:
    """Test each number of the type, the midpoints, and the float32 neighbors of both."""
    every = np.arange(1 << 16, dtype=np.uint16).view(TYPES[name]).astype(np.float32)
    finite = np.unique(every[np.isfinite(every)]).astype(np.float64)
    step = finite[-1] - finite[-2]
    edges = finite[0] - step / 2, finite[-1] + step / 2  # round to infinity
    with np.errstate(all="ignore"):
        x = np.concatenate([every, (finite[1:] + finite[:-1]) / 2, edges]).astype(np.float32)
        x = np.concatenate([x, np.nextafter(x, np.inf), np.nextafter(x, -np.inf)])
        expected = x.astype(TYPES[name]).view(np.uint16)
    rounded, back = np.zeros(x.size, TYPES[name]), np.zeros(x.size, np.float32)
    good.launch(f"round_{name}", ONE, WARP, [x, rounded, back, np.int32(x.size)])
    expected[np.isnan(x)] = 0x7FFF  # the canonical NaN
    np.testing.assert_array_equal(rounded.view(np.uint16), expected)
    np.testing.assert_array_equal(back, rounded.astype(np.float32))


def test_asynchronous_copies_complete_at_the_wait(good: Module) -> None:
    x = np.arange(12, dtype=np.float32)
    before, after = np.zeros((2, 12), np.float32)
    good.launch("copies", ONE, ONE, [x, before, after], 48)
    expected = np.where(np.arange(12) // 4 == 1, 0, x)  # one copy has no source
    np.testing.assert_array_equal(after, expected)
    np.testing.assert_array_equal(before[:8], expected[:8])
    assert np.isnan(before[8:]).all()


def test_integer_intrinsics(good: Module) -> None:
    a = np.array([2**63 + 12345, 2**62 + 7, 0b101000], np.uint64)
    out = np.zeros(3, np.uint64)
    good.launch("integers", ONE, ONE, [a, out])
    product = int(a[0]) * int(a[1]) >> 64
    assert out.tolist() == [product, 26, int(a[0])]


FAULTS = {
    "some_leave": r"deadlock: of 64 threads 3 ended, 61 wait at bad\.cu:4 for __syncthreads",
    "two_barriers": r"deadlock.*32 wait at bad\.cu:7 for __syncthreads, 32 wait at bad\.cu:9",
    "some_lanes_leave": r"deadlock: of 64 threads 35 ended, 29 wait at bad\.cu:13 for warp_sum",
    "lanes_disagree": r"bad\.cu:1[67]: warp_\w+, but lane \d+ of the warp waits at bad\.cu:1[67]",
    "half_a_warp": r"bad\.cu:20: a mask of fewer than all lanes: 0xffff",
    "beyond_shared": r"byte (1[6-9]|2[0-5])\d of the 160 of dynamic shared memory",
    "before_shared": r"written at byte -4 of the 160 of dynamic shared memory",
    "writes_behind": r"no array is at address 0x\w+ \(byte 256 of the 256 of argument 0\)",
    "writes_before": r"writes before or behind \*float32",
    "misaligned_load": r"bad\.cu:\d+: 16 bytes at 0x\w+4, which is no multiple of 16",
    "misaligned_copy": r"bad\.cu:\d+: 16 bytes at 0x\w+8, which is no multiple of 16",
    "load_from_shared": r"0x\w+ is in shared memory",
    "tiles_from_global": r"0x\w+ is not in shared memory",
    "bounded": r"block \(0, 0, 0\): 129 threads exceed the launch bounds of 128",
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_reported(bad: Module, name: str) -> None:
    x = np.zeros(64, np.float32)
    block = (129 if name == "bounded" else 64, 1, 1)
    with pytest.raises(AssertionError, match=rf"{name}.*({FAULTS[name]})"):
        bad.launch(name, ONE, block, [x], 160)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("reads_behind", [np.zeros(1, np.float32), np.zeros(4, np.float32)], "16 of argument 1"),
        ("misaligned_word", [np.zeros(8, np.uint8)], r"0x\w+2 is no multiple of 4"),
        ("register_index", [np.zeros(1, np.float32), np.int32(4)], "index 4 is out of bounds"),
        ("wide_shift", [np.zeros(1, np.uint32), np.int32(32)], "a shift by 32"),
        ("divides", [np.zeros(1, np.int32), np.int32(0)], "a division by 0"),
        ("divides", [None, np.int32(1)], "no array is at address.*near no argument"),
    ],
)
def test_faults_of_one_thread_are_reported(bad: Module, name: str, args: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"kernel {name}.*thread \(0, 0, 0\).*{message}"):
        bad.launch(name, ONE, ONE, args)


def test_a_launch_after_a_fault_succeeds(bad: Module) -> None:
    x = np.zeros(1, np.int32)
    with pytest.raises(AssertionError, match="division"):
        bad.launch("divides", ONE, WARP, [x, np.int32(0)])
    x[0] = 8
    bad.launch("divides", ONE, ONE, [x, np.int32(2)])
    assert x[0] == 4


def test_uninitialized_shared_memory_holds_garbage(bad: Module) -> None:
    x = np.zeros(2, np.float32)
    bad.launch("uninitialized", (2, 1, 1), ONE, [x], 16)
    assert np.isnan(x).all()


def test_a_missing_barrier_changes_the_result(bad: Module) -> None:
    x = np.zeros(256, np.int32)
    for seed in range(1, 4):
        bad.launch("no_barrier", ONE, (256, 1, 1), [x], seed=seed)
        assert (x != np.arange(256)[::-1]).any()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([np.zeros(1, np.int32), np.int64(1)], "argument 1: expected int32, not int64"),
        ([np.zeros(1, np.int32), 1], "argument 1: expected int32, not int"),
        ([np.zeros(1, np.float32), np.int32(1)], r"expected \*int32, not an array of float32"),
        ([np.zeros((4, 4), np.int32)[:, :2], np.int32(1)], r"expected \*int32, contiguous"),
        ([np.zeros(1, np.int32)], "divides takes 2 arguments, not 1"),
    ],
)
def test_arguments_of_a_wrong_type_are_rejected(bad: Module, args: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        bad.launch("divides", ONE, ONE, args)


def test_an_unknown_kernel_is_an_error(bad: Module) -> None:
    with pytest.raises(AssertionError, match="no kernel 'none' among some_leave"):
        bad.launch("none", ONE, ONE, [])


def test_errors_of_the_compiler_are_reported() -> None:
    with compiled_by(""), pytest.raises(AssertionError, match=r"odd\.cu:2.*nonsense"):
        compile_text('#line 1 "odd.cu"\n\nnonsense;', {})
