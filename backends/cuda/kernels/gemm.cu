// Products of more rows with a matrix, on the matrix unit: 9 rows and more.
//
// Still the time is that of moving weights and x: of a tile of M outputs and N rows, M + N rows of
// n_in numbers come to the block's multiprocessor, from memory or the L2 cache. Large tiles bring
// less in all, small ones keep all multiprocessors busy: there are some sizes, and the launch takes
// the one with which the least comes to any multiprocessor (`backends/cupy_launch.py`). In small
// tiles KS groups of warps share the inputs, and their sums are added in the end.
//
// Weights and x come through shared memory in STAGES stages of KS slices of 64 inputs (of floats,
// 32), some on their way while one is multiplied; the first weights before the kernel ahead has
// ended. Of each span of 32 inputs, lane 4g + t of a warp takes numbers 8t to 8t + 7 of rows g,
// g + 8, ... of weights and x alike. That is another order of the inputs than `mma` has in mind,
// but the same in both; and so 16 bytes read at once are a lane's part of two products, and codes
// stay codes in shared memory. In some rows, what is stored changes places, so that the lanes that
// read together meet different banks.
//
// A float is a sum of three numbers of 16 bits, each with the next 8 of its binary places, so that
// a product is a sum of nine; the three smallest are below what float32 rounds off, and left out.
// The matrix unit does not round its sums, but cuts them off: those of a span are its own, and are
// added up as floats are.
//
// Codes are whole numbers, which 16 bits hold exactly. Each group of inputs has a sum of its own,
// to which scale and offset are applied in float32; the sums of x are a product with ones.

