// The declarations of backends/cuda/kernels/device.cuh for the CPU, with the same meaning. An
// operation that fails on a GPU is a fault here.
#include "cuda.h"

#define DEVICE inline
#define DYNAMIC_SHARED(name) unsigned char* name = emulator::dynamic_shared

constexpr unsigned FULL_MASK = 0xffffffffu;
constexpr int WARP = 32;

struct half_t { unsigned short bits; };
struct bf16_t { unsigned short bits; };

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(half_t x) {
    unsigned sign = (unsigned)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    float y = __uint_as_float(rest << 13) * 0x1p112f;  // the exponents differ by 112
    return __uint_as_float(sign | __float_as_uint(y));
}
DEVICE float to_float(bf16_t x) { return __uint_as_float((unsigned)x.bits << 16); }

// Round to nearest even; every NaN becomes the canonical NaN of a GPU.
template <class T> DEVICE T from_float(float x);
template <> DEVICE float from_float<float>(float x) { return x; }
template <> DEVICE half_t from_float<half_t>(float x) {
    unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return {0x7fff};
    if (rest >= 0x477ff000) return {(unsigned short)(sign | 0x7c00)};  // >= 65520: infinity
    if (rest < 0x38800000) {  // subnormal: adding 0.5 rounds at its last bit
        unsigned place = __float_as_uint(fabsf(x) + 0.5f) - __float_as_uint(0.5f);
        return {(unsigned short)(sign | place)};
    }
    rest += 0xfff + (rest >> 13 & 1) - (112u << 23);
    return {(unsigned short)(sign | rest >> 13)};
}
template <> DEVICE bf16_t from_float<bf16_t>(float x) {
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {(unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <class T> DEVICE unsigned pack(float low, float high) {
    return (unsigned)from_float<T>(low).bits | (unsigned)from_float<T>(high).bits << 16;
}
DEVICE unsigned pack_truncated(float& low, float& high) {
    const unsigned a = __float_as_uint(low), b = __float_as_uint(high);
    low -= __uint_as_float(a >> 16 << 16);
    high -= __uint_as_float(b >> 16 << 16);
    return a >> 16 | b >> 16 << 16;
}

DEVICE float exp2_approx(float x) {
    return x < -126 ? 0.0f : exp2f(x);
}

template <class T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vec {
    T x[N];
};

DEVICE float rounded_product(float a, float b) {
    volatile float rounded = a * b;
    return rounded;
}

struct alignas(16) Bytes16 { unsigned word[4]; };

DEVICE void check_aligned(const void* p, emulator::Site site) {
    if ((uintptr_t)p % 16) emulator::fail(site, "16 bytes at %p, which is no multiple of 16", p);
}
DEVICE void check_shared(const void* p, emulator::Site site) {
    check_aligned(p, site);
    if (!emulator::is_shared(p)) emulator::fail(site, "%p is not in shared memory", p);
}
DEVICE void check_global(const void* p, emulator::Site site) {
    check_aligned(p, site);
    if (emulator::is_shared(p)) emulator::fail(site, "%p is in shared memory", p);
}

DEVICE Bytes16 load(const void* p, emulator::Site site = CALL_SITE) {
    check_global(p, site);
    Bytes16 x;
    memcpy(&x, p, 16);
    return x;
}
DEVICE Bytes16 load_weight(const void* p, bool valid, emulator::Site site = CALL_SITE) {
    return valid ? load(p, site) : Bytes16{};
}

DEVICE void unpack(Bytes16 x, float (&y)[4], float) { memcpy(y, &x, 16); }
template <class T> DEVICE void unpack(Bytes16 x, float (&y)[8], T) {
    for (int i = 0; i < 8; i++) {
        T half;
        half.bits = (unsigned short)(x.word[i / 2] >> (i % 2 * 16));
        y[i] = to_float(half);
    }
}

DEVICE void unpack_quantized(unsigned word, float (&y)[4]) {
    for (int i = 0; i < 4; i++) y[i] = word >> 8 * i & 255;
}
DEVICE void unpack_quantized(unsigned word, float (&y)[8]) {
    for (int i = 0; i < 8; i++) y[i] = 16 + (word >> 4 * i & 15);
}

template <class T> constexpr int ELEMENTS_PER_LOAD = 16 / sizeof(T);

// One exchange instead of five; the order of additions is that of the device.
template <class F>
DEVICE float reduce_warp(const char* operation, float x, emulator::Site site, F f) {
    return emulator::reduce(operation, site, x, [&](const emulator::Slot* slots, float* result) {
        float all[WARP];
        for (int lane = 0; lane < WARP; lane++) all[lane] = emulator::value_of<float>(slots, lane);
        for (int n = WARP / 2; n; n /= 2)
            for (int lane = 0; lane < n; lane++) all[lane] = f(all[lane], all[lane + n]);
        *result = all[0];
    })[0];
}
DEVICE float warp_sum(float x, emulator::Site site = CALL_SITE) {
    return reduce_warp("warp_sum", x, site, [](float a, float b) { return a + b; });
}
DEVICE float warp_max(float x, emulator::Site site = CALL_SITE) {
    return reduce_warp("warp_max", x, site, [](float a, float b) { return fmaxf(a, b); });
}

struct Fragments { unsigned a[4], b[2]; };

// The fragments of a warp: a [16, 16] · b [16, 8] -> product [16, 8].
template <class T> void multiply_fragments(const emulator::Slot* slots, float* product) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < WARP; lane++) {
        const Fragments& from = *(const Fragments*)slots[lane].bytes;
        const int group = lane / 4, t = lane % 4;
        for (int i = 0; i < 8; i++)  // register by register, low half first
            a[group + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] =
                to_float(T{(unsigned short)(from.a[i / 2] >> i % 2 * 16)});
        for (int i = 0; i < 4; i++)
            b[2 * t + i % 2 + i / 2 * 8][group] =
                to_float(T{(unsigned short)(from.b[i / 2] >> i % 2 * 16)});
    }
    emulator::multiply(a, b, product);
}

template <class T> DEVICE void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                   T, emulator::Site site = CALL_SITE) {
    const Fragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const float* product = emulator::reduce("mma", site, mine, multiply_fragments<T>);
    const int group = emulator::current->lane / 4, t = emulator::current->lane % 4;
    for (int i = 0; i < 4; i++) c[i] += product[(group + i / 2 * 8) * 8 + 2 * t + i % 2];
}

