// Attention of several new tokens per sequence over the cache, after their keys and values are put
// into it.
//
// A block has 64 queries of one head and goes over the keys and values in tiles of 64 positions,
// from the first to the last that any of its queries sees; scores never leave the multiprocessor
// ("FlashAttention-2", https://arxiv.org/abs/2307.08691). For each query it holds the largest score
// m so far, the sum l of exp(score - m) and the sum of the values so weighted, both rescaled when m
// grows. Where the cache is of the activations' own type of 16 bits, the products are of the matrix
// unit: 4 warps with 16 queries each, all of whose numbers are in registers, the next tile on its
// way while one is worked on. Two such groups of warps take turns with the tiles, and put what they
// have seen together in the end: the last blocks of a prompt have the most tiles, and the kernel
// waits for them. For other types products are in float32: a thread has 8 queries and every 16th
// position.
//
// The last queries of a sequence see the most positions: their blocks come first, of all heads, so
// that the longest work is not begun last.

namespace prompt {

template <class X, class K> constexpr bool BY_MMA = false;
template <> constexpr bool BY_MMA<half_t, half_t> = true;
template <> constexpr bool BY_MMA<bf16_t, bf16_t> = true;

constexpr int GROUP_THREADS = 128;
constexpr int GROUPS = BY_MMA<REAL, CACHE> && HEAD <= 128 ? 2 : 1;  // wider ones have no room
constexpr int THREADS = GROUPS * GROUP_THREADS;
constexpr int TILE = 64;
constexpr float LOWEST = -3.4e38f;
constexpr float LOG2_E = 1.4426950408889634f;

static_assert(HEAD % 8 == 0 && HEAD <= 256, "a head is 8, 16, ... 256 numbers wide");

// What a block works on. Row r of its tile is the token `token(r)` of all B·T.
struct Work {
    int first, T;       // token of the first row; the rows past T repeat the last token
    long long before;   // tokens of the sequences before
    const long long* index;

    DEVICE Work(const long long* index, int T)
        : first((int)(gridDim.y - 1 - blockIdx.y) * TILE), T(T),
          before((long long)blockIdx.z * T), index(index) {}
    DEVICE bool has(int row) const { return first + row < T; }
    DEVICE long long token(int row) const { return before + min(first + row, T - 1); }
    DEVICE int position(int row) const { return (int)index[token(row)]; }
};

// On the matrix unit. A tile in shared memory is [TILE, STRIDE].
constexpr int WIDTH = (HEAD + 15) / 16 * 16;
constexpr int STRIDE = WIDTH + 8;

static_assert(STRIDE / 8 % 2, "an odd number of 16 bytes, so that 8 rows lie in different banks");

// Rows [n_rows, HEAD] -> a tile, with zeros past both ends; by a group.
template <class X> DEVICE void copy_tile(X* tile, const X* rows, int n_rows) {
    constexpr int VECTORS = WIDTH / 8;
#pragma unroll
    for (int i = 0; i < TILE * VECTORS / GROUP_THREADS; i++) {
        const int vector = i * GROUP_THREADS + threadIdx.x % GROUP_THREADS;
        const int row = vector / VECTORS, column = vector % VECTORS * 8;
        const bool there = row < n_rows && column < HEAD;
        copy_async(tile + row * STRIDE + column, rows + (there ? row * HEAD + column : 0), there);
    }
}

// Scores of 16 queries, s [TILE / 8] tiles [16, 8]. q: WIDTH / 16 tiles [16, 16].
template <class X>
DEVICE void score(float (&s)[TILE / 8][4], const unsigned (&q)[WIDTH / 16][4], const X* keys) {
    const int lane = threadIdx.x % WARP;
    const X* row = keys + (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < TILE / 16; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) s[2 * n][i] = s[2 * n + 1][i] = 0.0f;
#pragma unroll
        for (int k = 0; k < WIDTH / 16; k++) {
            unsigned x[4];  // 16 keys, 16 numbers of each
            load_tiles(x, row + n * 16 * STRIDE + k * 16);
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
            load_tiles_transposed(x, row + k * 16 * STRIDE + n * 16);
            mma(y[2 * n], weights, {x[0], x[1]}, X());
            mma(y[2 * n + 1], weights, {x[2], x[3]}, X());
        }
    }
}

