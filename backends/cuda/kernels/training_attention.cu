// Attention of whole sequences for training: forward, and the gradients of queries, keys and
// values.
//
// Rows are packed, qkv [B·T, 3C]; token t of a sequence attends to tokens 0 to t. A block has 64
// rows of one head, 16 for each of its 4 warps: queries, or keys in `attention_vjp_keys`. It
// iterates over tiles of COLUMNS rows of the other kind. Scores stay on the multiprocessor, and
// each kernel computes them again ("FlashAttention-2", https://arxiv.org/abs/2307.08691). No two
// blocks write the same row, so there are no atomics and the result does not depend on their order.
//
// Tiles [16, 8] of results are distributed over a warp by the layout of `mma` (device.cuh): a lane
// has rows lane / 4 and lane / 4 + 8, and columns 2 (lane % 4) and the next one. 16-bit types use
// tensor cores; float32 uses scalar products in the same layout.

namespace training {

constexpr int THREADS = 128;
constexpr int ROWS = 64;  // of a block
constexpr int COLUMNS = sizeof(REAL) == 2 && HEAD <= 64 ? 64 : 32;  // of a tile, by registers
constexpr int WIDTH = (HEAD + 15) / 16 * 16;
constexpr int STRIDE = WIDTH + ELEMENTS_PER_LOAD<REAL>;  // of a row in shared memory
constexpr int SCRATCH = COLUMNS + 4;  // stride of a row of float32 scratch memory
constexpr float LOWEST = -3.4e38f;
constexpr float LOG2_E = 1.4426950408889634f;

static_assert(HEAD % 8 == 0 && HEAD <= 128, "a head is 8, 16, ... 128 numbers wide");

using Scores = float[COLUMNS / 8][4];  // 16 rows of a warp, COLUMNS columns
using Sums = float[WIDTH / 8][4];      // 16 rows of a warp, WIDTH columns

// Rows of one head in global memory.
struct Rows {
    const REAL* from;  // the sequence's first row
    long long stride;  // between rows
};

// Copy rows first to first + N of T to a tile [N, STRIDE] asynchronously; zeros past both ends.
template <int N> DEVICE void copy_tile(REAL* tile, Rows rows, int first, int T) {
    constexpr int EACH = ELEMENTS_PER_LOAD<REAL>, VECTORS = WIDTH / EACH;
    for (int i = threadIdx.x; i < N * VECTORS; i += THREADS) {
        const int row = first + i / VECTORS, column = i % VECTORS * EACH;
        const bool valid = row < T && column < HEAD;
        const long long at = valid ? row * rows.stride + column : 0;
        copy_async(tile + i / VECTORS * STRIDE + column, rows.from + at, valid);
    }
}

// s = a bᵀ for the warp's 16 rows a and COLUMNS rows b in shared memory.
template <class X> DEVICE void multiply_rows(Scores& s, const X* a, const X* b) {
    const int lane = threadIdx.x % WARP;
    a += lane % 16 * STRIDE + lane / 16 * 8;
    b += (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < WIDTH / 16; k++) {
        unsigned x[4];  // 16 rows of a, 16 numbers of each
        ldmatrix(x, a + k * 16);
#pragma unroll
        for (int n = 0; n < COLUMNS / 16; n++) {
            unsigned y[4];  // 16 rows of b
            ldmatrix(y, b + n * 16 * STRIDE + k * 16);
            mma(s[2 * n], x, {y[0], y[1]}, X());
            mma(s[2 * n + 1], x, {y[2], y[3]}, X());
        }
    }
}
DEVICE void multiply_rows(Scores& s, const float* a, const float* b) {
    const int row = threadIdx.x % WARP / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] = 0.0f;
#pragma unroll 2
    for (int d = 0; d < HEAD; d += 4) {
        Vec<float, 4> x[2];
#pragma unroll
        for (int r = 0; r < 2; r++) x[r] = *(const Vec<float, 4>*)(a + (row + 8 * r) * STRIDE + d);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const auto y = *(const Vec<float, 4>*)(b + (n * 8 + column + j) * STRIDE + d);
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int i = 0; i < 4; i++) s[n][2 * r + j] += x[r].x[i] * y.x[i];
            }
    }
}

