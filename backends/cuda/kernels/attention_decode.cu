// Attention of one new token per sequence, whose key and value also go into the cache.
//
// All that takes time is reading the keys and values before it, once. One sequence has fewer heads
// than the device has multiprocessors, so several blocks share a head ("flash decoding",
// https://crfm.stanford.edu/2023/10/12/flashdecoding.html): each finds, over its positions, the
// largest score m, the sum l of exp(score - m) and the sum of the values so weighted, and the block
// that comes last puts these together. How many blocks share follows from the position, which is
// read on the device: one launch serves every length, and a block that is not needed ends at once.
//
// A few lanes, 16 bytes each, hold a key: 8 lanes for 64 numbers of 16 bits. So a warp reads 512
// neighboring bytes at a time, and a lane asks for KEYS keys and values before it uses any. The
// warps of all the blocks take turns: no division is needed to give them equal parts.

namespace step {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int NUMBERS = PER_LOAD<CACHE>;
constexpr int VECTORS = HEAD / NUMBERS;  // of 16 bytes, in a key
constexpr int LANES =                    // to a key: a power of 2, so that some may idle
    VECTORS > 16 ? 32 : VECTORS > 8 ? 16 : VECTORS > 4 ? 8 : VECTORS > 2 ? 4 : VECTORS;
constexpr int LOADS = (VECTORS + LANES - 1) / LANES;  // of a lane, for each key
constexpr int MINE = LOADS * NUMBERS;                 // numbers of a key that a lane has
constexpr int WARP_KEYS = WARP / LANES;               // that a warp reads at a time
constexpr int KEYS = 4;
constexpr int SHARE = 64;       // fewer positions are not worth a block of their own
constexpr int PART = HEAD + 2;  // weighted values [HEAD], m, l
constexpr float LOWEST = -3.4e38f;
constexpr float LOG2_E = 1.4426950408889634f;

static_assert(HEAD % 8 == 0 && HEAD <= THREADS, "a head is 8, 16, ... 256 numbers wide");

// Where the numbers of a lane's load i < LOADS begin in a key; at HEAD or past it, the lane idles.
DEVICE int column(int i) { return (i * LANES + (int)threadIdx.x % LANES) * NUMBERS; }

// What the lanes of one key have seen; each has its numbers of the weighted values.
struct Seen {
    float m = LOWEST, l = 0.0f;
    float x[MINE] = {};

    DEVICE void rescale(float top) {
        const float factor = exp2_approx(m - top);
        m = top;
        l *= factor;
#pragma unroll
        for (int i = 0; i < MINE; i++) x[i] *= factor;
    }
};

DEVICE float sum_over_key(float x) {
#pragma unroll
    for (int lane = LANES / 2; lane; lane /= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}

// A row [HEAD] of the new token, zeros where the lane idles.
DEVICE void read(const REAL* row, float (&x)[MINE]) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        Several<REAL, NUMBERS> from = {};
        if (column(i) < HEAD) from = *(const Several<REAL, NUMBERS>*)(row + column(i));
#pragma unroll
        for (int j = 0; j < NUMBERS; j++) x[i * NUMBERS + j] = to_float(from.x[j]);
    }
}

// The new token, by one warp: its key and value go into the cache, rounded, and are seen as such.
DEVICE void see_new(
    const float (&q)[MINE], const REAL* k, const REAL* v, CACHE* key, CACHE* value, Seen& seen
) {
    const bool is_first = threadIdx.x % WARP < LANES;  // the other lanes do the same in vain
    float x[MINE], y[MINE], score = 0.0f;
    read(k, x);
    read(v, y);
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        Several<CACHE, NUMBERS> new_key, new_value;
#pragma unroll
        for (int j = 0; j < NUMBERS; j++) {
            const int n = i * NUMBERS + j;
            new_key.x[j] = from_float<CACHE>(x[n]);
            new_value.x[j] = from_float<CACHE>(y[n]);
            score += q[n] * to_float(new_key.x[j]);
            if (is_first) seen.x[n] = to_float(new_value.x[j]);
        }
        if (is_first && column(i) < HEAD) {
            *(Several<CACHE, NUMBERS>*)(key + column(i)) = new_key;
            *(Several<CACHE, NUMBERS>*)(value + column(i)) = new_value;
        }
    }
    score = sum_over_key(score);
    if (is_first) seen.m = score, seen.l = 1.0f;
}

// Cached positions `first` and on before `end`, KEYS for each group of lanes; first < end.
DEVICE void see(
    const float (&q)[MINE], const CACHE* keys, const CACHE* values, int first, int end, Seen& seen
) {
    first += threadIdx.x % WARP / LANES;
    Bytes16 key[KEYS][LOADS], value[KEYS][LOADS];
#pragma unroll
    for (int u = 0; u < KEYS; u++)
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            // Past an end, what is before it is read once more, and given no weight.
            const long long row = min(first + u * WARP_KEYS, end - 1);
            const long long at = row * HEAD + min(column(i), HEAD - NUMBERS);
            key[u][i] = load(keys + at);
            value[u][i] = load(values + at);
        }
    float score[KEYS], top = seen.m, x[NUMBERS];
#pragma unroll
    for (int u = 0; u < KEYS; u++) {
        score[u] = 0.0f;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            unpack(key[u][i], x, CACHE());
#pragma unroll
            for (int j = 0; j < NUMBERS; j++) score[u] += q[i * NUMBERS + j] * x[j];
        }
        score[u] = sum_over_key(score[u]);
        if (first + u * WARP_KEYS >= end) score[u] = LOWEST;
        top = fmaxf(top, score[u]);
    }
    seen.rescale(top);