// Over the four lanes that have numbers of the same query.
DEVICE float max_of_4(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
DEVICE float sum_of_4(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// What a thread has seen of two queries: at first nothing, which is more than LOWEST, the score of
// what is not to be seen. A group may have tiles of which a query sees nothing.
struct Seen {
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
    // What the other group's thread of the same queries and columns has seen, too.
    DEVICE void add(Seen& other, float scale) {
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

// qkv: of this head, a row of the first token. keys, values [S, HEAD]. A lane has queries
// lane / 4 and lane / 4 + 8 of the 16 of its warp, and of each the columns that `mma` gives it.
template <class X>
DEVICE void attend_by_mma(
    const X* qkv, const X* keys, const X* values, const Work& work, float scale, X* out, int C
) {
    DYNAMIC_SHARED(shared);
    const int group = threadIdx.x / GROUP_THREADS, thread = threadIdx.x % GROUP_THREADS;
    // [2, keys and values, TILE, STRIDE] of each group: one pair in use, the other on its way.
    X* tiles = (X*)shared + group * (4 * TILE * STRIDE);
    const int row = thread / WARP * 16 + threadIdx.x % WARP / 4;
    const int column = threadIdx.x % 4 * 2;
    const int lowest = work.position(0), n_positions = work.position(TILE - 1) + 1;
    const int positions[2] = {work.position(row), work.position(row + 8)};

    const int n_turns = (n_positions + GROUPS * TILE - 1) / (GROUPS * TILE);
    const auto pair = [&](int turn) { return tiles + turn % 2 * (2 * TILE * STRIDE); };
    const auto start = [&](int turn) {
        const int first = (turn * GROUPS + group) * TILE;
        if (turn < n_turns && first < n_positions) {
            const int n = n_positions - first;
            copy_tile(pair(turn), keys + (long long)first * HEAD, n);
            copy_tile(pair(turn) + TILE * STRIDE, values + (long long)first * HEAD, n);
        }
        copy_async_commit();
    };
    start(0);
    unsigned q[WIDTH / 16][4];
#pragma unroll
    for (int k = 0; k < WIDTH / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int d = k * 16 + i / 2 * 8 + column;
            const X* query = qkv + work.token(row + i % 2 * 8) * 3 * C;
            q[k][i] = d < HEAD ? *(const unsigned*)(query + d) : 0;
        }
    Seen seen;
    scale *= LOG2_E;  // for powers of 2

    for (int turn = 0; turn < n_turns; turn++) {
        copy_async_wait<0>();
        __syncthreads();  // all copies are here, and nobody reads the other pair any more
        start(turn + 1);
        const int first = (turn * GROUPS + group) * TILE;
        if (first >= n_positions) continue;
        const X* tile = pair(turn);
        float s[TILE / 8][4];
        score(s, q, tile);
        if (first + TILE - 1 > lowest) {
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (first + n * 8 + column + i % 2 > positions[i / 2]) s[n][i] = LOWEST;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = seen.m[half];
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
                top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            top = max_of_4(top);
            seen.rescale(half, top, scale);
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s[n][i] = exp2_approx(fmaf(s[n][i], scale, -top * scale));
                    seen.l[half] += s[n][i];
                }
        }
        add_values(seen.y, s, tile + TILE * STRIDE);
    }

    if constexpr (GROUPS == 2) {
        // A number of all threads together, so that neighbors meet different banks.
        constexpr int N = sizeof(Seen) / sizeof(float);
        float* room = (float*)shared + thread;
        __syncthreads();  // nobody reads a tile any more
        if (group == 1)
#pragma unroll
            for (int i = 0; i < N; i++) room[i * GROUP_THREADS] = ((const float*)&seen)[i];
        __syncthreads();
        if (group == 1) return;
        Seen other;
#pragma unroll
        for (int i = 0; i < N; i++) ((float*)&other)[i] = room[i * GROUP_THREADS];
        seen.add(other, scale);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float whole = 1.0f / sum_of_4(seen.l[half]);
        if (!work.has(row + 8 * half)) continue;
        X* to = out + work.token(row + 8 * half) * C;
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n++)
            if (n * 8 + column < HEAD)
                *(unsigned*)(to + n * 8 + column) =
                    pack<X>(seen.y[n][2 * half] * whole, seen.y[n][2 * half + 1] * whole);
    }
}

// In float32. Tiles in shared memory are [TILE, HEAD + 4] and the weights [TILE, TILE + 4].
using Four = Several<float, 4>;

DEVICE const Four& four(const float* p) { return *(const Four*)p; }

// Rows [n_rows, HEAD] that lie `stride` numbers apart -> a tile, with zeros past the last.
template <class X>
DEVICE void widen(float* tile, const X* rows, long long stride, int n_rows) {
    for (int i = threadIdx.x; i < TILE * (HEAD / 4); i += THREADS) {
        const int row = i / (HEAD / 4), column = i % (HEAD / 4) * 4;
        Four x = {};
        if (row < n_rows) {
            const auto from = *(const Several<X, 4>*)(rows + row * stride + column);
            for (int j = 0; j < 4; j++) x.x[j] = to_float(from.x[j]);
        }
        *(Four*)(tile + row * (HEAD + 4) + column) = x;
    }
}

// 16 lanes share 8 queries; of their results each has 4 neighbors in each 64 numbers of a head.
template <class X, class K>
DEVICE void attend_by_fma(
    const X* qkv, const K* keys, const K* values, const Work& work, float scale, X* out, int C
) {
    constexpr int LANES = 16, ROWS = TILE * LANES / THREADS, COLUMNS = TILE / LANES;
    constexpr int PARTS = (HEAD + 63) / 64;
    DYNAMIC_SHARED(shared);
    float* queries = (float*)shared;
    float* tile = queries + TILE * (HEAD + 4);    // keys, then values
    float* weights = tile + TILE * (HEAD + 4);
    const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES * ROWS;
    const int n_positions = work.position(TILE - 1) + 1;
    int positions[ROWS];
    float y[ROWS][PARTS][4] = {}, m[ROWS], l[ROWS] = {};
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        positions[r] = work.position(row + r);
        m[r] = LOWEST;
    }
    widen(queries, qkv + work.token(0) * 3 * C, 3 * C, work.T - work.first);
    scale *= LOG2_E;  // for powers of 2

    for (int first = 0; first < n_positions; first += TILE) {
        __syncthreads();  // nobody reads the values before any more
        widen(tile, keys + (long long)first * HEAD, HEAD, n_positions - first);
        __syncthreads();
        float s[ROWS][COLUMNS] = {};
#pragma unroll 2
        for (int d = 0; d < HEAD; d += 4) {
            Four key[COLUMNS];
#pragma unroll
            for (int j = 0; j < COLUMNS; j++)
                key[j] = four(tile + (j * LANES + lane) * (HEAD + 4) + d);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const Four query = four(queries + (row + r) * (HEAD + 4) + d);
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
                top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, other));
            const float factor = exp2_approx((m[r] - top) * scale);
            m[r] = top;
            l[r] *= factor;
#pragma unroll
            for (int part = 0; part < PARTS; part++)
#pragma unroll
                for (int i = 0; i < 4; i++) y[r][part][i] *= factor;
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                const float weight = exp2_approx((s[r][j] - top) * scale);
                l[r] += weight;
                weights[(row + r) * (TILE + 4) + j * LANES + lane] = weight;
            }
        }
        __syncthreads();  // nobody reads the keys any more
        widen(tile, values + (long long)first * HEAD, HEAD, n_positions - first);
        __syncthreads();