// y += s b for COLUMNS rows b in shared memory. `scratch` [16, SCRATCH] is the warp's; the tensor
// cores do not need it.
template <class X> DEVICE void add_product(Sums& y, const Scores& s, const X* b, float*) {
    const int lane = threadIdx.x % WARP;
    b += (lane / 8 % 2 * 8 + lane % 8) * STRIDE + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; k++) {
        const auto& low = s[2 * k];
        const auto& high = s[2 * k + 1];
        const unsigned x[4] = {
            pack<X>(low[0], low[1]), pack<X>(low[2], low[3]),
            pack<X>(high[0], high[1]), pack<X>(high[2], high[3])
        };
#pragma unroll
        for (int n = 0; n < WIDTH / 16; n++) {
            unsigned z[4];  // 16 rows of b, 16 numbers of each
            ldmatrix_transposed(z, b + k * 16 * STRIDE + n * 16);
            mma(y[2 * n], x, {z[0], z[1]}, X());
            mma(y[2 * n + 1], x, {z[2], z[3]}, X());
        }
    }
}
DEVICE void add_product(Sums& y, const Scores& s, const float* b, float* scratch) {
    const int row = threadIdx.x % WARP / 4, column = threadIdx.x % 4 * 2;
    __syncwarp();  // the previous content may still be read
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            scratch[(row + i / 2 * 8) * SCRATCH + n * 8 + column + i % 2] = s[n][i];
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < COLUMNS; k += 4) {
        Vec<float, 4> x[2];
#pragma unroll
        for (int r = 0; r < 2; r++)
            x[r] = *(const Vec<float, 4>*)(scratch + (row + 8 * r) * SCRATCH + k);
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const auto z = *(const Vec<float, 2>*)(b + (k + i) * STRIDE + n * 8 + column);
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int j = 0; j < 2; j++) y[n][2 * r + j] += x[r].x[i] * z.x[j];
            }
    }
}

// Reductions over the four lanes that have elements of the same row.
DEVICE float max_of_4(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 2));
}
DEVICE float sum_of_4(float x) {
    x += __shfl_xor_sync(FULL_MASK, x, 1);
    return x + __shfl_xor_sync(FULL_MASK, x, 2);
}

// The place of a block and of a thread: rows first + row and first + row + 8 of head h of sequence
// b.
struct Place {
    int h, b, first, row, column, warp;

    DEVICE explicit Place(int tile)
        : h(blockIdx.x), b(blockIdx.z), first(tile * ROWS),
          row(threadIdx.x / WARP * 16 + threadIdx.x % WARP / 4), column(threadIdx.x % 4 * 2),
          warp(threadIdx.x / WARP) {}

    // The rows of this head: queries (0), keys (1) or values (2).
    DEVICE Rows part(const REAL* qkv, int which, int T, int C) const {
        return {qkv + (long long)b * T * 3 * C + which * C + h * HEAD, 3ll * C};
    }
    // Store factor · y to the rows at `to`.
    DEVICE void store(
        REAL* to, long long stride, int T, const Sums& y, float low, float high
    ) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int token = first + row + 8 * half;
            if (token >= T) continue;
#pragma unroll
            for (int n = 0; n < HEAD / 8; n++) {
                Vec<REAL, 2> pair;
#pragma unroll
                for (int j = 0; j < 2; j++)
                    pair.x[j] = from_float<REAL>(y[n][2 * half + j] * (half ? high : low));
                *(Vec<REAL, 2>*)(to + token * stride + n * 8 + column) = pair;
            }
        }
    }
};

// Shared memory: two tiles of the block's rows, two pairs of tiles of the other kind (one of a pair
// is loaded during the work on the other), two [COLUMNS, 2] of statistics, and scratch of each
// warp.
struct Shared {
    REAL *own[2], *pairs;
    float *statistics, *scratch;

    DEVICE explicit Shared(unsigned char* memory) {
        own[0] = (REAL*)memory;
        own[1] = own[0] + ROWS * STRIDE;
        pairs = own[1] + ROWS * STRIDE;
        statistics = (float*)(pairs + 4 * COLUMNS * STRIDE);
        scratch = statistics + 4 * COLUMNS + threadIdx.x / WARP * 16 * SCRATCH;
    }
    // A tile of the buffer of a step: 0 for the first of its pair, 1 for the second.
    DEVICE REAL* tile(int step, int which) const {
        return pairs + (step % 2 * 2 + which) * COLUMNS * STRIDE;
    }
};

// The online softmax of a thread's two rows: largest score, and sums of this lane's columns.
struct OnlineSoftmax {
    float top[2] = {0.1f * LOWEST, 0.1f * LOWEST}, sum[2] = {};

    // Replace the scores of a row by exp(score - top); return the factor of earlier sums.
    DEVICE float add(Scores& s, int half, float scale) {
        float largest = top[half];
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
            largest = fmaxf(largest, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        largest = max_of_4(largest);
        const float factor = exp2_approx((top[half] - largest) * scale);
        top[half] = largest;
        sum[half] *= factor;
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                s[n][i] = exp2_approx((s[n][i] - largest) * scale);
                sum[half] += s[n][i];
            }
        return factor;
    }
};