namespace tiles {

constexpr bool FLOATS = sizeof(REAL) == 4;
template <class T> struct Short { using type = T; };
template <> struct Short<float> { using type = bf16_t; };
using SHORT = Short<REAL>::type;  // what the matrix unit multiplies
constexpr int X_PARTS = FLOATS ? 3 : 1, WEIGHT_PARTS = BITS ? 1 : X_PARTS;  // of a number

constexpr int SPAN = 32, SPANS = FLOATS ? 1 : 2, SLICE = SPANS * SPAN;
constexpr int X_BITS = 8 * sizeof(REAL), WEIGHT_BITS = BITS ? BITS : X_BITS;
constexpr int RUN = BITS && GROUP < SLICE ? GROUP : SLICE;  // inputs of a slice with one scale
constexpr int RUNS = BITS ? SLICE / RUN : 0;                // that a slice has
[[maybe_unused]] constexpr float ZERO = BITS == 4 ? 16.0f : 0.0f;  // unpack_codes of code 0

// M outputs and N rows to a block; MS x NS parts of them x KS parts of the inputs, one to a warp.
template <int M_, int N_, int MS_, int NS_, int KS_, int STAGES_> struct Shape {
    static constexpr int M = M_, N = N_, MS = MS_, NS = NS_, KS = KS_, STAGES = STAGES_;
    static constexpr int THREADS = MS * NS * KS * WARP;
    static constexpr int TM = M / MS / 16, TN = N / NS / 8;  // a warp's tiles of `mma`
    // A stage: weights [KS, M, SLICE], x [KS, N, SLICE], scales and offsets [2, KS, RUNS, M].
    static constexpr int WEIGHTS = KS * M * SLICE * WEIGHT_BITS / 8;
    static constexpr int X = KS * N * SLICE * X_BITS / 8;
    static constexpr int SCALES = KS * RUNS * M * 4;
    static constexpr int STAGE = WEIGHTS + X + 2 * SCALES;
    // In the same room, when all is multiplied: sums [KS, N, STRIDE], where rows 2t (see `mma`) lie
    // in different banks.
    static constexpr int STRIDE = M + 4;
};

// Where a byte of a span of a row of a slice lies. Of KS slices, those with short rows are written
// by neighboring lanes: there, rows of different slices change places, too.
template <int NUMBER_BITS, int KS> DEVICE int place(int slice, int row, int span, int byte) {
    constexpr int BYTES = SPAN * NUMBER_BITS / 8;       // 128, 64, 32 or 16
    constexpr int ROWS = 128 / (SPANS * BYTES);         // that lie in all the banks
    row ^= slice * (ROWS > KS ? ROWS / KS : 1) % ROWS;  // a power of 2
    if constexpr (BYTES == 128) byte ^= row % 2 * 16;
    else span ^= row / (64 / BYTES) % SPANS;
    return (row * SPANS + span) * BYTES + byte;
}

// Slices `first` to first + KS - 1 of rows first_row to first_row + ROWS - 1 -> [KS, ROWS, SLICE],
// with zeros for what is not there.
template <int ROWS, int NUMBER_BITS, class S>
DEVICE void copy_slices(
    unsigned char* to, const void* from, int first_row, int n_rows, int first, int n_in
) {
    constexpr int PIECES = SLICE * NUMBER_BITS / 128;  // of 16 bytes, of a row of a slice
    constexpr int ALL = ROWS * S::KS * PIECES;
    const int row_pieces = n_in * NUMBER_BITS / 128;
#pragma unroll
    for (int j = 0; j < (ALL + S::THREADS - 1) / S::THREADS; j++) {
        const int i = j * S::THREADS + threadIdx.x;
        if (ALL % S::THREADS && i >= ALL) break;
        const int row = i / (S::KS * PIECES), slice = i / PIECES % S::KS, piece = i % PIECES;
        const int at = (first + slice) * PIECES + piece;
        const bool there = first_row + row < n_rows && at < row_pieces;
        const long long source = there ? (first_row + row) * (long long)row_pieces + at : 0;
        const int span = piece / (PIECES / SPANS), rest = piece % (PIECES / SPANS);
        unsigned char* target = to + slice * (ROWS * PIECES * 16);
        copy_async(
            target + place<NUMBER_BITS, S::KS>(slice, row, span, rest * 16),
            (const Bytes16*)from + source, there
        );
    }
}

#if BITS
// Scales, or offsets, of the same slices -> [KS, RUNS, M].
template <class S>
DEVICE void copy_scales(
    unsigned char* to, const float* from, int first_row, int n_rows, int first, int n_in
) {
    constexpr int N = S::KS * RUNS;
#pragma unroll
    for (int i = threadIdx.x; i < S::M * N; i += S::THREADS) {
        const int row = i / N, run = i % N, input = first * SLICE + run * RUN;
        const bool there = first_row + row < n_rows && input < n_in;
        const int at = there ? (first_row + row) * (n_in / GROUP) + input / GROUP : 0;
        copy_async_word(to + (run * S::M + row) * 4, from + at, there);
    }
}
#endif

// Eight numbers in pairs, as sums of N, of which the first are the largest.
template <int N> struct Numbers { Bytes16 part[N]; };

// Numbers 8t to 8t + 7 of a span of a row of a slice, which are not codes. (Their rows are long.)
DEVICE Numbers<X_PARTS> read(const unsigned char* from, int row, int span, int t) {
    Numbers<X_PARTS> y;
#pragma unroll
    for (int i = 0; i < (FLOATS ? 2 : 1); i++) {
        const unsigned char* at = from + place<X_BITS, 1>(0, row, span, t * X_BITS + i * 16);
        if constexpr (FLOATS) {
            auto four = *(const Several<float, 4>*)at;
#pragma unroll
            for (int part = 0; part < X_PARTS; part++)
#pragma unroll
                for (int j = 0; j < 2; j++)
                    y.part[part].word[i * 2 + j] = cut(four.x[2 * j], four.x[2 * j + 1]);
        } else {
            y.part[0] = *(const Bytes16*)at;
        }
    }
    return y;
}

template <class S>
DEVICE Numbers<WEIGHT_PARTS> read_weights(
    const unsigned char* from, int slice, int row, int span, int t
) {
#if BITS
    constexpr int N = 32 / BITS;  // codes in a word
    const unsigned char* at = from + place<BITS, S::KS>(slice, row, span, t * BITS);
    const auto words = *(const Several<unsigned, 8 / N>*)at;
    float y[8 / N][N];
#pragma unroll
    for (int i = 0; i < 8 / N; i++) unpack_codes(words.x[i], y[i]);
    Numbers<1> codes;
#pragma unroll
    for (int i = 0; i < 4; i++)
        codes.part[0].word[i] =
            pack<SHORT>(y[2 * i / N][2 * i % N], y[2 * i / N][2 * i % N + 1]);
    return codes;
#else
    return read(from, row, span, t);
#endif
}

// c += the product of a span: rows g and g + 8 of weights times rows of x.
template <int M, int N> DEVICE void multiply_span(
    float (&c)[4], const Numbers<M>& low, const Numbers<M>& high, const Numbers<N>& x
) {
#pragma unroll
    for (int sum = min(M + N - 2, 2); sum >= 0; sum--)  // the smallest products first
#pragma unroll
        for (int part = 0; part < M; part++) {
            if (sum - part < 0 || sum - part >= N) continue;
            const Bytes16 &a = low.part[part], &b = high.part[part], &y = x.part[sum - part];
#pragma unroll
            for (int i = 0; i < 4; i += 2)
                mma(c, {a.word[i], b.word[i], a.word[i + 1], b.word[i + 1]},
                    {y.word[i], y.word[i + 1]}, SHORT());
        }
}

// This warp's part of a stage; sum [TM, TN] tiles of outputs and rows.
template <class S>
DEVICE void multiply_stage(float (&sum)[S::TM][S::TN][4], const unsigned char* stage) {
    const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const int slice = warp / (S::MS * S::NS);
    const int first_m = warp % S::MS * (S::TM * 16) + g;
    const int first_n = warp / S::MS % S::NS * (S::TN * 8) + g;
    const unsigned char* weights = stage + slice * (S::WEIGHTS / S::KS);
    const unsigned char* x_slice = stage + S::WEIGHTS + slice * (S::X / S::KS);
    constexpr int TOGETHER = BITS ? RUN / SPAN : 1;  // spans that have a sum of their own
#pragma unroll
    for (int run = 0; run < SPANS / TOGETHER; run++) {
        Numbers<X_PARTS> x[TOGETHER][S::TN];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++)
#pragma unroll
            for (int n = 0; n < S::TN; n++)
                x[i][n] = read(x_slice, first_n + n * 8, run * TOGETHER + i, t);
#if BITS
        float sum_x[S::TN][4] = {};
        const unsigned one = pack<SHORT>(1.0f, 1.0f);
        const Numbers<1> ones = {{{one, one, one, one}}};
#pragma unroll
        for (int i = 0; i < TOGETHER; i++)
#pragma unroll
            for (int n = 0; n < S::TN; n++) multiply_span(sum_x[n], ones, ones, x[i][n]);
        const float* scales =
            (const float*)(stage + S::WEIGHTS + S::X) + (slice * RUNS + run) * S::M;
        const float* offsets = scales + S::SCALES / 4;
#endif
#pragma unroll
        for (int m = 0; m < S::TM; m++) {
            const int row = first_m + m * 16;
            float own[S::TN][4] = {};
            auto& product = BITS || FLOATS ? own : sum[m];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const int span = run * TOGETHER + i;
                const auto low = read_weights<S>(weights, slice, row, span, t);
                const auto high = read_weights<S>(weights, slice, row + 8, span, t);
#pragma unroll
                for (int n = 0; n < S::TN; n++) multiply_span(product[n], low, high, x[i][n]);
            }
#if BITS
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float scale = scales[row + i / 2 * 8];
                const float offset = offsets[row + i / 2 * 8] - ZERO * scale;
#pragma unroll
                for (int n = 0; n < S::TN; n++)
                    sum[m][n][i] += scale * product[n][i] + offset * sum_x[n][i];
            }
#else
            if constexpr (FLOATS)
#pragma unroll
                for (int n = 0; n < S::TN; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) sum[m][n][i] += product[n][i];
#endif
        }
    }
}

