// GEMM on tensor cores: out = activation(x · weightᵀ + bias) + residual, for 9 rows and more.
//
// Data movement dominates the time. A tile of M outputs and N rows loads M + N rows of n_in numbers
// to its multiprocessor, from memory or the L2 cache. Large tiles load less in total, small tiles
// keep all multiprocessors busy; `linear.py` selects the tile size with the lowest cost. In small
// tiles, KS groups of warps split the inputs (split-K), and their sums are added at the end.
//
// Weights and x pass through shared memory in a pipeline of STAGES stages. A stage has KS slices of
// 64 inputs (32 for float32). The first weights are loaded before grid_dependency_sync. Of each
// span of 32 inputs, lane 4g + t of a warp reads elements 8t to 8t + 7 of rows g, g + 8, ... of
// weights and of x. This permutes the inputs of `mma` equally in both operands, so that a read of
// 16 bytes contains a lane's operands of two `mma`, and quantized values stay packed in shared
// memory. The layout is swizzled: lanes that read together use different banks.
//
// float32 uses bf16x3: a float is the sum of three bf16 numbers with 8 bits of the significand
// each. Of the nine partial products, the three smallest are below the rounding error of float32,
// and omitted. Tensor cores truncate their sums, so each span has a separate sum, and float32
// additions accumulate the spans.
//
// Quantized values are integers that 16-bit floats represent exactly. Each quantization group has a
// separate sum, to which scale and offset are applied in float32; a product with ones sums x.

