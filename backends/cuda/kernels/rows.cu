// One row of numbers a block: embedding, layer norm, and what follows a product of cuBLAS.
//
// The residual stream is float32 whatever REAL is; see device.cuh for the macros' meaning.

// The sum of x over a block, in every thread; `room` holds a float for each warp.
DEVICE float block_sum(float x, float* room) {
    x = warp_sum(x);
    __syncthreads();  // the room may still be read from the sum before
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < (int)blockDim.x / WARP; warp++) sum += room[warp];
    return sum;
}

// x [n] -> (x - mean) / sqrt(variance + epsilon) * weight + bias.
template <class T>
DEVICE void layer_norm_row(
    const T* x, const REAL* weight, const REAL* bias, float epsilon, REAL* out, int n
) {
    __shared__ float room[WARP];
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += to_float(x[i]);
    float mean = block_sum(sum, room) / n;
    float squares = 0.0f;  // of the differences: the mean may be large beside them
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float d = to_float(x[i]) - mean;
        squares += d * d;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, room) / n + epsilon);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float y = (to_float(x[i]) - mean) * scale;
        out[i] = from_float<REAL>(y * to_float(weight[i]) + to_float(bias[i]));
    }
}

// Layer norm of the residual stream. Grid (rows), block any multiple of 32.
extern "C" __global__ void normalize(
    const float* x, const REAL* weight, const REAL* bias, float epsilon, REAL* out, int n
) {
    let_next_start();
    wait_for_previous();
    long long row = (long long)blockIdx.x * n;
    layer_norm_row(x + row, weight, bias, epsilon, out + row, n);
}

// `Backend.layer_norm`. Grid (rows), block any multiple of 32.
extern "C" __global__ void layer_norm(
    const REAL* x, const REAL* weight, const REAL* bias, float epsilon, REAL* out, int n
) {
    long long row = (long long)blockIdx.x * n;
    layer_norm_row(x + row, weight, bias, epsilon, out + row, n);
}

#if BITS
// Weight i of `row` of codes: scale * code + offset, one pair a group.
DEVICE float decode(
    const unsigned* codes, const float* scales, const float* offsets, long long row, int i, int n
) {
    constexpr int PER_WORD = 32 / BITS;
    unsigned word = codes[row * (n / PER_WORD) + i / PER_WORD];
    float code = (float)(word >> (i % PER_WORD * BITS) & ((1u << BITS) - 1));
    long long group = row * (n / GROUP) + i / GROUP;
    return scales[group] * code + offsets[group];
}

// Codes [rows, n] -> numbers [rows, n]. Grid (rows).
extern "C" __global__ void expand(
    const unsigned* codes, const float* scales, const float* offsets, REAL* out, int n
) {
    long long row = blockIdx.x;
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        out[row * n + i] = from_float<REAL>(decode(codes, scales, offsets, row, i, n));
}
#endif

// The row of a token + that of a position -> row blockIdx.x of `out`.
DEVICE void embed_row(
    long long id, long long position, const void* table, const float* scales, const float* offsets,
    const REAL* positions, float* out, int n
) {
    id = max(id, 0ll);  // -1 is a token that could not be chosen: what follows is thrown away
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
#if BITS
        float token = decode((const unsigned*)table, scales, offsets, id, i, n);
#else
        float token = to_float(((const REAL*)table)[id * n + i]);
#endif
        out[(long long)blockIdx.x * n + i] = token + to_float(positions[position * n + i]);
    }
}

// Tokens and their positions [rows] -> stream [rows, n]. Grid (rows).
extern "C" __global__ void embed(
    const long long* ids, const long long* index, const void* table, const float* scales,
    const float* offsets, const REAL* positions, float* out, int n
) {
    let_next_start();
    wait_for_previous();
    const long long row = blockIdx.x;
    embed_row(ids[row], index[row], table, scales, offsets, positions, out, n);
}

// The same of the next token of each sequence: `ids` says where the tokens lie, and `index` the
// positions of the tokens before them, which become theirs. Grid (rows).
extern "C" __global__ void embed_next(
    const long long* ids, long long* index, const void* table, const float* scales,
    const float* offsets, const REAL* positions, float* out, int n
) {
    __shared__ long long position;
    let_next_start();
    wait_for_previous();
    const long long row = blockIdx.x, id = ((const long long*)*ids)[row];
    if (threadIdx.x == 0) position = ++index[row];
    __syncthreads();
    embed_row(id, position, table, scales, offsets, positions, out, n);
}

// The last of each sequence's rows x [B, T, n] -> [B, n]. Grid (B).
extern "C" __global__ void take_last(const float* x, float* out, int T, int n) {
    let_next_start();
    wait_for_previous();
    const float* last = x + ((blockIdx.x + 1ll) * T - 1) * n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[(long long)blockIdx.x * n + i] = last[i];
}

// `Backend.gelu_new` and its like: x [n] -> out [n]. Any grid.
extern "C" __global__ void activate(const REAL* x, REAL* out, long long n, int activation) {
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step)
        out[i] = from_float<REAL>(activated(to_float(x[i]), activation));
}

// activation(y + bias) + residual, of a product y [rows, n]; `wide`: to float32. Grid (rows).
// Without `wide`, out may be y.
extern "C" __global__ void finish(
    const REAL* y, const REAL* bias, const float* residual, void* out, int n, int activation,
    int wide
) {
    long long row = (long long)blockIdx.x * n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float x = to_float(y[row + i]);
        if (bias) x += to_float(bias[i]);
        x = activated(x, activation);
        if (residual) x += residual[row + i];
        if (wide) ((float*)out)[row + i] = x;
        else ((REAL*)out)[row + i] = from_float<REAL>(x);
    }
}
