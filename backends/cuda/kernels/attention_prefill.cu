// Attention of several new tokens per sequence over the cache (prefill), after `update_kv` has
// written their keys and values.
//
// A block computes 64 queries of one head. It iterates over tiles of 64 positions, up to the last
// position that one of its queries attends to; scores stay on the multiprocessor
// ("FlashAttention-2", https://arxiv.org/abs/2307.08691). For each query it keeps the largest score
// m, the sum l of exp(score - m) and the weighted sum of values, and rescales both sums when m
// grows.
//
// If activations and cache have the same 16-bit type, tensor cores multiply: 4 warps have 16
// queries each, with all operands in registers, and load the next tile during the work on the
// current one. Two such groups of warps alternate between tiles, and combine their results at the
// end, because the blocks with the most tiles determine the kernel's time. For other types,
// products are in float32: a thread has 8 queries and every 16th position.
//
// The last queries of a sequence have the most positions, so their blocks are launched first.

namespace prefill {

template <class X, class K> constexpr bool USE_MMA = false;
template <> constexpr bool USE_MMA<half_t, half_t> = true;
template <> constexpr bool USE_MMA<bf16_t, bf16_t> = true;

constexpr int GROUP_THREADS = 128;
constexpr int GROUPS = USE_MMA<REAL, CACHE> && HEAD <= 128 ? 2 : 1;  // by shared memory
constexpr int THREADS = GROUPS * GROUP_THREADS;
constexpr int TILE = 64;
constexpr float LOWEST = -3.4e38f;
constexpr float LOG2_E = 1.4426950408889634f;

static_assert(HEAD % 8 == 0 && HEAD <= 256, "a head is 8, 16, ... 256 numbers wide");

// The queries of a block. Row r of its tile is token `token(r)` of all B·T tokens.
struct QueryTile {
    int first, T;       // token of the first row; rows past T repeat the last token
    long long before;   // tokens of earlier sequences
    const long long* index;

    DEVICE QueryTile(const long long* index, int T)
        : first((int)(gridDim.y - 1 - blockIdx.y) * TILE), T(T),
          before((long long)blockIdx.z * T), index(index) {}
    DEVICE bool has(int row) const { return first + row < T; }
    DEVICE long long token(int row) const { return before + min(first + row, T - 1); }
    DEVICE int position(int row) const { return (int)index[token(row)]; }
};

// With tensor cores. A tile in shared memory is [TILE, STRIDE].
constexpr int WIDTH = (HEAD + 15) / 16 * 16;
constexpr int STRIDE = WIDTH + 8;

static_assert(STRIDE / 8 % 2, "an odd number of 16 bytes: 8 rows are in different banks");

// Copy rows [n_rows, HEAD] to a tile asynchronously, zeros past both ends; by a group of warps.
template <class X> DEVICE void copy_tile(X* tile, const X* rows, int n_rows) {
    constexpr int VECTORS = WIDTH / 8;
#pragma unroll
    for (int i = 0; i < TILE * VECTORS / GROUP_THREADS; i++) {
        const int vector = i * GROUP_THREADS + threadIdx.x % GROUP_THREADS;
        const int row = vector / VECTORS, column = vector % VECTORS * 8;
        const bool valid = row < n_rows && column < HEAD;
        copy_async(tile + row * STRIDE + column, rows + (valid ? row * HEAD + column : 0), valid);
    }
}

// Compute the scores s of 16 queries, TILE / 8 tiles [16, 8]. q: WIDTH / 16 tiles [16, 16].
template <class X>
DEVICE void compute_scores(
    float (&s)[TILE / 8][4], const unsigned (&q)[WIDTH / 16][4], const X* keys
) {
    const int lane = threadIdx.x % WARP;
    const X* row = keys + (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < TILE / 16; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) s[2 * n][i] = s[2 * n + 1][i] = 0.0f;
#pragma unroll
        for (int k = 0; k < WIDTH / 16; k++) {
            unsigned x[4];  // 16 keys, 16 numbers of each
            ldmatrix(x, row + n * 16 * STRIDE + k * 16);
            mma(s[2 * n], q[k], {x[0], x[1]}, X());
            mma(s[2 * n + 1], q[k], {x[2], x[3]}, X());
        }
    }
}

