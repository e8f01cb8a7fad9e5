// GEMV of up to 8 rows: out = activation(x · weightᵀ + bias) + residual. It reads the matrix once;
// the layer norm of x is fused in layer_norm_gemv_R.
//
// A matrix of the smallest GPT-2 has 1 to 5 MB. Reading it takes about a microsecond, as long as
// the latency of the first byte. Therefore all loads are issued at once, with as few waits as
// possible:
//
// - A team of threads computes OUTPUTS consecutive outputs. Each thread loads 16 bytes (a vector)
//   of each of their rows, DEPTH times, into registers. 9 to 12 warps hold a multiprocessor's share
//   of a small matrix. Two blocks of 12 warps hold about 90 KB of a large one, which saturates the
//   memory.
// - Then the block calls grid_dependency_sync (weights do not depend on earlier kernels) and loads
//   the rows of x to shared memory, during the loads of weights. The next weights are loaded before
//   the current ones are multiplied.
// - One block for each multiprocessor, two for large matrices, so that each reads x once. blockDim
//   is (team, teams). The fewer outputs, the wider a team:
//   8, 16 or a multiple of 32 threads, at least R · OUTPUTS. `linear.py` selects it.
// - Tensor cores multiply numbers of 16 bits, to save instructions. `mma` of vectors of x and
//   weights in the lanes' order has the required products on its diagonal, each summed over four
//   lanes; the other seven eighths are discarded. This takes 2 instructions for a vector and two
//   rows, in place of 16 for a row.
//
// Quantized values: a vector is within a quantization group, and adds
// scale · (values · x) + offset · (sum of x). The block computes the sum of x of each vector once.

namespace gemv {

// By the registers for two blocks on a multiprocessor: this kernel's and the next kernel's.
constexpr int OUTPUTS = 2;
template <int R> constexpr int DEPTH = BITS == 0 ? 4 : R == 1 ? 3 : 2;
template <int R> constexpr int THREADS = R < 4 ? 384 : 256;

constexpr int GROUP_VECTORS = BITS ? GROUP / NUMBERS : 1;
constexpr float ZERO = BITS == 4 ? 16.0f : 0.0f;  // unpack_quantized of 0

struct WeightMatrix {
    const unsigned char* weight;
    const float *scales, *offsets;
    int n_in, n_out, n_vectors;  // vectors in a row

