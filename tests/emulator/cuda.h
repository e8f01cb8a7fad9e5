// The parts of CUDA C++ that the kernels use, for g++.
#pragma once
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include "fibers.h"

#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("static_shared")))
#define __global__
#define __launch_bounds__(...)

#define INLINE [[gnu::always_inline]] inline

static void __syncthreads(emulator::Site site = CALL_SITE) { emulator::wait_for_block(site); }

static void check_mask(unsigned mask, emulator::Site site) {
    if (mask != emulator::ALL) emulator::fail(site, "a mask of fewer than all lanes: %#x", mask);
}
static void __syncwarp(unsigned mask = emulator::ALL, emulator::Site site = CALL_SITE) {
    check_mask(mask, site);
    emulator::exchange("__syncwarp", site, 0);
}
static unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = CALL_SITE) {
    check_mask(mask, site);
    auto slots = emulator::exchange("__ballot_sync", site, predicate);
    unsigned bits = 0;
    for (int lane = 0; lane < 32; lane++)
        bits |= (unsigned)(emulator::value_of<int>(slots, lane) != 0) << lane;
    return bits;
}
static int __any_sync(unsigned mask, int predicate, emulator::Site site = CALL_SITE) {
    return __ballot_sync(mask, predicate, site) != 0;
}
static int __all_sync(unsigned mask, int predicate, emulator::Site site = CALL_SITE) {
    return __ballot_sync(mask, predicate, site) == emulator::ALL;
}

// The value of lane `from`, or the lane's own value if `from` is in another part of `width` lanes.
template <class T> INLINE T shuffle(const char* operation, unsigned mask, T x, int from, int width,
                                    emulator::Site site) {
    check_mask(mask, site);
    auto slots = emulator::exchange(operation, site, x);
    int lane = emulator::current->lane, first = lane / width * width;
    return from < first || from >= first + width ? x : emulator::value_of<T>(slots, from);
}
#define LANE ((int)emulator::current->lane)
template <class T> INLINE T __shfl_sync(unsigned mask, T x, int from, int width = 32,
                                        emulator::Site site = CALL_SITE) {
    int first = LANE / width * width;
    return shuffle("__shfl_sync", mask, x, first + (from & (width - 1)), width, site);
}
template <class T> INLINE T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32,
                                            emulator::Site site = CALL_SITE) {
    return shuffle("__shfl_xor_sync", mask, x, LANE ^ bits, width, site);
}
template <class T> INLINE T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32,
                                             emulator::Site site = CALL_SITE) {
    return shuffle("__shfl_down_sync", mask, x, LANE + (int)by, width, site);
}
template <class T> INLINE T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32,
                                           emulator::Site site = CALL_SITE) {
    return shuffle("__shfl_up_sync", mask, x, LANE - (int)by, width, site);
}
#undef LANE

// Atomic, because a fiber yields only where it waits.
template <class T, class F> static T change(T* p, F f) {
    T old = *p;
    *p = f(old);
    return old;
}
template <class T> using Same = std::common_type_t<T>;  // excluded from the deduction of T
template <class T> static T atomicAdd(T* p, Same<T> x) {
    return change(p, [=](T old) { return old + x; });
}
template <class T> static T atomicMax(T* p, Same<T> x) {
    return change(p, [=](T old) { return old > x ? old : x; });
}
template <class T> static T atomicMin(T* p, Same<T> x) {
    return change(p, [=](T old) { return old < x ? old : x; });
}
template <class T> static T atomicExch(T* p, Same<T> x) {
    return change(p, [=](T) { return x; });
}
template <class T> static T atomicCAS(T* p, Same<T> expected, Same<T> x) {
    return change(p, [=](T old) { return old == expected ? x : old; });
}
static unsigned atomicInc(unsigned* p, unsigned last) {
    return change(p, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}
static void __threadfence() {}

template <class To, class From> static To cast_bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static float __uint_as_float(unsigned x) { return cast_bits<float>(x); }
static float __int_as_float(int x) { return cast_bits<float>(x); }
static unsigned __float_as_uint(float x) { return cast_bits<unsigned>(x); }
static int __float_as_int(float x) { return cast_bits<int>(x); }
static unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned __int128)a * b >> 64;
}
static int __clz(int x) { return x ? __builtin_clz(x) : 32; }
// The C library's functions of these names are slower.
static float larger(float a, float b) { return a > b || b != b ? a : b; }
static float smaller(float a, float b) { return a < b || b != b ? a : b; }
#define fmaxf larger
#define fminf smaller
#define __expf expf
static float rsqrtf(float x) { return 1 / sqrtf(x); }
template <class T> static T min(T a, Same<T> b) { return b < a ? b : a; }
template <class T> static T max(T a, Same<T> b) { return a < b ? b : a; }
