// PTX instructions as C++ functions of the same names; `ptx_translator.py` writes calls of them.
//
// They follow the PTX manual, in float32 with subnormals flushed to zero (.ftz, CuPy's option).
// Instructions that approximate on a GPU are exact here.

using u64 = unsigned long long;  // the kernels' name
using s64 = long long;
using b64 = u64;
using u32 = unsigned;
using s32 = int;
using b32 = u32;
using u16 = unsigned short;
using s16 = short;
using b16 = u16;
using u8 = unsigned char;
using s8 = signed char;
using f64 = double;
using f32 = float;
using f16 = half_t;
using bf16 = bf16_t;
struct f16x2;  // two numbers in a register
struct bf16x2;
using pred = bool;

// Read a register or a constant as type T: its bits, or the lower ones.
template <class T, class R> inline T as(R x) {
    if constexpr (sizeof(T) == sizeof(R)) {
        return cast_bits<T>(x);
    } else {
        static_assert(std::is_integral_v<T> && std::is_integral_v<R> && sizeof(T) < sizeof(R));
        return (T)x;
    }
}

// Write a register: the same bits, or a narrower integer, extended by the rule of its type.
template <class R, class T> inline void put(R& to, T x) {
    if constexpr (sizeof(R) == sizeof(T)) {
        to = cast_bits<R>(x);
    } else {
        static_assert(std::is_integral_v<T> && std::is_integral_v<R> && sizeof(T) < sizeof(R));
        to = (R)x;
    }
}

// Arithmetic. Integers wrap around.
template <class T> constexpr bool IS_INTEGER = std::is_integral_v<T>;
inline float ftz(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
inline double ftz(double x) { return x; }

#define ARITHMETIC(name, sign)                                                            \
    template <class T> inline T name(T a, T b) {                                          \
        if constexpr (IS_INTEGER<T>) return (T)((u64)a sign (u64)b);                      \
        else return ftz(ftz(a) sign ftz(b));                                              \
    }
ARITHMETIC(add_, +)
ARITHMETIC(sub_, -)
ARITHMETIC(mul_, *)
template <class T> inline T mul_lo_(T a, T b) { return mul_(a, b); }
template <class T> inline T mad_lo_(T a, T b, T c) { return add_(mul_(a, b), c); }
template <class T> inline auto mul_wide_(T a, T b) {
    using Signed = std::conditional_t<sizeof(T) == 2, s32, s64>;
    using Wide = std::conditional_t<std::is_signed_v<T>, Signed, std::make_unsigned_t<Signed>>;
    return (Wide)((Wide)a * (Wide)b);
}
template <class T> inline T mul_hi_(T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return (T)((Wide)a * (Wide)b >> 8 * sizeof(T));
}
template <class T> inline T div_(T a, T b) {
    if constexpr (IS_INTEGER<T>) return a / b;
    else return ftz(ftz(a) / ftz(b));
}
template <class T> inline T rem_(T a, T b) { return a % b; }
template <class T> inline T neg_(T a) {
    if constexpr (IS_INTEGER<T>) return (T)(0 - (u64)a);
    else return -ftz(a);
}
template <class T> inline T abs_(T a) {
    if constexpr (IS_INTEGER<T>) return a < 0 ? neg_(a) : a;
    else return std::fabs(ftz(a));
}
template <class T> inline T min_(T a, T b) {
    if constexpr (IS_INTEGER<T>) return b < a ? b : a;
    else return ftz(std::fmin(a, b));
}
template <class T> inline T max_(T a, T b) {
    if constexpr (IS_INTEGER<T>) return a < b ? b : a;
    else return ftz(std::fmax(a, b));
}
template <class T> inline T fma_(T a, T b, T c) { return ftz(std::fma(ftz(a), ftz(b), ftz(c))); }
template <class T> inline T fma_rm_(T a, T b, T c) {  // rounded down
    const long double exact = (long double)a * b + c;
    const T y = (T)exact;
    return y > exact ? std::nextafter(y, -INFINITY) : y;
}
template <class T> inline T copysign_(T sign, T x) { return std::copysign(x, sign); }
template <class T> inline T rcp_(T x) { return ftz(1 / ftz(x)); }
template <class T> inline T sqrt_(T x) { return ftz(std::sqrt(ftz(x))); }
template <class T> inline T rsqrt_(T x) { return ftz(1 / std::sqrt(ftz(x))); }
template <class T> inline T ex2_(T x) { return ftz(std::exp2(ftz(x))); }

// Bits
template <class T> inline T and_(T a, T b) { return a & b; }
template <class T> inline T or_(T a, T b) { return a | b; }
template <class T> inline T xor_(T a, T b) { return a ^ b; }
template <class T> inline T not_(T a) { return std::is_same_v<T, bool> ? !a : (T)~a; }
template <class T> inline T shl_(T a, u32 by) { return by < 8 * sizeof a ? (T)((u64)a << by) : 0; }
template <class T> inline T shr_(T a, u32 by) {
    const u32 last = 8 * sizeof a - 1;
    return by <= last ? a >> by : a >> last >> 1;
}
template <class T> inline T bfi_(T from, T to, u32 first, u32 length) {
    const T ones = shl_<T>(length < 8 * sizeof to ? shl_<T>(1, length) - 1 : ~(T)0, first);
    return (to & ~ones) | (shl_(from, first) & ones);
}
template <class T> inline T prmt_(T a, T b, T selector) {  // select bytes of a and b
    const u64 both = a | (u64)b << 32;
    T y = 0;
    for (int i = 0; i < 4; i++) {
        const u32 number = selector >> 4 * i & 15, byte = both >> 8 * (number & 7) & 255;
        y |= (number & 8 ? byte >> 7 ? 255u : 0 : byte) << 8 * i;  // 8 and above: the sign
    }
    return y;
}
template <class T> inline u32 clz_(T a) { return __clz(a); }
template <class T> inline auto join(T low, T high) {
    return cast_bits<std::conditional_t<sizeof(T) == 2, u32, u64>>(std::array{low, high});
}
template <class T, class R> inline void split(T& low, T& high, R x) {
    const auto both = cast_bits<std::array<T, 2>>(x);
    low = both[0], high = both[1];
}

// Comparisons: false for a NaN; true if the name ends in u (unordered).
#define COMPARISON(name, sign)                                               \
    template <class T> inline bool name##_(T a, T b) {                       \
        if constexpr (IS_INTEGER<T>) return a sign b;                        \
        else return !std::isunordered(a, b) && ftz(a) sign ftz(b);           \
    }                                                                        \
    template <class T> inline bool name##u_(T a, T b) {                      \
        return std::isunordered(a, b) || name##_(a, b);                      \
    }
