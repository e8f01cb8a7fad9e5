// Device primitives: types, conversions, loads, warp reductions, tensor cores, asynchronous copies.
//
// Only this file contains inline PTX. The emulator of the tests compiles tests/emulator/device.h in
// place of it. No file includes another, so NVRTC needs no headers of the CUDA toolkit.

#define DEVICE __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

constexpr unsigned FULL_MASK = 0xffffffffu;
constexpr int WARP = 32;

struct half_t { unsigned short bits; };
struct bf16_t { unsigned short bits; };

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(half_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
DEVICE float to_float(bf16_t x) { return __uint_as_float((unsigned)x.bits << 16); }

// Round to nearest even: from_float<half_t>(x).
template <class T> DEVICE T from_float(float x);
template <> DEVICE float from_float<float>(float x) { return x; }
template <> DEVICE half_t from_float<half_t>(float x) {
    half_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <> DEVICE bf16_t from_float<bf16_t>(float x) {
    bf16_t y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Pack two numbers in a word, the first in the low half, as an operand of mma.
template <class T> DEVICE unsigned pack(float low, float high);
template <> DEVICE unsigned pack<half_t>(float low, float high) {
    unsigned y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <> DEVICE unsigned pack<bf16_t>(float low, float high) {
    unsigned y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// Pack two numbers as bf16_t, truncated; subtract the truncated values from the arguments.
DEVICE unsigned pack_truncated(float& low, float& high) {
    const unsigned a = __float_as_uint(low), b = __float_as_uint(high);
    low -= __uint_as_float(a & 0xffff0000u);
    high -= __uint_as_float(b & 0xffff0000u);
    return __byte_perm(a, b, 0x7632);
}

// 2^x with an error of at most 2 ulp; subnormal results become 0.
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// N consecutive elements, aligned for loads and stores of up to 16 bytes.
template <class T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vec {
    T x[N];
};

// a · b, rounded: not fused with a later addition.
DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }

// 16 aligned bytes: 4 floats or 8 numbers of 16 bits.
struct alignas(16) Bytes16 { unsigned word[4]; };

DEVICE Bytes16 load(const void* p) {
    Bytes16 x;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
                 : "l"(p) : "memory");
    return x;
}

// Load 16 bytes of a weight: constant memory that is read once. `volatile` keeps the load in front
// of grid_dependency_sync. Return zeros if not `valid`.
DEVICE Bytes16 load_weight(const void* p, bool valid) {
    Bytes16 x;
    asm volatile("{ .reg .pred valid; setp.ne.s32 valid, %5, 0;\n"
                 "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
                 "@valid ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "=&r"(x.word[0]), "=&r"(x.word[1]), "=&r"(x.word[2]), "=&r"(x.word[3])
                 : "l"(p), "r"((int)valid));
    return x;
}

// Convert the numbers in 16 bytes to floats.
DEVICE void unpack(Bytes16 x, float (&y)[4], float) {
#pragma unroll
    for (int i = 0; i < 4; i++) y[i] = __uint_as_float(x.word[i]);
}
template <class T> DEVICE void unpack(Bytes16 x, float (&y)[8], T) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        T half;
        half.bits = (unsigned short)(x.word[i / 2] >> (i % 2 * 16));
        y[i] = to_float(half);
    }
}

// Convert the quantized values in a word to floats: 4 of 8 bits, or 8 of 4 bits plus 16 each, which
// takes fewer instructions. Byte permutations place a value in the fraction of a float.
DEVICE void unpack_quantized(unsigned word, float (&y)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)  // 2^23 + value
        y[i] = __uint_as_float(__byte_perm(word, 0x4b000000, 0x7440 | i)) - 8388608.0f;
}
DEVICE void unpack_quantized(unsigned word, float (&y)[8]) {
    const unsigned even = word << 3 & 0x78787878 | 0x80808080;
    const unsigned odd = word >> 1 & 0x78787878 | 0x80808080;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        y[2 * i] = __uint_as_float(__byte_perm(even, 0x41000000, 0x7044 | i << 8));
        y[2 * i + 1] = __uint_as_float(__byte_perm(odd, 0x41000000, 0x7044 | i << 8));
    }
}

template <class T> constexpr int ELEMENTS_PER_LOAD = 16 / sizeof(T);

// Reductions over the 32 lanes of a warp; every lane gets the result.
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int lane = WARP / 2; lane; lane /= 2) x += __shfl_xor_sync(FULL_MASK, x, lane);
    return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
    for (int lane = WARP / 2; lane; lane /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, lane));
    return x;
}

// c += a · b for tiles a [16, 16], b [16, 8] and c [16, 8], distributed over a warp by the layout
// of PTX's mma.m16n8k16. With g = lane / 4 and t = lane % 4, a thread holds
// a: (g, 2t..2t+1), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..);
// b: (2t..2t+1, g), (2t+8.., g);
// c: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
DEVICE void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], bf16_t) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], half_t) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Load four tiles [8, 8] of 16-bit numbers from shared memory. Lane l passes the address of row l %
// 8 of tile l / 8, 16 bytes, and gets elements (l / 4, 2 (l % 4)..+1) of each tile. The transposed
// form returns elements (2 (l % 4)..+1, l / 4).
DEVICE void ldmatrix(unsigned (&x)[4], const void* row) {
    unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}
DEVICE void ldmatrix_transposed(unsigned (&x)[4], const void* row) {
    unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}

// Copy 16 bytes from global to shared memory asynchronously; write zeros if not `valid`. A commit
// closes a group of copies. wait<N> returns when all but the newest N groups of this thread are
// complete; a __syncthreads() makes them visible to other threads.
DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
    unsigned address = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(address), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
// Copy 4 bytes.
DEVICE void copy_async_4(void* shared, const void* global, bool valid = true) {
    unsigned address = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(address), "l"(global), "r"(valid ? 4 : 0) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

// Programmatic dependent launch (`dependent_launch.py`). After trigger_dependent_launch, blocks of
// the next kernel may become resident. Before grid_dependency_sync, a kernel must not read what
// earlier kernels wrote, and must not write. Both are no-ops in a normal launch and before sm_90.
DEVICE void trigger_dependent_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void grid_dependency_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Arrive at a counter for n threads; return the number of earlier arrivals. The last arrival resets
// the counter to 0. A later arrival observes this thread's earlier writes, and its block's writes
// before a barrier in front of the call.
DEVICE unsigned arrive(unsigned* counter, unsigned n) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before) : "l"(counter), "r"(n - 1) : "memory");
    return before;
}