// y [WIDTH / 8] tiles [16, 8] += weights s times the values.
template <class X>
DEVICE void add_values(float (&y)[WIDTH / 8][4], const float (&s)[TILE / 8][4], const X* values) {
    const int lane = threadIdx.x % WARP;
    const X* row = values + (lane / 8 % 2 * 8 + lane % 8) * STRIDE + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
        const auto& a = s[2 * k];
        const auto& b = s[2 * k + 1];
        const unsigned weights[4] = {
            pack<X>(a[0], a[1]), pack<X>(a[2], a[3]), pack<X>(b[0], b[1]), pack<X>(b[2], b[3])
        };
#pragma unroll
        for (int n = 0; n < WIDTH / 16; n++) {
            unsigned x[4];  // 16 positions, 16 numbers of each
            ldmatrix_transposed(x, row + k * 16 * STRIDE + n * 16);
            mma(y[2 * n], weights, {x[0], x[1]}, X());
            mma(y[2 * n + 1], weights, {x[2], x[3]}, X());
        }
    }
}

// Reductions over the four lanes that have elements of the same query.
DEVICE float max_of_4(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 2));
}
DEVICE float sum_of_4(float x) {
    x += __shfl_xor_sync(FULL_MASK, x, 1);
    return x + __shfl_xor_sync(FULL_MASK, x, 2);
}

// State of the online softmax of two queries in a thread. The initial m exceeds LOWEST, the score
// of a masked position, because all positions of a tile may be masked for a query.
struct OnlineSoftmax {
    float y[WIDTH / 8][4] = {}, m[2] = {0.1f * LOWEST, 0.1f * LOWEST}, l[2] = {};

    DEVICE void rescale(int half, float top, float scale) {
        const float factor = exp2_approx((m[half] - top) * scale);
        m[half] = top;
        l[half] *= factor;
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n++) {
            y[n][2 * half] *= factor;
            y[n][2 * half + 1] *= factor;
        }
    }
    // Add the state of the other group's thread with the same queries and columns.
    DEVICE void add(OnlineSoftmax& other, float scale) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float top = fmaxf(m[half], other.m[half]);
            rescale(half, top, scale);
            other.rescale(half, top, scale);
            l[half] += other.l[half];
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n++) {
                y[n][2 * half] += other.y[n][2 * half];
                y[n][2 * half + 1] += other.y[n][2 * half + 1];
            }
        }
    }
};

// qkv: the first token's row, at this head. keys, values [S, HEAD]. A lane has queries lane / 4 and
// lane / 4 + 8 of the 16 of its warp, and the columns of each by the layout of `mma`.
template <class X>
DEVICE void attend_with_mma(
    const X* qkv, const X* keys, const X* values, const QueryTile& query_tile, float scale,
    X* out, int C
) {
    DYNAMIC_SHARED(shared);
    const int group = threadIdx.x / GROUP_THREADS, thread = threadIdx.x % GROUP_THREADS;
    // [2, keys and values, TILE, STRIDE] of each group: double buffering.
    X* tiles = (X*)shared + group * (4 * TILE * STRIDE);
    const int row = thread / WARP * 16 + threadIdx.x % WARP / 4;
    const int column = threadIdx.x % 4 * 2;
    const int lowest = query_tile.position(0), n_positions = query_tile.position(TILE - 1) + 1;
    const int positions[2] = {query_tile.position(row), query_tile.position(row + 8)};

    const int n_steps = (n_positions + GROUPS * TILE - 1) / (GROUPS * TILE);
    const auto pair = [&](int step) { return tiles + step % 2 * (2 * TILE * STRIDE); };
    const auto start_copy = [&](int step) {
        const int first = (step * GROUPS + group) * TILE;
        if (step < n_steps && first < n_positions) {
            const int n = n_positions - first;
            copy_tile(pair(step), keys + (long long)first * HEAD, n);
            copy_tile(pair(step) + TILE * STRIDE, values + (long long)first * HEAD, n);
        }
        copy_async_commit();
    };
    start_copy(0);
    unsigned q[WIDTH / 16][4];
#pragma unroll
    for (int k = 0; k < WIDTH / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int d = k * 16 + i / 2 * 8 + column;
            const X* query = qkv + query_tile.token(row + i % 2 * 8) * 3 * C;
            q[k][i] = d < HEAD ? *(const unsigned*)(query + d) : 0;
        }
    OnlineSoftmax state;
    scale *= LOG2_E;  // exp2 is used for exp

    for (int step = 0; step < n_steps; step++) {
        copy_async_wait<0>();
        __syncthreads();  // copies are visible, and no thread reads the other buffer
        start_copy(step + 1);
        const int first = (step * GROUPS + group) * TILE;
        if (first >= n_positions) continue;
        const X* tile = pair(step);
        float s[TILE / 8][4];
        compute_scores(s, q, tile);
        if (first + TILE - 1 > lowest) {
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (first + n * 8 + column + i % 2 > positions[i / 2]) s[n][i] = LOWEST;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = state.m[half];
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
                top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            top = max_of_4(top);
            state.rescale(half, top, scale);
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s[n][i] = exp2_approx(fmaf(s[n][i], scale, -top * scale));
                    state.l[half] += s[n][i];
                }
        }
        add_values(state.y, s, tile + TILE * STRIDE);
    }

    if constexpr (GROUPS == 2) {
        // Element i of all threads is consecutive: no bank conflicts.
        constexpr int N = sizeof(OnlineSoftmax) / sizeof(float);
        float* exchanged = (float*)shared + thread;
        __syncthreads();  // the tiles are no longer read
        if (group == 1)
#pragma unroll
            for (int i = 0; i < N; i++) exchanged[i * GROUP_THREADS] = ((const float*)&state)[i];
        __syncthreads();
        if (group == 1) return;
        OnlineSoftmax other;
#pragma unroll
        for (int i = 0; i < N; i++) ((float*)&other)[i] = exchanged[i * GROUP_THREADS];
        state.add(other, scale);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float inverse = 1.0f / sum_of_4(state.l[half]);
        if (!query_tile.has(row + 8 * half)) continue;
        X* to = out + query_tile.token(row + 8 * half) * C;
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n++)
            if (n * 8 + column < HEAD)
                *(unsigned*)(to + n * 8 + column) =
                    pack<X>(state.y[n][2 * half] * inverse, state.y[n][2 * half + 1] * inverse);
    }
}