// Mask the keys after each query: columns first + ... of rows of queries.
DEVICE void mask_keys(Scores& s, const Place& place, int first) {
    if (first + COLUMNS - 1 <= place.first) return;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int key = first + n * 8 + place.column + i % 2;
            if (key > place.first + place.row + i / 2 * 8) s[n][i] = LOWEST;
        }
}

}  // namespace training

// qkv [B·T, 3C] -> out [B·T, C]. scale > 0. Grid (H, T / 64 rounded up, B), block 128. Dynamic
// shared memory: see `Shared`, and `training_attention.py`.
extern "C" __global__ void __launch_bounds__(training::THREADS)
attention_forward(const REAL* qkv, float scale, REAL* out, int T, int H) {
    using namespace training;
    DYNAMIC_SHARED(memory);
    const Shared shared(memory);
    const Place place((int)(gridDim.y - 1 - blockIdx.y));  // the longest rows first
    const int C = H * HEAD, n_keys = min(T, place.first + ROWS);
    const int n_steps = (n_keys + COLUMNS - 1) / COLUMNS;
    const auto start_copy = [&](int step) {
        if (step < n_steps) {
            copy_tile<COLUMNS>(shared.tile(step, 0), place.part(qkv, 1, T, C), step * COLUMNS, T);
            copy_tile<COLUMNS>(shared.tile(step, 1), place.part(qkv, 2, T, C), step * COLUMNS, T);
        }
        copy_async_commit();
    };
    copy_tile<ROWS>(shared.own[0], place.part(qkv, 0, T, C), place.first, T);
    start_copy(0);
    const REAL* queries = shared.own[0] + place.warp * 16 * STRIDE;
    OnlineSoftmax softmax;
    Sums y = {};
    scale *= LOG2_E;  // exp2 is used for exp

    for (int step = 0; step < n_steps; step++) {
        copy_async_wait<0>();
        __syncthreads();  // copies are visible, and no thread reads the other buffer
        start_copy(step + 1);
        Scores s;
        multiply_rows(s, queries, shared.tile(step, 0));
        mask_keys(s, place, step * COLUMNS);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float factor = softmax.add(s, half, scale);
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n++)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) y[n][i] *= factor;
        }
        add_product(y, s, shared.tile(step, 1), shared.scratch);
    }
    const float low = 1.0f / sum_of_4(softmax.sum[0]), high = 1.0f / sum_of_4(softmax.sum[1]);
    place.store(out + (long long)place.b * T * C + place.h * HEAD, C, T, y, low, high);
}

// The gradient of the queries: g [B·T, C] and qkv -> the first third of dqkv [B·T, 3C]. A first
// pass over the keys computes `statistics` [B, H, T, 2]: log2 of the sum of exponentials of a
// query's scores, and the sum of P · dP, for `attention_vjp_keys`. Grid, block and shared memory as
// above.
extern "C" __global__ void __launch_bounds__(training::THREADS)
attention_vjp_queries(
    const REAL* g, const REAL* qkv, float scale, REAL* dqkv, float* statistics, int T, int H
) {
    using namespace training;
    DYNAMIC_SHARED(memory);
    const Shared shared(memory);
    const Place place((int)(gridDim.y - 1 - blockIdx.y));
    const int C = H * HEAD, n_keys = min(T, place.first + ROWS);
    const int n_tiles = (n_keys + COLUMNS - 1) / COLUMNS, n_steps = 2 * n_tiles;
    const auto start_copy = [&](int step) {
        if (step < n_steps) {
            const int first = step % n_tiles * COLUMNS;
            copy_tile<COLUMNS>(shared.tile(step, 0), place.part(qkv, 1, T, C), first, T);
            copy_tile<COLUMNS>(shared.tile(step, 1), place.part(qkv, 2, T, C), first, T);
        }
        copy_async_commit();
    };
    const Rows gradients = {g + (long long)place.b * T * C + place.h * HEAD, C};
    copy_tile<ROWS>(shared.own[0], place.part(qkv, 0, T, C), place.first, T);
    copy_tile<ROWS>(shared.own[1], gradients, place.first, T);
    start_copy(0);
    const REAL* own[2] = {
        shared.own[0] + place.warp * 16 * STRIDE, shared.own[1] + place.warp * 16 * STRIDE
    };
    OnlineSoftmax softmax;
    float log_sum[2], delta[2] = {};
    Sums dq = {};
    const float scale2 = scale * LOG2_E;

    for (int step = 0; step < n_steps; step++) {
        copy_async_wait<0>();
        __syncthreads();
        start_copy(step + 1);
        Scores s, dp;
        multiply_rows(s, own[0], shared.tile(step, 0));
        multiply_rows(dp, own[1], shared.tile(step, 1));
        mask_keys(s, place, step % n_tiles * COLUMNS);
        if (step < n_tiles) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                delta[half] *= softmax.add(s, half, scale2);
#pragma unroll
                for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) delta[half] += s[n][i] * dp[n][i];
            }
            continue;
        }
        if (step == n_tiles)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float sum = sum_of_4(softmax.sum[half]);
                log_sum[half] = softmax.top[half] * scale2 + log2f(sum);
                delta[half] = sum_of_4(delta[half]) / sum;
            }
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float p = exp2_approx(s[n][i] * scale2 - log_sum[i / 2]);
                s[n][i] = p * (dp[n][i] - delta[i / 2]);
            }
        add_product(dq, s, shared.tile(step, 0), shared.scratch);
    }
    place.store(
        dqkv + (long long)place.b * T * 3 * C + place.h * HEAD, 3ll * C, T, dq, scale, scale
    );
    statistics += ((long long)place.b * H + place.h) * T * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int token = place.first + place.row + 8 * half;
        if (token >= T || threadIdx.x % 4) continue;
        statistics[2 * token] = log_sum[half];
        statistics[2 * token + 1] = delta[half];
    }
}

