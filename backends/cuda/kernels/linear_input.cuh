// The rows of x that `gemv.cu` multiplies: how they come into shared memory.
//
// The parts (16 bytes) of x that meet the same part of 8 neighboring vectors of weights lie side by
// side, so that reading them has no bank conflict; turned by the number of the part, so that
// writing has none either. Every block brings them, and normalizes them, for itself.

namespace few {

constexpr bool BY_MMA = BITS == 0 && sizeof(REAL) == 2;  // else x becomes floats
constexpr int NUMBERS = 128 / (BITS ? BITS : 8 * (int)sizeof(REAL));  // weights in a vector
constexpr int PARTS = NUMBERS / (BY_MMA ? 8 : 4);  // 16 bytes of x each, that meet a vector
constexpr int MOST_WARPS = 12;

using Four = Several<float, 4>;

DEVICE unsigned thread() { return threadIdx.y * blockDim.x + threadIdx.x; }
DEVICE unsigned lane() { return thread() % WARP; }

// R rows of x in shared memory.
//
// As floats, a place holds 4 numbers of a row. For `mma` it holds a lane's operand: of 4 numbers
// from a vector, those of two rows; or, if there is but one row, the first 4 numbers of the vector
// as if of one row and the last 4 as if of the other.
template <int R> struct Inputs {
    Bytes16* x;               // [vectors / 8, PARTS, R, 8]
    Several<float, R>* sums;  // over a vector, [vectors]; only with codes

    DEVICE Bytes16& at(int row, int vector, int part) const {
        const int place = vector % 8 ^ part * (8 / PARTS);
        return x[((vector / 8 * PARTS + part) * R + row) * 8 + place];
    }

    // Numbers 4i to 4i + 3 of a row, if they are there; neighboring lanes come with neighboring i.
    DEVICE void put(int row, int i, const Four& y, bool there) const {
        if constexpr (BY_MMA) {
            const int half = i % 2, first = R == 1 ? half : row % 2;
            if (there) {
                auto* pairs = (Several<REAL, 2>*)&at(R == 1 ? 0 : row / 2 * 2 + half, i / 2, 0);
                pairs[first] = {from_float<REAL>(y.x[0]), from_float<REAL>(y.x[1])};
                pairs[first + 2] = {from_float<REAL>(y.x[2]), from_float<REAL>(y.x[3])};
            }
        } else if (there) {
            *(Four*)&at(row, i / PARTS, i % PARTS) = y;
        }
        if constexpr (BITS > 0) {
            float sum = y.x[0] + y.x[1] + y.x[2] + y.x[3];
#pragma unroll
            for (int other = 1; other < PARTS; other *= 2)
                sum += __shfl_xor_sync(ALL_LANES, sum, other);
            if (there && i % PARTS == 0) sums[i / PARTS].x[row] = sum;
        }
    }
};

// Which rows, and which numbers of a row, are a warp's: one of the `n_warps` that share a row, at
// most `most`, or the only one, with every `step`th row.
struct Share {
    int first, step, n_warps, number;

    DEVICE Share() {}
    DEVICE Share(int n_rows, int most) {
        const int warp = thread() / WARP, n = blockDim.x * blockDim.y / WARP;
        step = min(n_rows, n);
        number = warp / step;
        first = number < most ? warp % step : n_rows;
        n_warps = min((n - warp % step + step - 1) / step, most);
    }

    // f(i, numbers 4i to 4i + 3 of a row, whether they are there), loaded some at a time; the lanes
    // of a warp stay together.
    template <class X, class F> DEVICE void read(const X* row, int n_in, F f) const {
        constexpr int AHEAD = 4;
#pragma unroll 1
        for (int i = number * WARP; i < n_in / 4; i += AHEAD * n_warps * WARP) {
            Several<X, 4> four[AHEAD] = {};
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const int at = i + j * n_warps * WARP + lane();
                if (at < n_in / 4) four[j] = ((const Several<X, 4>*)row)[at];
            }
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const int at = i + j * n_warps * WARP;
                if (at < n_in / 4) f(at + lane(), four[j], at + lane() < n_in / 4);
            }
        }
    }
    // f(i, whether there is such an i), in the same order.
    template <class F> DEVICE void each(int n_in, F f) const {
#pragma unroll 1
        for (int i = number * WARP; i < n_in / 4; i += n_warps * WARP)
            f(i + lane(), i + lane() < n_in / 4);
    }
};

