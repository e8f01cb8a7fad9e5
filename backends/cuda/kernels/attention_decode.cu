// Attention of one new token per sequence; it also writes the token's key and value to the cache.
//
// Reading the cached keys and values once takes nearly all the time. One sequence has fewer heads
// than the device has multiprocessors, so several blocks split the positions of a head ("flash
// decoding", https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Each block computes the
// largest score m, the sum l of exp(score - m) and the weighted sum of values over its positions.
// The last block to finish combines these. The number of active blocks depends on the position,
// which the kernel reads on the device: one launch serves every length, and an inactive block ends
// immediately.
//
// A group of lanes holds a key, 16 bytes a lane: 8 lanes for 64 numbers of 16 bits. Thus a warp
// reads 512 consecutive bytes at a time. A lane loads KEYS keys and values before it uses the first.
// Chunks of positions are distributed round robin over the warps of all blocks.

namespace decode {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int NUMBERS = ELEMENTS_PER_LOAD<CACHE>;
constexpr int VECTORS = HEAD / NUMBERS;  // of 16 bytes in a key
constexpr int LANES =                    // of a key: a power of 2, so some lanes may idle
    VECTORS > 16 ? 32 : VECTORS > 8 ? 16 : VECTORS > 4 ? 8 : VECTORS > 2 ? 4 : VECTORS;
constexpr int LOADS = (VECTORS + LANES - 1) / LANES;  // of a lane for each key
constexpr int LANE_NUMBERS = LOADS * NUMBERS;         // numbers of a key in one lane
constexpr int WARP_KEYS = WARP / LANES;               // keys that a warp reads at a time
constexpr int KEYS = 4;                               // in flight in a lane
constexpr int MIN_SPLIT_POSITIONS = 64;  // of a block, as in attention.py
constexpr int PARTIAL = HEAD + 2;        // numbers: weighted values [HEAD], m, l
constexpr float LOWEST = -3.4e38f;
constexpr float LOG2_E = 1.4426950408889634f;

static_assert(HEAD % 8 == 0 && HEAD <= THREADS, "a head is 8, 16, ... 256 numbers wide");

// The first element of a lane's load i < LOADS in a key; at HEAD or above, the lane idles.
DEVICE int column(int i) { return (i * LANES + (int)threadIdx.x % LANES) * NUMBERS; }

// State of the online softmax of one group of lanes; a lane has its elements of the weighted
// values.
struct OnlineSoftmax {
    float m = LOWEST, l = 0.0f;
    float x[LANE_NUMBERS] = {};

    DEVICE void rescale(float top) {
        const float factor = exp2_approx(m - top);
        m = top;
        l *= factor;
#pragma unroll
        for (int i = 0; i < LANE_NUMBERS; i++) x[i] *= factor;
    }
};

DEVICE float sum_over_key(float x) {
#pragma unroll
    for (int lane = LANES / 2; lane; lane /= 2) x += __shfl_xor_sync(FULL_MASK, x, lane);
    return x;
}

// Read a row [HEAD] of the new token; zeros where the lane idles.
DEVICE void read_row(const REAL* row, float (&x)[LANE_NUMBERS]) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        Vec<REAL, NUMBERS> from = {};
        if (column(i) < HEAD) from = *(const Vec<REAL, NUMBERS>*)(row + column(i));
#pragma unroll
        for (int j = 0; j < NUMBERS; j++) x[i * NUMBERS + j] = to_float(from.x[j]);
    }
}