#pragma unroll
    for (int u = 0; u < KEYS; u++) {
        const float weight = exp2_approx(score[u] - top);
        seen.l += weight;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            unpack(value[u][i], x, CACHE());
#pragma unroll
            for (int j = 0; j < NUMBERS; j++) seen.x[i * NUMBERS + j] += weight * x[j];
        }
    }
}

// N weighted values, from number `first` of this lane on, added up over the lanes with the same
// numbers of other keys -> part. Of two such lanes each goes on with one half of them.
template <int N, int OTHER = LANES>
DEVICE void add_up(float (&x)[MINE], int first, float* part) {
    if constexpr (OTHER < WARP) {
        constexpr int HALF = N / 2;
        const bool second = HALF && threadIdx.x & OTHER;
#pragma unroll
        for (int i = 0; i < N - HALF; i++) {
            const float a = x[i], b = x[i + HALF];
            x[i] = (second ? b : a) + __shfl_xor_sync(ALL_LANES, second ? a : b, OTHER);
        }
        add_up<N - HALF, 2 * OTHER>(x, second ? first + HALF : first, part);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int at = column(i / NUMBERS) + first + i % NUMBERS;
            if (at < HEAD) part[at] = x[i];
        }
    }
}

// What all lanes of a warp have seen, put together -> part [PART].
DEVICE void store(Seen& seen, float* part) {
    float top = seen.m;
#pragma unroll
    for (int other = LANES; other < WARP; other *= 2)
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, other));
    seen.rescale(top);
#pragma unroll
    for (int other = LANES; other < WARP; other *= 2)
        seen.l += __shfl_xor_sync(ALL_LANES, seen.l, other);
    if (threadIdx.x % WARP == 0) part[HEAD] = seen.m, part[HEAD + 1] = seen.l;
    add_up<MINE>(seen.x, 0, part);
}

struct Merged { float m, l, x; };

// Parts [n, PART] put together, n <= 32; thread d < HEAD gets number d of the weighted values.
DEVICE Merged merge(const float* parts, int n) {
    const int lane = threadIdx.x % WARP, d = threadIdx.x < HEAD ? threadIdx.x : 0;
    const float m = lane < n ? parts[lane * PART + HEAD] : LOWEST;
    const float l = lane < n ? parts[lane * PART + HEAD + 1] : 0.0f;
    const float top = warp_max(m), weight = exp2_approx(m - top);
    Merged whole = {top, warp_sum(weight * l), 0.0f};
#pragma unroll 8
    for (int i = 0; i < n; i++)
        whole.x += __shfl_sync(ALL_LANES, weight, i) * parts[i * PART + d];
    return whole;
}

}  // namespace step

// qkv [B, 3C] -> out [B, C]. Grid (at most 32 blocks to share a head, H, B), block 256.
// caches: where the keys of each layer lie, [n_layer], where its values do, then S; both are
// [B, H, S, D]. index [B]: the position of the new token, which sees those before it and itself.
// partial [B, H, gridDim.x, D + 2] is room for what the blocks pass on, null if gridDim.x is 1;
// arrived [B, H] counts them: zeros before a launch and after it.
extern "C" __global__ void __launch_bounds__(step::THREADS) attend_step(
    const REAL* qkv, const long long* caches, int layer, int n_layer, const long long* index,
    float scale, float* partial, unsigned* arrived, REAL* out, int H
) {
    using namespace step;
    __shared__ float parts[WARPS * PART];
    __shared__ bool is_last;
    const int warp = threadIdx.x / WARP, d = threadIdx.x;
    const int share = blockIdx.x, h = blockIdx.y, b = blockIdx.z, C = H * HEAD;
    const long long pair = (long long)b * H + h;
    const REAL* row = qkv + (long long)b * 3 * C + h * HEAD;

    let_next_start();
    const long long head = pair * caches[2 * n_layer] * HEAD;  // [S, D] of this sequence and head
    CACHE* keys = (CACHE*)caches[layer] + head;
    CACHE* values = (CACHE*)caches[n_layer + layer] + head;
    wait_for_previous();  // no kernel writes where the cache lies
    const int p = (int)index[b];
    float q[MINE];
    read(row, q);
#pragma unroll
    for (int i = 0; i < MINE; i++) q[i] *= scale * LOG2_E;  // for powers of 2

    const int n_blocks = p <= 2 * SHARE ? 1 : min((p + SHARE - 1) / SHARE, (int)gridDim.x);
    if (share >= n_blocks) return;  // the whole block
    Seen seen;
    // The last warp: it has the fewest positions. Nobody reads this one from the cache meanwhile.
    if (share == 0 && warp == WARPS - 1) {
        const long long at = (long long)p * HEAD;
        see_new(q, row + C, row + 2 * C, keys + at, values + at, seen);
    }
    constexpr int N = WARP_KEYS * KEYS;
    for (int first = (warp * n_blocks + share) * N; first < p; first += WARPS * n_blocks * N)
        see(q, keys, values, first, p, seen);
    store(seen, parts + warp * PART);
    __syncthreads();
    Merged whole = merge(parts, WARPS);

    if (n_blocks > 1) {
        float* all = partial + pair * gridDim.x * PART;
        float* mine = all + share * PART;
        if (d < HEAD) mine[d] = whole.x;
        if (d == 0) mine[HEAD] = whole.m, mine[HEAD + 1] = whole.l;
        __syncthreads();
        if (d == 0) is_last = (int)arrive(&arrived[pair], n_blocks) == n_blocks - 1;
        __syncthreads();
        if (!is_last) return;
        whole = merge(all, n_blocks);
    }
    if (d < HEAD)
        out[(long long)b * C + h * HEAD + d] = from_float<REAL>(whole.x / whole.l);
}