#pragma unroll 2
        for (int k = 0; k < TILE; k += 4)
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                const int column = part * 64 + lane * 4;
                if (column >= HEAD) continue;
                Four value[4];
#pragma unroll
                for (int j = 0; j < 4; j++) value[j] = four(tile + (k + j) * (HEAD + 4) + column);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const Four weight = four(weights + (row + r) * (TILE + 4) + k);
#pragma unroll
                    for (int j = 0; j < 4; j++)
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            y[r][part][i] += weight.x[j] * value[j].x[i];
                }
            }
    }

#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float whole = l[r];
#pragma unroll
        for (int other = LANES / 2; other; other /= 2)
            whole += __shfl_xor_sync(ALL_LANES, whole, other);
        if (!work.has(row + r)) continue;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const int column = part * 64 + lane * 4;
            if (column >= HEAD) continue;
            Several<X, 4> to;
            for (int i = 0; i < 4; i++) to.x[i] = from_float<X>(y[r][part][i] / whole);
            *(Several<X, 4>*)(out + work.token(row + r) * C + column) = to;
        }
    }
}

template <class X, class K>
DEVICE void attend(
    const X* qkv, const K* keys, const K* values, const Work& work, float scale, X* out, int C
) {
    if constexpr (BY_MMA<X, K>) attend_by_mma(qkv, keys, values, work, scale, out, C);
    else attend_by_fma(qkv, keys, values, work, scale, out, C);
}

}  // namespace prompt