// Attend to the new token, by one warp: write its key and value, rounded, to the cache; use these.
DEVICE void attend_new(
    const float (&q)[LANE_NUMBERS], const REAL* k, const REAL* v, CACHE* key, CACHE* value,
    OnlineSoftmax& state
) {
    const bool is_first = threadIdx.x % WARP < LANES;  // the other groups compute the same, unused
    float x[LANE_NUMBERS], y[LANE_NUMBERS], score = 0.0f;
    read_row(k, x);
    read_row(v, y);
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        Vec<CACHE, NUMBERS> new_key, new_value;
#pragma unroll
        for (int j = 0; j < NUMBERS; j++) {
            const int n = i * NUMBERS + j;
            new_key.x[j] = from_float<CACHE>(x[n]);
            new_value.x[j] = from_float<CACHE>(y[n]);
            score += q[n] * to_float(new_key.x[j]);
            if (is_first) state.x[n] = to_float(new_value.x[j]);
        }
        if (is_first && column(i) < HEAD) {
            *(Vec<CACHE, NUMBERS>*)(key + column(i)) = new_key;
            *(Vec<CACHE, NUMBERS>*)(value + column(i)) = new_value;
        }
    }
    score = sum_over_key(score);
    if (is_first) state.m = score, state.l = 1.0f;
}

// Attend to cached positions from `first` to before `end`, KEYS for each group; first < end.
DEVICE void attend_cached(
    const float (&q)[LANE_NUMBERS], const CACHE* keys, const CACHE* values, int first, int end,
    OnlineSoftmax& state
) {
    first += threadIdx.x % WARP / LANES;
    Bytes16 key[KEYS][LOADS], value[KEYS][LOADS];
#pragma unroll
    for (int u = 0; u < KEYS; u++)
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            // Past an end, read the last valid element again; its weight is 0.
            const long long row = min(first + u * WARP_KEYS, end - 1);
            const long long at = row * HEAD + min(column(i), HEAD - NUMBERS);
            key[u][i] = load(keys + at);
            value[u][i] = load(values + at);
        }
    float score[KEYS], top = state.m, x[NUMBERS];
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
    state.rescale(top);
#pragma unroll
    for (int u = 0; u < KEYS; u++) {
        const float weight = exp2_approx(score[u] - top);
        state.l += weight;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            unpack(value[u][i], x, CACHE());
#pragma unroll
            for (int j = 0; j < NUMBERS; j++) state.x[i * NUMBERS + j] += weight * x[j];
        }
    }
}

// Add N weighted values, from element `first` of this lane, over the groups of the warp -> partial.
// At each step, two lanes exchange halves: each continues with the sums of one half.
template <int N, int OTHER = LANES>
DEVICE void sum_over_groups(float (&x)[LANE_NUMBERS], int first, float* partial) {
    if constexpr (OTHER < WARP) {
        constexpr int HALF = N / 2;
        const bool second = HALF && threadIdx.x & OTHER;
#pragma unroll
        for (int i = 0; i < N - HALF; i++) {
            const float a = x[i], b = x[i + HALF];
            x[i] = (second ? b : a) + __shfl_xor_sync(FULL_MASK, second ? a : b, OTHER);
        }
        sum_over_groups<N - HALF, 2 * OTHER>(x, second ? first + HALF : first, partial);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int at = column(i / NUMBERS) + first + i % NUMBERS;
            if (at < HEAD) partial[at] = x[i];
        }
    }
}

// Combine the states of a warp's groups -> partial [PARTIAL].
DEVICE void store_partial(OnlineSoftmax& state, float* partial) {
    float top = state.m;
#pragma unroll
    for (int other = LANES; other < WARP; other *= 2)
        top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, other));
    state.rescale(top);
#pragma unroll
    for (int other = LANES; other < WARP; other *= 2)
        state.l += __shfl_xor_sync(FULL_MASK, state.l, other);
    if (threadIdx.x % WARP == 0) partial[HEAD] = state.m, partial[HEAD + 1] = state.l;
    sum_over_groups<LANE_NUMBERS>(state.x, 0, partial);
}

struct Combined { float m, l, x; };