namespace gemm {

constexpr bool IS_FLOAT32 = sizeof(REAL) == 4;
template <class T> struct MmaType { using type = T; };
template <> struct MmaType<float> { using type = bf16_t; };
using MMA_TYPE = MmaType<REAL>::type;  // of the operands of mma
// Operands of mma that represent one number.
constexpr int X_TERMS = IS_FLOAT32 ? 3 : 1, WEIGHT_TERMS = BITS ? 1 : X_TERMS;

constexpr int SPAN = 32, SPANS = IS_FLOAT32 ? 1 : 2, SLICE = SPANS * SPAN;
constexpr int X_BITS = 8 * sizeof(REAL), WEIGHT_BITS = BITS ? BITS : X_BITS;
constexpr int RUN = BITS && GROUP < SLICE ? GROUP : SLICE;  // inputs with one scale in a slice
constexpr int RUNS = BITS ? SLICE / RUN : 0;                // scales of a row in a slice
[[maybe_unused]] constexpr float ZERO = BITS == 4 ? 16.0f : 0.0f;  // unpack_quantized of 0

// Tile of a block: M outputs and N rows. MS x NS warps divide the tile; KS such groups divide the
// inputs.
template <int M_, int N_, int MS_, int NS_, int KS_, int STAGES_>
struct TileShape {
    static constexpr int M = M_, N = N_, MS = MS_, NS = NS_, KS = KS_, STAGES = STAGES_;
    static constexpr int THREADS = MS * NS * KS * WARP;
    static constexpr int TM = M / MS / 16, TN = N / NS / 8;  // mma tiles of a warp
    // A stage: weights [KS, M, SLICE], x [KS, N, SLICE], scales and offsets [2, KS, RUNS, M].
    static constexpr int WEIGHT_BYTES = KS * M * SLICE * WEIGHT_BITS / 8;
    static constexpr int X_BYTES = KS * N * SLICE * X_BITS / 8;
    static constexpr int SCALE_BYTES = KS * RUNS * M * 4;
    static constexpr int STAGE_BYTES = WEIGHT_BYTES + X_BYTES + 2 * SCALE_BYTES;
    // At the end, the same memory holds sums [KS, N, STRIDE], with rows 2t (see `mma`) in different
    // banks.
    static constexpr int STRIDE = M + 4;
};

// The swizzled offset of a byte of a span, in a row of a slice. Consecutive lanes write short rows
// of several slices, so the swizzle depends on the slice, too.
template <int NUMBER_BITS, int KS> DEVICE int swizzled(int slice, int row, int span, int byte) {
    constexpr int BYTES = SPAN * NUMBER_BITS / 8;       // 128, 64, 32 or 16
    constexpr int ROWS = 128 / (SPANS * BYTES);         // that cover all banks
    row ^= slice * (ROWS > KS ? ROWS / KS : 1) % ROWS;  // a power of 2
    if constexpr (BYTES == 128) byte ^= row % 2 * 16;
    else span ^= row / (64 / BYTES) % SPANS;
    return (row * SPANS + span) * BYTES + byte;
}

// Copy slices `first` to first + KS - 1 of rows first_row to first_row + ROWS - 1 to [KS, ROWS,
// SLICE] asynchronously, with zeros past the ends.
template <int ROWS, int NUMBER_BITS, class Shape>
DEVICE void copy_slices(
    unsigned char* to, const void* from, int first_row, int n_rows, int first, int n_in
) {
    constexpr int VECTORS = SLICE * NUMBER_BITS / 128;  // of 16 bytes in a row of a slice
    constexpr int ALL = ROWS * Shape::KS * VECTORS;
    const int row_vectors = n_in * NUMBER_BITS / 128;
#pragma unroll
    for (int j = 0; j < (ALL + Shape::THREADS - 1) / Shape::THREADS; j++) {
        const int i = j * Shape::THREADS + threadIdx.x;
        if (ALL % Shape::THREADS && i >= ALL) break;
        const int row = i / (Shape::KS * VECTORS), slice = i / VECTORS % Shape::KS;
        const int vector = i % VECTORS;
        const int at = (first + slice) * VECTORS + vector;
        const bool valid = first_row + row < n_rows && at < row_vectors;
        const long long source = valid ? (first_row + row) * (long long)row_vectors + at : 0;
        const int span = vector / (VECTORS / SPANS), rest = vector % (VECTORS / SPANS);
        unsigned char* target = to + slice * (ROWS * VECTORS * 16);
        copy_async(
            target + swizzled<NUMBER_BITS, Shape::KS>(slice, row, span, rest * 16),
            (const Bytes16*)from + source, valid
        );
    }
}

#if BITS
// Copy scales or offsets of the same slices to [KS, RUNS, M] asynchronously.
template <class Shape>
DEVICE void copy_scales(
    unsigned char* to, const float* from, int first_row, int n_rows, int first, int n_in
) {
    constexpr int N = Shape::KS * RUNS;
#pragma unroll
    for (int i = threadIdx.x; i < Shape::M * N; i += Shape::THREADS) {
        const int row = i / N, run = i % N, input = first * SLICE + run * RUN;
        const bool valid = first_row + row < n_rows && input < n_in;
        const int at = valid ? (first_row + row) * (n_in / GROUP) + input / GROUP : 0;
        copy_async_4(to + (run * Shape::M + row) * 4, from + at, valid);
    }
}
#endif

// Eight numbers as packed 16-bit terms; a number is the sum of N terms, the first is the largest.
template <int N> struct Terms { Bytes16 term[N]; };

// Read elements 8t to 8t + 7 of a span, of type REAL.
DEVICE Terms<X_TERMS> read_terms(const unsigned char* from, int row, int span, int t) {
    Terms<X_TERMS> y;
#pragma unroll
    for (int i = 0; i < (IS_FLOAT32 ? 2 : 1); i++) {
        const unsigned char* at = from + swizzled<X_BITS, 1>(0, row, span, t * X_BITS + i * 16);
        if constexpr (IS_FLOAT32) {
            auto four = *(const Vec<float, 4>*)at;
#pragma unroll
            for (int part = 0; part < X_TERMS; part++)
#pragma unroll
                for (int j = 0; j < 2; j++)
                    y.term[part].word[i * 2 + j] = pack_truncated(four.x[2 * j], four.x[2 * j + 1]);
        } else {
            y.term[0] = *(const Bytes16*)at;
        }
    }
    return y;
}

template <class Shape>
DEVICE Terms<WEIGHT_TERMS> read_weights(
    const unsigned char* from, int slice, int row, int span, int t
) {
#if BITS
    constexpr int N = 32 / BITS;  // quantized values in a word
    const unsigned char* at = from + swizzled<BITS, Shape::KS>(slice, row, span, t * BITS);
    const auto words = *(const Vec<unsigned, 8 / N>*)at;
    float y[8 / N][N];
#pragma unroll
    for (int i = 0; i < 8 / N; i++) unpack_quantized(words.x[i], y[i]);
    Terms<1> result;
#pragma unroll
    for (int i = 0; i < 4; i++)
        result.term[0].word[i] =
            pack<MMA_TYPE>(y[2 * i / N][2 * i % N], y[2 * i / N][2 * i % N + 1]);
    return result;
#else
    return read_terms(from, row, span, t);
#endif
}

// c += the product of a span: rows g and g + 8 of the weights times rows of x.
template <int M, int N> DEVICE void multiply_span(
    float (&c)[4], const Terms<M>& low, const Terms<M>& high, const Terms<N>& x
) {
#pragma unroll
    for (int sum = min(M + N - 2, 2); sum >= 0; sum--)  // the smallest products first
#pragma unroll
        for (int part = 0; part < M; part++) {
            if (sum - part < 0 || sum - part >= N) continue;
            const Bytes16 &a = low.term[part], &b = high.term[part], &y = x.term[sum - part];
#pragma unroll
            for (int i = 0; i < 4; i += 2)
                mma(c, {a.word[i], b.word[i], a.word[i + 1], b.word[i + 1]},
                    {y.word[i], y.word[i + 1]}, MMA_TYPE());
        }
}

// Multiply this warp's part of a stage; sum: [TM, TN] tiles of outputs and rows.
template <class Shape>
DEVICE void multiply_stage(float (&sum)[Shape::TM][Shape::TN][4], const unsigned char* stage) {
    const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const int slice = warp / (Shape::MS * Shape::NS);
    const int first_m = warp % Shape::MS * (Shape::TM * 16) + g;
    const int first_n = warp / Shape::MS % Shape::NS * (Shape::TN * 8) + g;
    const unsigned char* weights = stage + slice * (Shape::WEIGHT_BYTES / Shape::KS);
    const unsigned char* x_slice =
        stage + Shape::WEIGHT_BYTES + slice * (Shape::X_BYTES / Shape::KS);
    constexpr int SPANS_PER_SUM = BITS ? RUN / SPAN : 1;  // spans with a separate sum
#pragma unroll
    for (int run = 0; run < SPANS / SPANS_PER_SUM; run++) {
        Terms<X_TERMS> x[SPANS_PER_SUM][Shape::TN];
#pragma unroll
        for (int i = 0; i < SPANS_PER_SUM; i++)
#pragma unroll
            for (int n = 0; n < Shape::TN; n++)
                x[i][n] = read_terms(x_slice, first_n + n * 8, run * SPANS_PER_SUM + i, t);
#if BITS
        float sum_x[Shape::TN][4] = {};
        const unsigned one = pack<MMA_TYPE>(1.0f, 1.0f);
        const Terms<1> ones = {{{one, one, one, one}}};
#pragma unroll
        for (int i = 0; i < SPANS_PER_SUM; i++)
#pragma unroll
            for (int n = 0; n < Shape::TN; n++) multiply_span(sum_x[n], ones, ones, x[i][n]);
        const float* scales = (const float*)(stage + Shape::WEIGHT_BYTES + Shape::X_BYTES) +
                              (slice * RUNS + run) * Shape::M;
        const float* offsets = scales + Shape::SCALE_BYTES / 4;
#endif
#pragma unroll
        for (int m = 0; m < Shape::TM; m++) {
            const int row = first_m + m * 16;
            float separate[Shape::TN][4] = {};
            auto& product = BITS || IS_FLOAT32 ? separate : sum[m];
#pragma unroll
            for (int i = 0; i < SPANS_PER_SUM; i++) {
                const int span = run * SPANS_PER_SUM + i;
                const auto low = read_weights<Shape>(weights, slice, row, span, t);
                const auto high = read_weights<Shape>(weights, slice, row + 8, span, t);
#pragma unroll
                for (int n = 0; n < Shape::TN; n++) multiply_span(product[n], low, high, x[i][n]);
            }
#if BITS
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float scale = scales[row + i / 2 * 8];
                const float offset = offsets[row + i / 2 * 8] - ZERO * scale;
#pragma unroll
                for (int n = 0; n < Shape::TN; n++)
                    sum[m][n][i] += scale * product[n][i] + offset * sum_x[n][i];
            }
#else
            if constexpr (IS_FLOAT32)
#pragma unroll
                for (int n = 0; n < Shape::TN; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) sum[m][n][i] += product[n][i];
#endif
        }
    }
}

