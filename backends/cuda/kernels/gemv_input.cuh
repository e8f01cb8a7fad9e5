// Input of gemv.cu: load rows of x to shared memory, with or without layer norm. Each block loads
// and normalizes all of its rows.
//
// A vector of weights is multiplied by VECTOR_PARTS parts of x of 16 bytes. Equal parts for 8
// consecutive vectors are adjacent, so reads have no bank conflict. They are rotated by the number
// of the part, so writes have none either.

namespace gemv {

constexpr bool USE_MMA = BITS == 0 && sizeof(REAL) == 2;  // else x is converted to float32
constexpr int NUMBERS = 128 / (BITS ? BITS : 8 * (int)sizeof(REAL));  // weights in a vector
constexpr int VECTOR_PARTS = NUMBERS / (USE_MMA ? 8 : 4);  // of x for a vector
constexpr int MAX_WARPS = 12;

using Float4 = Vec<float, 4>;

DEVICE unsigned thread() { return threadIdx.y * blockDim.x + threadIdx.x; }
DEVICE unsigned lane() { return thread() % WARP; }

// R rows of x in shared memory.
//
// In float32, a part holds 4 elements of a row. For `mma`, a part holds a lane's operand: 4
// elements of a vector of two rows; or, if R is 1, the first 4 elements of the vector in place of
// one row and the last 4 in place of the other.
template <int R> struct Inputs {
    Bytes16* x;               // [vectors / 8, VECTOR_PARTS, R, 8]
    Vec<float, R>* sums;      // of each vector, [vectors]; if quantized

    DEVICE Bytes16& at(int row, int vector, int part) const {
        const int place = vector % 8 ^ part * (8 / VECTOR_PARTS);
        return x[((vector / 8 * VECTOR_PARTS + part) * R + row) * 8 + place];
    }

    // Store elements 4i to 4i + 3 of a row, if `valid`; consecutive lanes have consecutive i.
    DEVICE void store(int row, int i, const Float4& y, bool valid) const {
        if constexpr (USE_MMA) {
            const int half = i % 2, first = R == 1 ? half : row % 2;
            if (valid) {
                auto* pairs = (Vec<REAL, 2>*)&at(R == 1 ? 0 : row / 2 * 2 + half, i / 2, 0);
                pairs[first] = {from_float<REAL>(y.x[0]), from_float<REAL>(y.x[1])};
                pairs[first + 2] = {from_float<REAL>(y.x[2]), from_float<REAL>(y.x[3])};
            }
        } else if (valid) {
            *(Float4*)&at(row, i / VECTOR_PARTS, i % VECTOR_PARTS) = y;
        }
        if constexpr (BITS > 0) {
            float sum = y.x[0] + y.x[1] + y.x[2] + y.x[3];
#pragma unroll
            for (int other = 1; other < VECTOR_PARTS; other *= 2)
                sum += __shfl_xor_sync(FULL_MASK, sum, other);
            if (valid && i % VECTOR_PARTS == 0) sums[i / VECTOR_PARTS].x[row] = sum;
        }
    }
};

// The rows, and elements of a row, of a warp: `n_warps` <= `max_warps` share a row, or one warp has
// every `step`th row.
struct WarpShare {
    int first, step, n_warps, number;

    DEVICE WarpShare() {}
    DEVICE WarpShare(int n_rows, int max_warps) {
        const int warp = thread() / WARP, n = blockDim.x * blockDim.y / WARP;
        step = min(n_rows, n);
        number = warp / step;
        first = number < max_warps ? warp % step : n_rows;
        n_warps = min((n - warp % step + step - 1) / step, max_warps);
    }

    // Call f(i, elements 4i to 4i + 3 of a row, valid) for this warp's elements, AHEAD loads at a
    // time. The lanes of a warp do not diverge.
    template <class X, class F> DEVICE void read(const X* row, int n_in, F f) const {
        constexpr int AHEAD = 4;
#pragma unroll 1
        for (int i = number * WARP; i < n_in / 4; i += AHEAD * n_warps * WARP) {
            Vec<X, 4> loaded[AHEAD] = {};
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const int at = i + j * n_warps * WARP + lane();
                if (at < n_in / 4) loaded[j] = ((const Vec<X, 4>*)row)[at];
            }
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const int at = i + j * n_warps * WARP;
                if (at < n_in / 4) f(at + lane(), loaded[j], at + lane() < n_in / 4);
            }
        }
    }
    // Call f(i, valid) in the same order.
    template <class F> DEVICE void each(int n_in, F f) const {
#pragma unroll 1
        for (int i = number * WARP; i < n_in / 4; i += n_warps * WARP)
            f(i + lane(), i + lane() < n_in / 4);
    }
};