// Combine partials [n, PARTIAL], n <= 32; thread d < HEAD gets element d of the weighted values.
DEVICE Combined combine(const float* partials, int n) {
    const int lane = threadIdx.x % WARP, d = threadIdx.x < HEAD ? threadIdx.x : 0;
    const float m = lane < n ? partials[lane * PARTIAL + HEAD] : LOWEST;
    const float l = lane < n ? partials[lane * PARTIAL + HEAD + 1] : 0.0f;
    const float top = warp_max(m), weight = exp2_approx(m - top);
    Combined result = {top, warp_sum(weight * l), 0.0f};
#pragma unroll 8
    for (int i = 0; i < n; i++)
        result.x += __shfl_sync(FULL_MASK, weight, i) * partials[i * PARTIAL + d];
    return result;
}

}  // namespace decode

// qkv [B, 3C] -> out [B, C]. Grid (splits of a head, at most 32; H; B), block 256.
// caches: addresses of the keys of each layer, [n_layer], and of the values, [n_layer]; then S; then
// the slot of each sequence, [B]. Keys and values of a layer are [slots, H, S, D].
// index [B]: position of the new token, which attends to all positions up to that.
// partial [B, H, gridDim.x, D + 2]: workspace for the results of the splits.
// arrived [B, H]: zeros before and after a launch.
extern "C" __global__ void __launch_bounds__(decode::THREADS) attention_decode(
    const REAL* qkv, const long long* caches, int layer, int n_layer, const long long* index,
    float scale, float* partial, unsigned* arrived, REAL* out, int H
) {
    using namespace decode;
    __shared__ float partials[WARPS * PARTIAL];
    __shared__ bool is_last;
    const int warp = threadIdx.x / WARP, d = threadIdx.x;
    const int split = blockIdx.x, h = blockIdx.y, b = blockIdx.z, C = H * HEAD;
    const long long pair = (long long)b * H + h;
    const REAL* row = qkv + (long long)b * 3 * C + h * HEAD;

    trigger_dependent_launch();
    const long long S = caches[2 * n_layer], slot = caches[2 * n_layer + 1 + b];
    const long long head = (slot * H + h) * S * HEAD;  // [S, D] of this sequence and head
    CACHE* keys = (CACHE*)caches[layer] + head;
    CACHE* values = (CACHE*)caches[n_layer + layer] + head;
    grid_dependency_sync();  // after the loads: no kernel writes `caches`
    const int p = (int)index[b];
    float q[LANE_NUMBERS];
    read_row(row, q);
#pragma unroll
    for (int i = 0; i < LANE_NUMBERS; i++) q[i] *= scale * LOG2_E;  // exp2 is used for exp

    constexpr int MIN = MIN_SPLIT_POSITIONS;
    const int n_blocks = p <= 2 * MIN ? 1 : min((p + MIN - 1) / MIN, (int)gridDim.x);
    if (split >= n_blocks) return;  // the whole block
    OnlineSoftmax state;
    // The last warp has the fewest positions. No thread reads this position from the cache.
    if (split == 0 && warp == WARPS - 1) {
        const long long at = (long long)p * HEAD;
        attend_new(q, row + C, row + 2 * C, keys + at, values + at, state);
    }
    constexpr int N = WARP_KEYS * KEYS;
    for (int first = (warp * n_blocks + split) * N; first < p; first += WARPS * n_blocks * N)
        attend_cached(q, keys, values, first, p, state);
    store_partial(state, partials + warp * PARTIAL);
    __syncthreads();
    Combined result = combine(partials, WARPS);

    if (n_blocks > 1) {
        float* all = partial + pair * gridDim.x * PARTIAL;
        float* mine = all + split * PARTIAL;
        if (d < HEAD) mine[d] = result.x;
        if (d == 0) mine[HEAD] = result.m, mine[HEAD + 1] = result.l;
        __syncthreads();
        if (d == 0) is_last = (int)arrive(&arrived[pair], n_blocks) == n_blocks - 1;
        __syncthreads();
        if (!is_last) return;
        result = combine(all, n_blocks);
    }
    if (d < HEAD)
        out[(long long)b * C + h * HEAD + d] = from_float<REAL>(result.x / result.l);
}