// Epilogue: add the sums of all warps, apply bias, activation and residual -> out.
template <class Shape>
DEVICE void write_output(
    const float (&sum)[Shape::TM][Shape::TN][4], float* sums, int first_output, int first_row,
    const REAL* bias, const float* residual, void* out, int n_rows, int n_out, int activation,
    int float32_out
) {
    const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const int first_m = warp % Shape::MS * (Shape::TM * 16) + g;
    const int first_n = warp / Shape::MS * (Shape::TN * 8) + 2 * t;  // from N on: of the next split
#pragma unroll
    for (int m = 0; m < Shape::TM; m++)
#pragma unroll
        for (int n = 0; n < Shape::TN; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                sums[(first_n + n * 8 + i % 2) * Shape::STRIDE + first_m + m * 16 + i / 2 * 8] =
                    sum[m][n][i];
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < Shape::M * Shape::N; i += Shape::THREADS) {
        const int m = i % Shape::M, n = i / Shape::M, output = first_output + m;
        if (output >= n_out || first_row + n >= n_rows) continue;
        const long long at = (long long)(first_row + n) * n_out + output;
        float y = bias ? to_float(bias[output]) : 0.0f;
#pragma unroll
        for (int part = 0; part < Shape::KS; part++)
            y += sums[(part * Shape::N + n) * Shape::STRIDE + m];
        y = apply_activation(y, activation);
        if (residual) y += residual[at];
        if (float32_out) ((float*)out)[at] = y;
        else ((REAL*)out)[at] = from_float<REAL>(y);
    }
}