// In float32. Tiles in shared memory are [TILE, HEAD + 4], the softmax weights [TILE, TILE + 4].
using Float4 = Vec<float, 4>;

DEVICE const Float4& as_float4(const float* p) { return *(const Float4*)p; }

// Convert rows [n_rows, HEAD], `stride` elements apart, to a tile; zeros past the last row.
template <class X>
DEVICE void load_tile(float* tile, const X* rows, long long stride, int n_rows) {
    for (int i = threadIdx.x; i < TILE * (HEAD / 4); i += THREADS) {
        const int row = i / (HEAD / 4), column = i % (HEAD / 4) * 4;
        Float4 x = {};
        if (row < n_rows) {
            const auto from = *(const Vec<X, 4>*)(rows + row * stride + column);
            for (int j = 0; j < 4; j++) x.x[j] = to_float(from.x[j]);
        }
        *(Float4*)(tile + row * (HEAD + 4) + column) = x;
    }
}

// 16 lanes share 8 queries; a lane has 4 consecutive columns of each 64 columns of the results.
template <class X, class K>
DEVICE void attend_with_fma(
    const X* qkv, const K* keys, const K* values, const QueryTile& query_tile, float scale,
    X* out, int C
) {
    constexpr int LANES = 16, ROWS = TILE * LANES / THREADS, COLUMNS = TILE / LANES;
    constexpr int COLUMN_BLOCKS = (HEAD + 63) / 64;
    DYNAMIC_SHARED(shared);
    float* queries = (float*)shared;
    float* tile = queries + TILE * (HEAD + 4);    // keys, then values
    float* weights = tile + TILE * (HEAD + 4);
    const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES * ROWS;
    const int n_positions = query_tile.position(TILE - 1) + 1;
    int positions[ROWS];
    float y[ROWS][COLUMN_BLOCKS][4] = {}, m[ROWS], l[ROWS] = {};
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        positions[r] = query_tile.position(row + r);
        m[r] = LOWEST;
    }
    load_tile(queries, qkv + query_tile.token(0) * 3 * C, 3 * C, query_tile.T - query_tile.first);
    scale *= LOG2_E;  // exp2 is used for exp

    for (int first = 0; first < n_positions; first += TILE) {
        __syncthreads();  // the previous values are no longer read
        load_tile(tile, keys + (long long)first * HEAD, HEAD, n_positions - first);
        __syncthreads();
        float s[ROWS][COLUMNS] = {};
#pragma unroll 2
        for (int d = 0; d < HEAD; d += 4) {
            Float4 key[COLUMNS];
#pragma unroll
            for (int j = 0; j < COLUMNS; j++)
                key[j] = as_float4(tile + (j * LANES + lane) * (HEAD + 4) + d);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const Float4 query = as_float4(queries + (row + r) * (HEAD + 4) + d);
#pragma unroll
                for (int j = 0; j < COLUMNS; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++) s[r][j] += query.x[i] * key[j].x[i];
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float top = m[r];
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                if (first + j * LANES + lane > positions[r]) s[r][j] = LOWEST;
                top = fmaxf(top, s[r][j]);
            }
#pragma unroll
            for (int other = LANES / 2; other; other /= 2)
                top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, other));
            const float factor = exp2_approx((m[r] - top) * scale);
            m[r] = top;
            l[r] *= factor;
#pragma unroll
            for (int block = 0; block < COLUMN_BLOCKS; block++)