COMPARISON(eq, ==)
COMPARISON(ne, !=)
COMPARISON(lt, <)
COMPARISON(le, <=)
COMPARISON(gt, >)
COMPARISON(ge, >=)

// Conversions
template <class To, class From> inline To cvt(From x) {
    if constexpr (std::is_class_v<From>) return to_float(x);
    else return (To)x;
}
template <class To, class From> inline To cvt_rn(From x) {
    if constexpr (std::is_class_v<To>) return from_float<To>(x);
    else return (To)x;
}
template <class To, class From> inline u32 cvt_rn(From high, From low) {
    return pack<std::conditional_t<std::is_same_v<To, f16x2>, f16, bf16>>(low, high);
}
template <class To, class From> inline To cvt_rpi(From x) { return (To)std::ceil(x); }
template <class To, class From> inline To cvt_rzi(From x) {  // saturates; a NaN becomes 0
    using Limits = std::numeric_limits<To>;
    if (std::isnan(x)) return 0;
    if (x <= (From)Limits::min()) return Limits::min();
    return x >= (From)Limits::max() ? Limits::max() : (To)x;
}
template <class To, class From> inline To cvt_sat(From x) { return x > 0 ? x < 1 ? ftz(x) : 1 : 0; }

// Addresses. Shared memory has 32-bit addresses: dynamic memory begins at 0, static memory at
// STATIC. Global and generic addresses are addresses of the CPU.
extern "C" unsigned char __start_static_shared[] __attribute__((weak, visibility("hidden")));
constexpr u32 STATIC = 1 << 24;
inline u32 address_of_shared(const void* p) {
    const u64 offset = (u64)p - (u64)emulator::dynamic_shared;
    return offset < STATIC ? offset : STATIC + ((u64)p - (u64)__start_static_shared);
}
inline unsigned char* place_shared(u32 address) {
    return address < STATIC ? emulator::dynamic_shared + address
                            : __start_static_shared + (address - STATIC);
}
inline unsigned char* place_global(u64 address) { return (unsigned char*)address; }
inline unsigned char* place_generic(u64 address) { return (unsigned char*)address; }
inline u64 cvta_shared(u64 address) { return (u64)place_shared(address); }
inline u64 cvta_to_shared(u64 address) { return address_of_shared(place_generic(address)); }
inline u64 cvta_to_global(u64 address) { return address; }