template <class Shape>
DEVICE void multiply(
    const REAL* x, const void* weight, const float* scales, const float* offsets,
    const REAL* bias, const float* residual, void* out, int n_rows, int n_in, int n_out,
    int activation, int float32_out
) {
    DYNAMIC_SHARED(shared);
    const int first_row = blockIdx.x * Shape::N, first_output = blockIdx.y * Shape::M;
    const int n_steps = (n_in + Shape::KS * SLICE - 1) / (Shape::KS * SLICE);

    const auto stage = [&](int step) { return shared + step % Shape::STAGES * Shape::STAGE_BYTES; };
    const auto copy_weights = [&](int step) {
        if (step >= n_steps) return;
        const int first = step * Shape::KS;
        unsigned char* to = stage(step);
        copy_slices<Shape::M, WEIGHT_BITS, Shape>(to, weight, first_output, n_out, first, n_in);
#if BITS
        to += Shape::WEIGHT_BYTES + Shape::X_BYTES;
        copy_scales<Shape>(to, scales, first_output, n_out, first, n_in);
        copy_scales<Shape>(to + Shape::SCALE_BYTES, offsets, first_output, n_out, first, n_in);
#endif
    };
    const auto copy_x = [&](int step) {
        if (step < n_steps)
            copy_slices<Shape::N, X_BITS, Shape>(
                stage(step) + Shape::WEIGHT_BYTES, x, first_row, n_rows, step * Shape::KS, n_in
            );
        copy_async_commit();  // one group for each step, even if empty
    };

    for (int step = 0; step < Shape::STAGES - 1; step++) copy_weights(step);
    trigger_dependent_launch();
    grid_dependency_sync();
    for (int step = 0; step < Shape::STAGES - 1; step++) copy_x(step);

    float sum[Shape::TM][Shape::TN][4] = {};
    for (int step = 0; step < n_steps; step++) {
        copy_async_wait<Shape::STAGES - 2>();
        __syncthreads();  // no thread reads the stage that is overwritten next
        copy_weights(step + Shape::STAGES - 1);
        copy_x(step + Shape::STAGES - 1);
        multiply_stage<Shape>(sum, stage(step));
    }
    copy_async_wait<0>();
    __syncthreads();
    write_output<Shape>(
        sum, (float*)shared, first_output, first_row, bias, residual, out, n_rows, n_out,
        activation, float32_out
    );
}

}  // namespace gemm

// out [n_rows, n_out] = activation(x [n_rows, n_in] · weight [n_out, n_in] + bias) + residual, with
// a tile of M outputs and N rows in each block. out is float32 if `float32_out`, else REAL; bias
// and residual may be null. n_in is a multiple of 8 (of GROUP, if quantized). Arrays are aligned to
// 16 bytes. Grid (n_rows / N, n_out / M), rounded up: consecutive blocks read the same weights.
// Block: THREADS.
#define GEMM(M, N, MS, NS, KS, STAGES)                                                            \
    extern "C" __global__ void __launch_bounds__(MS * NS * KS * WARP, 1) gemm_##M##x##N(          \
        const REAL* x, const void* weight, const float* scales, const float* offsets,             \
        const REAL* bias, const float* residual, void* out, int n_rows, int n_in, int n_out,      \
        int activation, int float32_out                                                           \
    ) {                                                                                           \
        gemm::multiply<gemm::TileShape<M, N, MS, NS, KS, STAGES>>(                                \
            x, weight, scales, offsets, bias, residual, out, n_rows, n_in, n_out, activation,     \
            float32_out                                                                           \
        );                                                                                        \
    }

GEMM(16, 16, 1, 1, 4, 4)
GEMM(32, 32, 1, 1, 4, 3)
GEMM(48, 48, 1, 2, 4, 3)
GEMM(64, 64, 2, 2, 2, 3)
GEMM(96, 64, 2, 2, 2, 3)
GEMM(128, 128, 2, 4, 1, 3)