template <bool TRANSPOSED>
DEVICE void ldmatrix_as(const char* operation, unsigned (&x)[4], const void* row,
                          emulator::Site site) {
    check_shared(row, site);
    auto slots = emulator::exchange(operation, site, row);
    int group = emulator::current->lane / 4, t = emulator::current->lane % 4;
    const auto at = [&](int tile, int i, int j) {
        return (unsigned)emulator::value_of<const unsigned short*>(slots, tile * 8 + i)[j];
    };
    for (int tile = 0; tile < 4; tile++)
        x[tile] = TRANSPOSED ? at(tile, 2 * t, group) | at(tile, 2 * t + 1, group) << 16
                             : at(tile, group, 2 * t) | at(tile, group, 2 * t + 1) << 16;
}
DEVICE void ldmatrix(unsigned (&x)[4], const void* row, emulator::Site site = CALL_SITE) {
    ldmatrix_as<false>("ldmatrix", x, row, site);
}
DEVICE void ldmatrix_transposed(unsigned (&x)[4], const void* row,
                                emulator::Site site = CALL_SITE) {
    ldmatrix_as<true>("ldmatrix_transposed", x, row, site);
}

// Copy as late as possible: the target holds garbage until the wait.
DEVICE void defer_copy(void* shared, const void* global, int n_bytes, bool valid,
                       emulator::Site site) {
    memset(shared, emulator::GARBAGE, n_bytes);
    emulator::Fiber& fiber = *emulator::current;
    if (fiber.n_copies == emulator::MAX_COPIES)
        emulator::fail(site, "too many pending copies");
    fiber.copies[fiber.n_copies++] = {shared, valid ? global : nullptr, n_bytes, fiber.n_groups};
}
DEVICE void copy_async(void* shared, const void* global, bool valid = true,
                       emulator::Site site = CALL_SITE) {
    check_shared(shared, site);
    if (valid) check_global(global, site);
    defer_copy(shared, global, 16, valid, site);
}
DEVICE void copy_async_4(void* shared, const void* global, bool valid = true,
                            emulator::Site site = CALL_SITE) {
    if (((uintptr_t)shared | (uintptr_t)global) % 4 || !emulator::is_shared(shared) ||
        emulator::is_shared(global))
        emulator::fail(site, "a copy of 4 bytes from %p to %p", global, shared);
    defer_copy(shared, global, 4, valid, site);
}
DEVICE void copy_async_commit() { emulator::current->n_groups++; }
template <int N> DEVICE void copy_async_wait() {
    emulator::Fiber& fiber = *emulator::current;
    int n_done = 0;
    for (; n_done < fiber.n_copies; n_done++) {
        const emulator::Copy& copy = fiber.copies[n_done];
        if (copy.group >= fiber.n_groups - N) break;
        if (copy.from) memcpy(copy.to, copy.from, copy.n_bytes);
        else memset(copy.to, 0, copy.n_bytes);
    }
    fiber.n_copies -= n_done;
    memmove(fiber.copies, fiber.copies + n_done, fiber.n_copies * sizeof(emulator::Copy));
}

// Kernels run one after the other, so neither does anything; `n_waits` counts the calls.
DEVICE void trigger_dependent_launch() {}
DEVICE void grid_dependency_sync() { emulator::n_waits++; }

DEVICE unsigned arrive(unsigned* counter, unsigned n) { return atomicInc(counter, n - 1); }
