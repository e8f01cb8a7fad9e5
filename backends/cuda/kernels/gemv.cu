// Products of a few rows with a matrix, in the time that it takes to read the matrix once.
//
// A product of the smallest GPT-2 reads 1 to 5 MB: a microsecond or so, about as long as the first
// byte takes to come. So what counts is to ask for everything at once and to wait for nothing else:
//
// - A team of threads has OUTPUTS neighboring outputs: each thread loads 16 bytes (a vector) of
//   each of their rows, DEPTH times, into registers. 9 to 12 warps so hold all that a
//   multiprocessor has to read of a small matrix, and two blocks of 12 about 90 KB of a large one,
//   which is more than enough to keep the memory busy.
// - Then only does it wait for the kernel ahead, on which weights do not depend, and bring the rows
//   of x into shared memory, normalized if asked to: every block for itself, while its weights are
//   on their way. The next weights are asked for before these are summed up.
// - One block to a multiprocessor, two for large matrices, so that x is read once for each, of
//   blockDim (team, teams). A team is wide where outputs are few, and narrow where they are many:
//   8, 16 or a multiple of 32 threads, at least R · OUTPUTS. `backends/cupy_launch.py` chooses.
// - Numbers of 16 bits are multiplied by the matrix unit, for want of instructions, not of
//   multiplications: `mma` on vectors of x and of weights just as the lanes hold them has, on its
//   diagonal, the products that are wanted, each summed over four lanes; and the other seven
//   eighths are ignored. That takes 2 instructions for each vector and two rows, in place of 16 for
//   a row.
//
// Codes: a vector lies within a group, so that it adds scale · (codes · x) + offset · (sum of x);
// the sum of x over each vector is made once for the block.

namespace few {

// As many as registers allow for two blocks to a multiprocessor: this one, and the next kernel's.
constexpr int OUTPUTS = 2;
template <int R> constexpr int DEPTH = BITS == 0 ? 4 : R == 1 ? 3 : 2;
template <int R> constexpr int THREADS = R < 4 ? 384 : 256;

constexpr int PER_GROUP = BITS ? GROUP / NUMBERS : 1;  // vectors
constexpr float ZERO = BITS == 4 ? 16.0f : 0.0f;       // what unpack_codes makes of code 0

struct Matrix {
    const unsigned char* weight;
    const float *scales, *offsets;
    int n_in, n_out, n_vectors;  // vectors to a row