    DEVICE WeightMatrix(
        const void* weight, const float* scales, const float* offsets, int n_in, int n_out
    ) : weight((const unsigned char*)weight), scales(scales), offsets(offsets), n_in(n_in),
        n_out(n_out), n_vectors(n_in / NUMBERS) {}
};

// Accumulators of R rows and OUTPUTS outputs. `mma` has two rows in one accumulator, 4 elements in
// a lane; with one or two rows, two independent accumulators hide latency.
template <int R> struct Accumulators {
    static constexpr int PAIRS = USE_MMA ? (R + 1) / 2 : R;
    static constexpr int CHAINS = USE_MMA && R < 4 ? 2 : 1;
    float x[PAIRS][OUTPUTS][CHAINS][USE_MMA ? 4 : 1] = {};

    // Extract the values to be summed over lanes.
    DEVICE void collect(float (&y)[R * OUTPUTS]) const {
        const int g = lane() / 4, t = lane() % 4;
#pragma unroll
        for (int i = 0; i < R * OUTPUTS; i++) {
            const int row = i / OUTPUTS, o = i % OUTPUTS;
            if constexpr (USE_MMA) {
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
// Convert four weights, part `part` of a vector, to floats.
DEVICE void unpack_part(const Bytes16& vector, int part, float (&y)[4]) {
#if BITS == 8
    unpack_quantized(vector.word[part], y);
#else
    float eight[8];
    unpack_quantized(vector.word[part / 2], eight);
#pragma unroll
    for (int i = 0; i < 4; i++) y[i] = eight[part % 2 * 4 + i];
#endif
}
#else
DEVICE void unpack_part(const Bytes16& vector, int, float (&y)[4]) { unpack(vector, y, 0.0f); }
#endif

// The weights in a thread's registers: vectors `first`, `first` + team, ... of OUTPUTS rows.
template <int R> struct LoadedWeights {
    static constexpr int D = DEPTH<R>, O = OUTPUTS;
    Bytes16 vector[D][O];
    float scale[D][O], offset[D][O];  // of quantized weights
    int first;

    DEVICE void load(const WeightMatrix& m, int output, int first_vector) {
        first = first_vector;
#pragma unroll
        for (int o = 0; o < O; o++) {
            const int row = min(output + o, m.n_out - 1);  // past the end: the last row again
            const unsigned char* weight =
                m.weight + (long long)(row * m.n_vectors + first) * (int)sizeof(Bytes16);
#pragma unroll
            for (int d = 0; d < D; d++) {
                const int v = first + d * (int)blockDim.x;
                const bool valid = output < m.n_out && v < m.n_vectors;
                vector[d][o] =
                    load_weight(weight + d * blockDim.x * (int)sizeof(Bytes16), valid);
                if constexpr (BITS > 0) {
                    const int group = row * (m.n_vectors / GROUP_VECTORS) + v / GROUP_VECTORS;
                    scale[d][o] = valid ? m.scales[group] : 0.0f;
                    offset[d][o] = valid ? m.offsets[group] : 0.0f;
                }
            }
        }
    }

    DEVICE void multiply(
        Accumulators<R>& sums, const WeightMatrix& m, const Inputs<R>& inputs
    ) const {
#pragma unroll
        for (int d = 0; d < D; d++) {
            const int v = first + d * (int)blockDim.x;
            if (v - (int)threadIdx.x % WARP >= m.n_vectors) continue;  // of the whole warp
            // A lane past the end has weights of zero, so any valid x is correct.
            const int at = min(v, m.n_vectors - 1);
            if constexpr (USE_MMA) {
#pragma unroll
                for (int i = 0; i < (R == 1 ? 2 : R); i++) {
                    const Bytes16 x = inputs.at(R == 1 ? 0 : i, at, 0);
                    const int half = i % 2;  // of the vector
#pragma unroll
                    for (int o = 0; o < O; o++) {
                        const auto& w = vector[d][o].word;
                        mma(sums.x[i / 2][o][half % Accumulators<R>::CHAINS], x.word,
                            {w[2 * half], w[2 * half + 1]}, REAL());
                    }
                }
            } else {
                float product[R][O] = {};
#pragma unroll
                for (int part = 0; part < VECTOR_PARTS; part++) {
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

// In lane i: x[i % N], summed over `width` lanes, N <= width.
template <int N, int HALF = N / 2> DEVICE float sum_over_lanes(float (&x)[N], int width) {
    if constexpr (HALF > 0) {  // keep one half, send the other half
        const bool upper = lane() & HALF;
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            const float sent = upper ? x[i] : x[i + HALF];
            x[i] = (upper ? x[i + HALF] : x[i]) + __shfl_xor_sync(FULL_MASK, sent, HALF);
        }
        return sum_over_lanes<N, HALF / 2>(x, width);
    } else {
        for (int n = N; n < width; n *= 2) x[0] += __shfl_xor_sync(FULL_MASK, x[0], n);
        return x[0];
    }
}

// Multiply R rows from blockIdx.x * R on, for all outputs of this block.
template <int R, class Source>
DEVICE void multiply(
    Source source, const WeightMatrix& m, const REAL* bias, const float* residual, void* out,
    int n_rows, int activation, int float32_out
) {
    constexpr int N = R * OUTPUTS;
    DYNAMIC_SHARED(shared);
    __shared__ float partial[2][MAX_WARPS][N];
    const int team = blockDim.x, warp = thread() / WARP;
    const int first_row = blockIdx.x * R, n_here = min(R, n_rows - first_row);
    const int x_bytes = (m.n_vectors + 7) / 8 * 8 * VECTOR_PARTS * R * sizeof(Bytes16);
    const Inputs<R> inputs = {(Bytes16*)shared, (Vec<float, R>*)(shared + x_bytes)};

    // Thread i of a team writes sum i: of row i / OUTPUTS and output i % OUTPUTS.
    const bool writes = threadIdx.x < N && (int)threadIdx.x / OUTPUTS < n_here;
    const long long row = (long long)(first_row + threadIdx.x / OUTPUTS) * m.n_out;
    const auto has = [&](int output) { return writes && output < m.n_out; };
    const auto bias_of = [&](int output) {  // converted later: no wait here
        return bias && has(output) ? bias[output] : REAL{};
    };
    const auto residual_of = [&](int output) {
        return residual && has(output) ? residual[row + output] : 0.0f;
    };

    const int step = gridDim.y * blockDim.y * OUTPUTS;
    int output = (blockIdx.y * blockDim.y + threadIdx.y) * OUTPUTS;
    int mine = output + threadIdx.x % OUTPUTS;
    LoadedWeights<R> loaded;
    loaded.load(m, output, threadIdx.x);
    const int sums_bytes = BITS ? (m.n_vectors * R + 3) / 4 * 16 : 0;
    source.prepare(shared + x_bytes + sums_bytes, n_here, m.n_in);
    REAL b = bias_of(mine);
    trigger_dependent_launch();
    grid_dependency_sync();
    float r = residual_of(mine);
    source.load(inputs, first_row, n_here, m.n_in);

    bool buffer = false;
    for (int first = blockIdx.y * blockDim.y * OUTPUTS; first < m.n_out; first += step) {
        Accumulators<R> sums;
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
            if (lane() < N) partial[buffer][warp][lane()] = y;
            __syncthreads();
            if (threadIdx.x < N) {
                y = 0.0f;
#pragma unroll 4
                for (int i = 0; i < team / WARP; i++) y += partial[buffer][warp + i][lane()];
            }
            buffer = !buffer;  // other threads may still read this one
        }
        if (has(mine)) {
            y = apply_activation(y + to_float(b), activation) + r;
            if (float32_out) ((float*)out)[row + mine] = y;
            else ((REAL*)out)[row + mine] = from_float<REAL>(y);
        }
        output += step, mine += step, b = next_b, r = next_r;
    }
}

}  // namespace gemv

// out [n_rows, n_out] = activation(x [n_rows, n_in] · weight [n_out, n_in] + bias) + residual, with
// R rows of x in each block; layer_norm_gemv_R multiplies the layer norm of x. out is float32 if
// `float32_out`, else REAL. bias and residual may be null. n_in is a multiple of 8 (of GROUP, if
// quantized). Arrays are aligned to 16 bytes. Grid (n_rows / R, rounded up; any), block (team,
// teams).
#define GEMV(R)                                                                                   \
    extern "C" __global__ void __launch_bounds__(gemv::THREADS<R>, 2) gemv_##R(                   \
        const REAL* x, const void* weight, const float* scales, const float* offsets,             \
        const REAL* bias, const float* residual, void* out, int n_rows, int n_in, int n_out,      \
        int activation, int float32_out                                                           \
    ) {                                                                                           \
        const gemv::WeightMatrix m(weight, scales, offsets, n_in, n_out);                         \
        gemv::multiply<R>(                                                                        \
            gemv::Plain<R>(x), m, bias, residual, out, n_rows, activation, float32_out            \
        );                                                                                        \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(gemv::THREADS<R>, 2) layer_norm_gemv_##R(        \
        const float* x, const REAL* norm_weight, const REAL* norm_bias, float epsilon,            \
        const void* weight, const float* scales, const float* offsets, const REAL* bias,          \
        const float* residual, void* out, int n_rows, int n_in, int n_out, int activation,        \
        int float32_out                                                                           \
    ) {                                                                                           \
        const gemv::WeightMatrix m(weight, scales, offsets, n_in, n_out);                         \
        const gemv::Normalized<R> source(x, norm_weight, norm_bias, epsilon);                     \
        gemv::multiply<R>(source, m, bias, residual, out, n_rows, activation, float32_out);       \
    }

GEMV(1)
GEMV(2)
GEMV(4)
GEMV(8)