// The gradients of keys and values: the other two thirds of dqkv, after `attention_vjp_queries`.
// Grid, block and shared memory as above; a block has 64 keys.
extern "C" __global__ void __launch_bounds__(training::THREADS)
attention_vjp_keys(
    const REAL* g, const REAL* qkv, float scale, const float* statistics, REAL* dqkv, int T, int H
) {
    using namespace training;
    DYNAMIC_SHARED(memory);
    const Shared shared(memory);
    const Place place((int)blockIdx.y);  // the first keys have the most queries
    const int C = H * HEAD, first_tile = place.first / COLUMNS;
    const int n_steps = (T + COLUMNS - 1) / COLUMNS - first_tile;
    const Rows gradients = {g + (long long)place.b * T * C + place.h * HEAD, C};
    statistics += ((long long)place.b * H + place.h) * T * 2;
    const auto start_copy = [&](int step) {
        if (step < n_steps) {
            const int first = (first_tile + step) * COLUMNS, i = threadIdx.x;
            copy_tile<COLUMNS>(shared.tile(step, 0), place.part(qkv, 0, T, C), first, T);
            copy_tile<COLUMNS>(shared.tile(step, 1), gradients, first, T);
            const bool valid = first + i / 2 < T;
            if (i < 2 * COLUMNS)
                copy_async_4(shared.statistics + step % 2 * 2 * COLUMNS + i,
                             statistics + (valid ? 2 * first + i : 0), valid);
        }
        copy_async_commit();
    };
    copy_tile<ROWS>(shared.own[0], place.part(qkv, 1, T, C), place.first, T);
    copy_tile<ROWS>(shared.own[1], place.part(qkv, 2, T, C), place.first, T);
    start_copy(0);
    const REAL* own[2] = {
        shared.own[0] + place.warp * 16 * STRIDE, shared.own[1] + place.warp * 16 * STRIDE
    };
    Sums dk = {}, dv = {};
    const float scale2 = scale * LOG2_E;

    for (int step = 0; step < n_steps; step++) {
        copy_async_wait<0>();
        __syncthreads();
        start_copy(step + 1);
        Scores p, ds;
        multiply_rows(p, own[0], shared.tile(step, 0));
        multiply_rows(ds, own[1], shared.tile(step, 1));
        const float* of_query = shared.statistics + step % 2 * 2 * COLUMNS;
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int column = n * 8 + place.column + i % 2;
                const int query = (first_tile + step) * COLUMNS + column;
                const bool valid = place.first + place.row + i / 2 * 8 <= query && query < T;
                const float x = exp2_approx(p[n][i] * scale2 - of_query[2 * column]);
                p[n][i] = valid ? x : 0.0f;
                ds[n][i] = p[n][i] * (ds[n][i] - of_query[2 * column + 1]);
            }
        add_product(dv, p, shared.tile(step, 1), shared.scratch);
        add_product(dk, ds, shared.tile(step, 0), shared.scratch);
    }
    REAL* keys = dqkv + (long long)place.b * T * 3 * C + C + place.h * HEAD;
    place.store(keys, 3ll * C, T, dk, scale, scale);
    place.store(keys + C, 3ll * C, T, dv, 1.0f, 1.0f);
}