// The sums of all warps -> out, with what follows the product.
template <class S>
DEVICE void finish(
    const float (&sum)[S::TM][S::TN][4], float* room, int first_output, int first_row,
    const REAL* bias, const float* residual, void* out, int n_rows, int n_out, int activation,
    int wide
) {
    const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const int first_m = warp % S::MS * (S::TM * 16) + g;
    const int first_n = warp / S::MS * (S::TN * 8) + 2 * t;  // past N: of the next part of inputs
#pragma unroll
    for (int m = 0; m < S::TM; m++)
#pragma unroll
        for (int n = 0; n < S::TN; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                room[(first_n + n * 8 + i % 2) * S::STRIDE + first_m + m * 16 + i / 2 * 8] =
                    sum[m][n][i];
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < S::M * S::N; i += S::THREADS) {
        const int m = i % S::M, n = i / S::M, output = first_output + m;
        if (output >= n_out || first_row + n >= n_rows) continue;
        const long long at = (long long)(first_row + n) * n_out + output;
        float y = bias ? to_float(bias[output]) : 0.0f;
#pragma unroll
        for (int part = 0; part < S::KS; part++)
            y += room[(part * S::N + n) * S::STRIDE + m];
        y = activated(y, activation);
        if (residual) y += residual[at];
        if (wide) ((float*)out)[at] = y;
        else ((REAL*)out)[at] = from_float<REAL>(y);
    }
}