    DEVICE Matrix(
        const void* weight, const float* scales, const float* offsets, int n_in, int n_out
    ) : weight((const unsigned char*)weight), scales(scales), offsets(offsets), n_in(n_in),
        n_out(n_out), n_vectors(n_in / NUMBERS) {}
};

// Sums so far, of R rows and OUTPUTS outputs. By `mma`, two rows go together, [4] being what it
// leaves in a lane, and two chains of additions, where rows are few, are faster than one.
template <int R> struct Sums {
    static constexpr int PAIRS = BY_MMA ? (R + 1) / 2 : R;
    static constexpr int CHAINS = BY_MMA && R < 4 ? 2 : 1;
    float x[PAIRS][OUTPUTS][CHAINS][BY_MMA ? 4 : 1] = {};

    // What has to be summed over lanes.
    DEVICE void collect(float (&y)[R * OUTPUTS]) const {
        const int g = lane() / 4, t = lane() % 4;
#pragma unroll
        for (int i = 0; i < R * OUTPUTS; i++) {
            const int row = i / OUTPUTS, o = i % OUTPUTS;
            if constexpr (BY_MMA) {
                float c[2] = {};
#pragma unroll
                for (int chain = 0; chain < CHAINS; chain++)
#pragma unroll
                    for (int j = 0; j < 2; j++)
                        c[j] += x[row / 2][o][chain][(R == 1 ? chain : row % 2) * 2 + j];
                y[i] = t != g / 2 ? 0.0f : g % 2 ? c[1] : c[0];  // on the diagonal
            } else {
                y[i] = x[row][o][0][0];
            }
        }
    }
};

#if BITS
// Four weights, part `part` of a vector.
DEVICE void unpack_part(const Bytes16& vector, int part, float (&y)[4]) {
#if BITS == 8
    unpack_codes(vector.word[part], y);
#else
    float eight[8];
    unpack_codes(vector.word[part / 2], eight);
#pragma unroll
    for (int i = 0; i < 4; i++) y[i] = eight[part % 2 * 4 + i];
#endif
}
#else
DEVICE void unpack_part(const Bytes16& vector, int, float (&y)[4]) { unpack(vector, y, 0.0f); }
#endif

// What a thread has loaded of OUTPUTS rows of weights: vectors `first`, `first` + team, ...
template <int R> struct Loaded {
    static constexpr int D = DEPTH<R>, O = OUTPUTS;
    Bytes16 vector[D][O];
    float scale[D][O], offset[D][O];  // only of codes
    int first;

    DEVICE void load(const Matrix& m, int output, int first_vector) {
        first = first_vector;
#pragma unroll
        for (int o = 0; o < O; o++) {
            const int row = min(output + o, m.n_out - 1);  // past the last, that one once more
            const unsigned char* weight =
                m.weight + (long long)(row * m.n_vectors + first) * (int)sizeof(Bytes16);
#pragma unroll
            for (int d = 0; d < D; d++) {
                const int v = first + d * (int)blockDim.x;
                const bool there = output < m.n_out && v < m.n_vectors;
                vector[d][o] =
                    load_weight(weight + d * blockDim.x * (int)sizeof(Bytes16), there);
                if constexpr (BITS > 0) {
                    const int group = row * (m.n_vectors / PER_GROUP) + v / PER_GROUP;
                    scale[d][o] = there ? m.scales[group] : 0.0f;
                    offset[d][o] = there ? m.offsets[group] : 0.0f;
                }
            }
        }
    }

    DEVICE void multiply(Sums<R>& sums, const Matrix& m, const Inputs<R>& inputs) const {
#pragma unroll
        for (int d = 0; d < D; d++) {
            const int v = first + d * (int)blockDim.x;
            if (v - (int)threadIdx.x % WARP >= m.n_vectors) continue;  // none of this warp's
            // A lane past the end has weights of zero: any x that is there will do.
            const int at = min(v, m.n_vectors - 1);
            if constexpr (BY_MMA) {
#pragma unroll
                for (int i = 0; i < (R == 1 ? 2 : R); i++) {
                    const Bytes16 x = inputs.at(R == 1 ? 0 : i, at, 0);
                    const int half = i % 2;  // of the vectors
#pragma unroll
                    for (int o = 0; o < O; o++) {
                        const auto& w = vector[d][o].word;
                        mma(sums.x[i / 2][o][half % Sums<R>::CHAINS], x.word,
                            {w[2 * half], w[2 * half + 1]}, REAL());
                    }
                }
            } else {
                float product[R][O] = {};
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    float w[O][4], x[4];
#pragma unroll
                    for (int o = 0; o < O; o++) unpack_part(vector[d][o], part, w[o]);
#pragma unroll
                    for (int r = 0; r < R; r++) {
                        unpack(inputs.at(r, at, part), x, 0.0f);
#pragma unroll
                        for (int o = 0; o < O; o++)
#pragma unroll
                            for (int j = 0; j < 4; j++) product[r][o] += w[o][j] * x[j];
                    }
                }
#pragma unroll
                for (int i = 0; i < R * O; i++) {
                    const int r = i / O, o = i % O;
                    if constexpr (BITS > 0) {
                        const float s = scale[d][o], sum = inputs.sums[at].x[r];
                        sums.x[r][o][0][0] += s * product[r][o] + (offset[d][o] - ZERO * s) * sum;
                    } else {
                        sums.x[r][o][0][0] += product[r][o];
                    }
                }
            }
        }
    }
};

// In lane i: x[i % N], summed over the i's `width` lanes, N <= width.
template <int N, int HALF = N / 2> DEVICE float sum_over_lanes(float (&x)[N], int width) {
    if constexpr (HALF > 0) {  // keep half of them, give the other half away
        const bool upper = lane() & HALF;
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            const float given = upper ? x[i] : x[i + HALF];
            x[i] = (upper ? x[i + HALF] : x[i]) + __shfl_xor_sync(ALL_LANES, given, HALF);
        }
        return sum_over_lanes<N, HALF / 2>(x, width);
    } else {
        for (int n = N; n < width; n *= 2) x[0] += __shfl_xor_sync(ALL_LANES, x[0], n);
        return x[0];
    }
}