// Rows of x [n_rows, n_in] as they are.
template <int R> struct Plain {
    const REAL* x;
    Share share;

    DEVICE Plain(const REAL* x) : x(x) {}

    // What can be done before the kernel ahead has ended, with room in shared memory.
    DEVICE void begin(unsigned char*, int n_rows, int) { share = Share(n_rows, MOST_WARPS); }

    DEVICE void bring(const Inputs<R>& inputs, int first_row, int n_rows, int n_in) const {
        for (int row = share.first; row < n_rows; row += share.step) {
            const REAL* from = x + (long long)(first_row + row) * n_in;
            share.read(from, n_in, [&](int i, auto four, bool there) {
                Four y;
#pragma unroll
                for (int j = 0; j < 4; j++) y.x[j] = to_float(four.x[j]);
                inputs.put(row, i, y, there);
            });
        }
        __syncthreads();
    }
};

// Rows of the residual stream x [n_rows, n_in] after their layer norm.
template <int R> struct Normalized {
    static constexpr int MOST = 4;  // warps that share a row: more lose time over their sums
    const float* x;
    const REAL *weight, *bias;
    float epsilon, part;  // 1 / n_in
    Share share;
    // In shared memory:
    REAL* norm;  // weight and bias [2, n_in]
    Four* raw;   // x [R, n_in / 4]

    DEVICE Normalized(const float* x, const REAL* weight, const REAL* bias, float epsilon)
        : x(x), weight(weight), bias(bias), epsilon(epsilon) {}

    DEVICE void begin(unsigned char* room, int n_rows, int n_in) {
        norm = (REAL*)room;
        raw = (Four*)(norm + 2 * n_in);
        for (int i = thread(); i < n_in / PER_LOAD<REAL>; i += blockDim.x * blockDim.y) {
            copy_async(norm + i * PER_LOAD<REAL>, weight + i * PER_LOAD<REAL>);
            copy_async(norm + n_in + i * PER_LOAD<REAL>, bias + i * PER_LOAD<REAL>);
        }
        copy_async_commit();
        share = Share(n_rows, MOST);
        part = 1.0f / n_in;
    }

    DEVICE void bring(const Inputs<R>& inputs, int first_row, int n_rows, int n_in) const {
        __shared__ Four seen[R][MOST];  // by a warp: how many numbers, mean, squares
        for (int row = share.first; row < n_rows; row += share.step) {
            const float* from = x + (long long)(first_row + row) * n_in;
            Four* own = raw + row * (n_in / 4);
            float n = 0.0f, sum = 0.0f, squares = 0.0f;
            share.read(from, n_in, [&](int i, Four y, bool there) {
                if (!there) return;
                own[i] = y;
                n += 4.0f;
                sum += y.x[0] + y.x[1] + y.x[2] + y.x[3];
            });
            n = warp_sum(n);
            const float mean = warp_sum(sum) / fmaxf(n, 1.0f);
            share.each(n_in, [&](int i, bool there) {
                if (!there) return;
                const Four y = own[i];
#pragma unroll
                for (int j = 0; j < 4; j++)  // differences: the mean may be large beside them
                    squares += (y.x[j] - mean) * (y.x[j] - mean);
            });
            squares = warp_sum(squares);
            if (lane() == 0) seen[row][share.number] = {n, mean, squares};
        }
        copy_async_wait<0>();
        __syncthreads();
        for (int row = share.first; row < n_rows; row += share.step) {
            Four by_warp[MOST];
            float mean = 0.0f, variance = 0.0f;
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                by_warp[i] = i < share.n_warps ? seen[row][i] : Four();
                mean += by_warp[i].x[0] * by_warp[i].x[1] * part;
            }
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                const float d = by_warp[i].x[1] - mean;
                variance += (by_warp[i].x[2] + by_warp[i].x[0] * d * d) * part;
            }
            const float scale = rsqrtf(variance + epsilon);
            share.each(n_in, [&](int i, bool there) {
                Four y = {};
                if (there) {
                    const auto w = ((const Several<REAL, 4>*)norm)[i];
                    const auto b = ((const Several<REAL, 4>*)(norm + n_in))[i];
                    y = raw[row * (n_in / 4) + i];
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        y.x[j] = (y.x[j] - mean) * scale * to_float(w.x[j]) + to_float(b.x[j]);
                }
                inputs.put(row, i, y, there);
            });
        }
        __syncthreads();
    }
};

}  // namespace few