template <class S>
DEVICE void multiply(
    const REAL* x, const void* weight, const float* scales, const float* offsets,
    const REAL* bias, const float* residual, void* out, int n_rows, int n_in, int n_out,
    int activation, int wide
) {
    DYNAMIC_SHARED(shared);
    const int first_row = blockIdx.x * S::N, first_output = blockIdx.y * S::M;
    const int n_steps = (n_in + S::KS * SLICE - 1) / (S::KS * SLICE);

    const auto stage = [&](int step) { return shared + step % S::STAGES * S::STAGE; };
    const auto copy_weights = [&](int step) {
        if (step >= n_steps) return;
        const int first = step * S::KS;
        unsigned char* to = stage(step);
        copy_slices<S::M, WEIGHT_BITS, S>(to, weight, first_output, n_out, first, n_in);
#if BITS
        to += S::WEIGHTS + S::X;
        copy_scales<S>(to, scales, first_output, n_out, first, n_in);
        copy_scales<S>(to + S::SCALES, offsets, first_output, n_out, first, n_in);
#endif
    };
    const auto copy_x = [&](int step) {
        if (step < n_steps)
            copy_slices<S::N, X_BITS, S>(
                stage(step) + S::WEIGHTS, x, first_row, n_rows, step * S::KS, n_in
            );
        copy_async_commit();  // a group for each step, if an empty one
    };

    for (int step = 0; step < S::STAGES - 1; step++) copy_weights(step);
    let_next_start();
    wait_for_previous();
    for (int step = 0; step < S::STAGES - 1; step++) copy_x(step);

    float sum[S::TM][S::TN][4] = {};
    for (int step = 0; step < n_steps; step++) {
        copy_async_wait<S::STAGES - 2>();
        __syncthreads();  // and all are done with the stage that is filled next
        copy_weights(step + S::STAGES - 1);
        copy_x(step + S::STAGES - 1);
        multiply_stage<S>(sum, stage(step));
    }
    copy_async_wait<0>();
    __syncthreads();
    finish<S>(
        sum, (float*)shared, first_output, first_row, bias, residual, out, n_rows, n_out,
        activation, wide
    );
}

}  // namespace tiles

// out [n_rows, n_out] = activation(x [n_rows, n_in] · weight [n_out, n_in] + bias) + residual, a
// tile of M outputs and N rows to a block. out is float32 if `wide`, else REAL; bias and residual
// may be null. n_in is a multiple of 8 (codes: of GROUP); all arrays begin at multiples of 16
// bytes. Grid (n_rows / N, n_out / M), rounded up: the blocks that read the same weights come
// together. Block: THREADS.
#define LINEAR_TILES(M, N, MS, NS, KS, STAGES)                                                    \
    extern "C" __global__ void __launch_bounds__(MS * NS * KS * WARP, 1) linear_tiles_##M##x##N(  \
        const REAL* x, const void* weight, const float* scales, const float* offsets,             \
        const REAL* bias, const float* residual, void* out, int n_rows, int n_in, int n_out,      \
        int activation, int wide                                                                  \
    ) {                                                                                           \
        tiles::multiply<tiles::Shape<M, N, MS, NS, KS, STAGES>>(                                  \
            x, weight, scales, offsets, bias, residual, out, n_rows, n_in, n_out, activation,     \
            wide                                                                                  \
        );                                                                                        \
    }

LINEAR_TILES(16, 16, 1, 1, 4, 4)
LINEAR_TILES(32, 32, 1, 1, 4, 3)
LINEAR_TILES(48, 48, 1, 2, 4, 3)
LINEAR_TILES(64, 64, 2, 2, 2, 3)
LINEAR_TILES(96, 64, 2, 2, 2, 3)
LINEAR_TILES(128, 128, 2, 4, 1, 3)