// Rows blockIdx.x * R and on times all outputs that are this block's.
template <int R, class Source>
DEVICE void multiply(
    Source source, const Matrix& m, const REAL* bias, const float* residual, void* out,
    int n_rows, int activation, int wide
) {
    constexpr int N = R * OUTPUTS;
    DYNAMIC_SHARED(shared);
    __shared__ float partial[2][MOST_WARPS][N];
    const int team = blockDim.x, warp = thread() / WARP;
    const int first_row = blockIdx.x * R, n_here = min(R, n_rows - first_row);
    const int x_bytes = (m.n_vectors + 7) / 8 * 8 * PARTS * R * sizeof(Bytes16);
    const Inputs<R> inputs = {(Bytes16*)shared, (Several<float, R>*)(shared + x_bytes)};

    // Thread i of a team ends sum i: of row i / OUTPUTS and output i % OUTPUTS.
    const bool ends = threadIdx.x < N && (int)threadIdx.x / OUTPUTS < n_here;
    const long long row = (long long)(first_row + threadIdx.x / OUTPUTS) * m.n_out;
    const auto has = [&](int output) { return ends && output < m.n_out; };
    const auto bias_of = [&](int output) {  // not made a float before it has come
        return bias && has(output) ? bias[output] : REAL{};
    };
    const auto residual_of = [&](int output) {
        return residual && has(output) ? residual[row + output] : 0.0f;
    };

    const int step = gridDim.y * blockDim.y * OUTPUTS;
    int output = (blockIdx.y * blockDim.y + threadIdx.y) * OUTPUTS;
    int mine = output + threadIdx.x % OUTPUTS;
    Loaded<R> loaded;
    loaded.load(m, output, threadIdx.x);
    const int sums_bytes = BITS ? (m.n_vectors * R + 3) / 4 * 16 : 0;
    source.begin(shared + x_bytes + sums_bytes, n_here, m.n_in);
    REAL b = bias_of(mine);
    let_next_start();
    wait_for_previous();
    float r = residual_of(mine);
    source.bring(inputs, first_row, n_here, m.n_in);

    bool turn = false;
    for (int first = blockIdx.y * blockDim.y * OUTPUTS; first < m.n_out; first += step) {
        Sums<R> sums;
        for (int v = threadIdx.x; v - (int)threadIdx.x < m.n_vectors; v += DEPTH<R> * team) {
            loaded.multiply(sums, m, inputs);
            const int next = v + DEPTH<R> * team;
            const bool is_last = next - (int)threadIdx.x >= m.n_vectors;
            loaded.load(m, is_last ? output + step : output, is_last ? threadIdx.x : next);
        }
        const REAL next_b = bias_of(mine + step);
        const float next_r = residual_of(mine + step);

        float parts[N];
        sums.collect(parts);
        float y = sum_over_lanes(parts, min(team, WARP));
        if (team > WARP) {
            if (lane() < N) partial[turn][warp][lane()] = y;
            __syncthreads();
            if (threadIdx.x < N) {
                y = 0.0f;
#pragma unroll 4
                for (int i = 0; i < team / WARP; i++) y += partial[turn][warp + i][lane()];
            }
            turn = !turn;  // the other half may still be read
        }
        if (has(mine)) {
            y = activated(y + to_float(b), activation) + r;
            if (wide) ((float*)out)[row + mine] = y;
            else ((REAL*)out)[row + mine] = from_float<REAL>(y);
        }
        output += step, mine += step, b = next_b, r = next_r;
    }
}

}  // namespace few

// out [n_rows, n_out] = activation(x [n_rows, n_in] · weight [n_out, n_in] + bias) + residual, for
// R rows of x to a block; norm_linear_R: of the layer norm of x. out is float32 if `wide`, else
// REAL. bias and residual may be null. n_in is a multiple of 8 (codes: of GROUP); all arrays begin
// at multiples of 16 bytes. Grid (n_rows / R, rounded up; any), block (team, teams) as above.
#define LINEAR(R)                                                                                 \
    extern "C" __global__ void __launch_bounds__(few::THREADS<R>, 2) linear_##R(                  \
        const REAL* x, const void* weight, const float* scales, const float* offsets,             \
        const REAL* bias, const float* residual, void* out, int n_rows, int n_in, int n_out,      \
        int activation, int wide                                                                  \
    ) {                                                                                           \
        const few::Matrix m(weight, scales, offsets, n_in, n_out);                                \
        few::multiply<R>(few::Plain<R>(x), m, bias, residual, out, n_rows, activation, wide);     \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(few::THREADS<R>, 2) norm_linear_##R(             \
        const float* x, const REAL* norm_weight, const REAL* norm_bias, float epsilon,            \
        const void* weight, const float* scales, const float* offsets, const REAL* bias,          \
        const float* residual, void* out, int n_rows, int n_in, int n_out, int activation,        \
        int wide                                                                                  \
    ) {                                                                                           \
        const few::Matrix m(weight, scales, offsets, n_in, n_out);                                \
        const few::Normalized<R> source(x, norm_weight, norm_bias, epsilon);                      \
        few::multiply<R>(source, m, bias, residual, out, n_rows, activation, wide);               \
    }

LINEAR(1)
LINEAR(2)
LINEAR(4)
LINEAR(8)