// Keys and values of qkv [B·T, 3C] into the cache [B, H, S, D], at the positions index [B, T].
// Tokens repeated at one position are the same. Grid (B·T), block any. caches: see `attend_step`.
extern "C" __global__ void write_cache(
    const REAL* qkv, const long long* caches, int layer, int n_layer, const long long* index,
    int T, int H
) {
    let_next_start();
    wait_for_previous();
    const int C = H * HEAD;
    const long long b = blockIdx.x / T, S = caches[2 * n_layer], p = index[blockIdx.x];
    for (int i = threadIdx.x * 8; i < 2 * C; i += blockDim.x * 8) {
        const int is_value = i >= C, h = i % C / HEAD, d = i % HEAD;
        const auto from = *(const Several<REAL, 8>*)(qkv + (long long)blockIdx.x * 3 * C + C + i);
        Several<CACHE, 8> to;
        for (int j = 0; j < 8; j++) to.x[j] = from_float<CACHE>(to_float(from.x[j]));
        CACHE* buffer = (CACHE*)caches[is_value * n_layer + layer];
        *(Several<CACHE, 8>*)(buffer + ((b * H + h) * S + p) * HEAD + d) = to;
    }
}

// After `write_cache`: qkv [B·T, 3C] -> out [B·T, C], each token seeing the positions up to its
// own, index [B, T], which rises by one along T or, at the end, repeats the last. scale > 0.
// Grid (H, T / 64 rounded up, B), block THREADS. Dynamic shared memory: 4 tiles of type REAL
// [TILE, STRIDE] a group for the matrix unit, else float32 [TILE, 2 (HEAD + 4) + TILE + 4].
extern "C" __global__ void __launch_bounds__(prompt::THREADS, HEAD <= 64 ? 2 : 1) attend_prompt(
    const REAL* qkv, const long long* caches, int layer, int n_layer, const long long* index,
    float scale, REAL* out, int T, int H
) {
    using namespace prompt;
    let_next_start();
    wait_for_previous();
    const int h = blockIdx.x, b = blockIdx.z, C = H * HEAD;
    const long long first = ((long long)b * H + h) * caches[2 * n_layer] * HEAD;
    const CACHE* keys = (const CACHE*)caches[layer] + first;
    const CACHE* values = (const CACHE*)caches[n_layer + layer] + first;
    const Work work(index, T);
    qkv += h * HEAD;
    out += h * HEAD;
    attend(qkv, keys, values, work, scale, out, C);
}