// Rows of x [n_rows, n_in] without layer norm.
template <int R> struct Plain {
    const REAL* x;
    WarpShare share;

    DEVICE Plain(const REAL* x) : x(x) {}

    // The work before grid_dependency_sync; the first argument is workspace in shared memory.
    DEVICE void prepare(unsigned char*, int n_rows, int) { share = WarpShare(n_rows, MAX_WARPS); }

    DEVICE void load(const Inputs<R>& inputs, int first_row, int n_rows, int n_in) const {
        for (int row = share.first; row < n_rows; row += share.step) {
            const REAL* from = x + (long long)(first_row + row) * n_in;
            share.read(from, n_in, [&](int i, auto elements, bool valid) {
                Float4 y;
#pragma unroll
                for (int j = 0; j < 4; j++) y.x[j] = to_float(elements.x[j]);
                inputs.store(row, i, y, valid);
            });
        }
        __syncthreads();
    }
};

// Rows of the residual stream x [n_rows, n_in] after their layer norm.
template <int R> struct Normalized {
    static constexpr int MAX_ROW_WARPS = 4;  // more spend the time on combining sums
    const float* x;
    const REAL *weight, *bias;
    float epsilon, inverse_n;  // 1 / n_in
    WarpShare share;
    // In shared memory:
    REAL* norm;   // weight and bias [2, n_in]
    Float4* raw;  // x [R, n_in / 4]

    DEVICE Normalized(const float* x, const REAL* weight, const REAL* bias, float epsilon)
        : x(x), weight(weight), bias(bias), epsilon(epsilon) {}

    DEVICE void prepare(unsigned char* workspace, int n_rows, int n_in) {
        norm = (REAL*)workspace;
        raw = (Float4*)(norm + 2 * n_in);
        constexpr int N = ELEMENTS_PER_LOAD<REAL>;
        for (int i = thread(); i < n_in / N; i += blockDim.x * blockDim.y) {
            copy_async(norm + i * N, weight + i * N);
            copy_async(norm + n_in + i * N, bias + i * N);
        }
        copy_async_commit();
        share = WarpShare(n_rows, MAX_ROW_WARPS);
        inverse_n = 1.0f / n_in;
    }

    DEVICE void load(const Inputs<R>& inputs, int first_row, int n_rows, int n_in) const {
        // By warp: number of elements, mean, sum of squared deviations.
        __shared__ Float4 statistics[R][MAX_ROW_WARPS];
        for (int row = share.first; row < n_rows; row += share.step) {
            const float* from = x + (long long)(first_row + row) * n_in;
            Float4* own = raw + row * (n_in / 4);
            float n = 0.0f, sum = 0.0f, squares = 0.0f;
            share.read(from, n_in, [&](int i, Float4 y, bool valid) {
                if (!valid) return;
                own[i] = y;
                n += 4.0f;
                sum += y.x[0] + y.x[1] + y.x[2] + y.x[3];
            });
            n = warp_sum(n);
            const float mean = warp_sum(sum) / fmaxf(n, 1.0f);
            share.each(n_in, [&](int i, bool valid) {
                if (!valid) return;
                const Float4 y = own[i];
#pragma unroll
                for (int j = 0; j < 4; j++)  // two passes: the mean may be large
                    squares += (y.x[j] - mean) * (y.x[j] - mean);
            });
            squares = warp_sum(squares);
            if (lane() == 0) statistics[row][share.number] = {n, mean, squares};
        }
        copy_async_wait<0>();
        __syncthreads();
        for (int row = share.first; row < n_rows; row += share.step) {
            Float4 by_warp[MAX_ROW_WARPS];
            float mean = 0.0f, variance = 0.0f;
#pragma unroll
            for (int i = 0; i < MAX_ROW_WARPS; i++) {
                by_warp[i] = i < share.n_warps ? statistics[row][i] : Float4();
                mean += by_warp[i].x[0] * by_warp[i].x[1] * inverse_n;
            }
#pragma unroll
            for (int i = 0; i < MAX_ROW_WARPS; i++) {
                const float d = by_warp[i].x[1] - mean;
                variance += (by_warp[i].x[2] + by_warp[i].x[0] * d * d) * inverse_n;
            }
            const float scale = rsqrtf(variance + epsilon);
            share.each(n_in, [&](int i, bool valid) {
                Float4 y = {};
                if (valid) {
                    const auto w = ((const Vec<REAL, 4>*)norm)[i];
                    const auto b = ((const Vec<REAL, 4>*)(norm + n_in))[i];
                    y = raw[row * (n_in / 4) + i];
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        y.x[j] = (y.x[j] - mean) * scale * to_float(w.x[j]) + to_float(b.x[j]);
                }
                inputs.store(row, i, y, valid);
            });
        }
        __syncthreads();
    }
};

}  // namespace gemv