#pragma unroll
                for (int i = 0; i < 4; i++) y[r][block][i] *= factor;
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                const float weight = exp2_approx((s[r][j] - top) * scale);
                l[r] += weight;
                weights[(row + r) * (TILE + 4) + j * LANES + lane] = weight;
            }
        }
        __syncthreads();  // the keys are no longer read
        load_tile(tile, values + (long long)first * HEAD, HEAD, n_positions - first);
        __syncthreads();
#pragma unroll 2
        for (int k = 0; k < TILE; k += 4)
#pragma unroll
            for (int block = 0; block < COLUMN_BLOCKS; block++) {
                const int column = block * 64 + lane * 4;
                if (column >= HEAD) continue;
                Float4 value[4];
#pragma unroll
                for (int j = 0; j < 4; j++)
                    value[j] = as_float4(tile + (k + j) * (HEAD + 4) + column);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const Float4 weight = as_float4(weights + (row + r) * (TILE + 4) + k);
#pragma unroll
                    for (int j = 0; j < 4; j++)
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            y[r][block][i] += weight.x[j] * value[j].x[i];
                }
            }
    }

#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float sum = l[r];
#pragma unroll
        for (int other = LANES / 2; other; other /= 2)
            sum += __shfl_xor_sync(FULL_MASK, sum, other);
        if (!query_tile.has(row + r)) continue;
#pragma unroll
        for (int block = 0; block < COLUMN_BLOCKS; block++) {
            const int column = block * 64 + lane * 4;
            if (column >= HEAD) continue;
            Vec<X, 4> to;
            for (int i = 0; i < 4; i++) to.x[i] = from_float<X>(y[r][block][i] / sum);
            *(Vec<X, 4>*)(out + query_tile.token(row + r) * C + column) = to;
        }
    }
}

template <class X, class K>
DEVICE void attend(
    const X* qkv, const K* keys, const K* values, const QueryTile& query_tile, float scale,
    X* out, int C
) {
    if constexpr (USE_MMA<X, K>) attend_with_mma(qkv, keys, values, query_tile, scale, out, C);
    else attend_with_fma(qkv, keys, values, query_tile, scale, out, C);
}

}  // namespace prefill

// Write keys and values of qkv [B·T, 3C] to the cache [slots, H, S, D] at positions index [B, T].
// Tokens at the same position of a sequence are equal. Grid (B·T), any block. caches: see
// attention_decode.cu.
extern "C" __global__ void update_kv(
    const REAL* qkv, const long long* caches, int layer, int n_layer, const long long* index,
    int T, int H
) {
    trigger_dependent_launch();
    grid_dependency_sync();
    const int C = H * HEAD;
    const long long S = caches[2 * n_layer], p = index[blockIdx.x];
    const long long slot = caches[2 * n_layer + 1 + blockIdx.x / T];
    for (int i = threadIdx.x * 8; i < 2 * C; i += blockDim.x * 8) {
        const int is_value = i >= C, h = i % C / HEAD, d = i % HEAD;
        const auto from = *(const Vec<REAL, 8>*)(qkv + (long long)blockIdx.x * 3 * C + C + i);
        Vec<CACHE, 8> to;
        for (int j = 0; j < 8; j++) to.x[j] = from_float<CACHE>(to_float(from.x[j]));
        CACHE* buffer = (CACHE*)caches[is_value * n_layer + layer];
        *(Vec<CACHE, 8>*)(buffer + ((slot * H + h) * S + p) * HEAD + d) = to;
    }
}

// After update_kv: qkv [B·T, 3C] -> out [B·T, C]. A token attends to the positions up to its own,
// index [B, T], which increases by one along T, or repeats the last position at the end. scale > 0.
// Grid (H, T / 64 rounded up, B), block THREADS. Dynamic shared memory: with tensor cores, 4 tiles
// [TILE, STRIDE] of type REAL for each group; else float32 [TILE, 2 (HEAD + 4) + TILE + 4].
extern "C" __global__ void __launch_bounds__(prefill::THREADS, HEAD <= 64 ? 2 : 1)
attention_prefill(
    const REAL* qkv, const long long* caches, int layer, int n_layer, const long long* index,
    float scale, REAL* out, int T, int H
) {
    using namespace prefill;
    trigger_dependent_launch();
    grid_dependency_sync();
    const int h = blockIdx.x, C = H * HEAD;
    const long long slot = caches[2 * n_layer + 1 + blockIdx.z];
    const long long first = (slot * H + h) * caches[2 * n_layer] * HEAD;
    const CACHE* keys = (const CACHE*)caches[layer] + first;
    const CACHE* values = (const CACHE*)caches[n_layer + layer] + first;
    const QueryTile query_tile(index, T);
    qkv += h * HEAD;
    out += h * HEAD;
    attend(qkv, keys, values, query_tile, scale, out, C);
}