// The place of an access, after its checks.
static unsigned char* at_shared(u32 address, unsigned n_bytes, races::Kind kind,
                                emulator::Site site) {
    unsigned char* p = place_shared(address);
    if (address % n_bytes) emulator::fail(site, "%p is no multiple of %u", p, n_bytes);
    races::check_shared_access(address, n_bytes, kind, p, site);
    return p;
}
static unsigned char* at_global(u64 address, unsigned n_bytes, races::Kind kind,
                                emulator::Site site) {
    unsigned char* p = place_global(address);
    if (address % n_bytes) emulator::fail(site, "%p is no multiple of %u", p, n_bytes);
    if (emulator::is_shared(p)) emulator::fail(site, "%p is in shared memory", p);
    races::check_global_access(p, n_bytes, kind, site);
    return p;
}
static unsigned char* at_generic(u64 address, unsigned n_bytes, races::Kind kind,
                                 emulator::Site site) {
    return emulator::is_shared(place_generic(address))
               ? at_shared(cvta_to_shared(address), n_bytes, kind, site)
               : at_global(address, n_bytes, kind, site);
}

// A store of the value that memory already holds is no race, so it is not reported as a write.
#define ACCESS(space, Address)                                                           \
    template <class T, int N>                                                            \
    void load_##space(Address address, T (&v)[N], emulator::Site site) {                 \
        memcpy(v, at_##space(address, sizeof v, races::READ, site), sizeof v);           \
    }                                                                                    \
    template <class T, int N>                                                            \
    void store_##space(Address address, const T (&v)[N], emulator::Site site) {          \
        void* p = place_##space(address);                                                \
        if (address % sizeof v || memcmp(p, v, sizeof v))                                \
            at_##space(address, sizeof v, races::WRITE, site);                           \
        memcpy(p, v, sizeof v);                                                          \
    }
ACCESS(shared, u32)
ACCESS(global, u64)
ACCESS(generic, u64)
template <class T> inline T atom_add(T* p, T x) { return atomicAdd(p, x); }
template <class T> inline T atom_max(T* p, T x) { return atomicMax(p, x); }
template <class T> inline T atom_inc(T* p, T x) { return atomicInc(p, x); }

// An asynchronous copy may write at any time from its start until the wait for it.
static void copy(u32 to, u64 from, u32 n_bytes, u32 n_source_bytes, emulator::Site site) {
    unsigned char* p = at_shared(to, n_bytes, races::WRITE, site);
    const void* q = n_source_bytes ? at_global(from, n_bytes, races::READ, site) : nullptr;
    if (n_source_bytes && n_source_bytes != n_bytes)
        emulator::fail(site, "a copy of %u bytes of %u", n_source_bytes, n_bytes);
    defer_copy(p, q, n_bytes, n_source_bytes, site);
}
template <int N> void wait_for_copies(emulator::Site site) {
    const emulator::Fiber& fiber = *emulator::current;
    for (int i = 0; i < fiber.n_copies && fiber.copies[i].group < fiber.n_groups - N; i++) {
        const emulator::Copy& copy = fiber.copies[i];
        at_shared(address_of_shared(copy.to), copy.n_bytes, races::WRITE, site);
    }
    copy_async_wait<N>();
}

template <class Load> void load_matrix(Load load, unsigned (&x)[4], u32 row, emulator::Site site) {
    load(x, at_shared(row, 16, races::READ, site), site);
}

// The value of another lane, or of the lane itself if the other is in another part of the warp.
// `limits`: the last lane; bits 8 to 12 mask the bits of a lane's number that select its part.
#define SHUFFLE(mode, other, is_in_part)                                                       \
    inline void shfl_##mode(emulator::Site site, u32 x, u32 by, u32 limits, u32 mask, u32& to, \
                            bool& in_range) {                                                  \
        check_mask(mask, site);                                                                \
        auto slots = emulator::exchange("shfl." #mode, site, x);                               \
        const int lane = emulator::current->lane, part = limits >> 8 & 31;                     \
        const int first = lane & part, last = first | (limits & 31 & ~part), from = other;     \
        in_range = is_in_part;                                                                 \
        to = emulator::value_of<u32>(slots, in_range ? from : lane);                           \
    }                                                                                          \
    inline void shfl_##mode(emulator::Site site, u32 x, u32 by, u32 limits, u32 mask,          \
                            u32& to) {                                                         \
        bool in_range;                                                                         \
        shfl_##mode(site, x, by, limits, mask, to, in_range);                                  \
    }
SHUFFLE(bfly, lane ^ (int)by, from <= last)
SHUFFLE(idx, first | ((int)by & 31 & ~part), from <= last)
SHUFFLE(down, lane + (int)by, from <= last)
SHUFFLE(up, lane - (int)by, from >= last)

inline u32 vote_ballot(emulator::Site site, bool p, u32 mask) {
    return __ballot_sync(mask, p, site);
}
inline bool vote_any(emulator::Site site, bool p, u32 mask) { return __any_sync(mask, p, site); }
inline bool vote_all(emulator::Site site, bool p, u32 mask) { return __all_sync(mask, p, site); }
