// Layer norm, cross entropy and the attention pattern in training, and sums over rows. Every sum
// has a fixed order.

// Gradient of layer norm by x [rows, n], from the gradient g [rows, n] of its result. dx may be
// null. `partial` [gridDim.x, 2, n], or null: the sums over this block's rows of g · normalized x,
// and of g; `sum_partials` adds them. Grid any, block a multiple of 32. Shared memory: 3 n floats.
extern "C" __global__ void layer_norm_vjp(
    const REAL* g, const REAL* x, const REAL* weight, float epsilon, REAL* dx, float* partial,
    long long rows, int n
) {
    DYNAMIC_SHARED(memory);
    __shared__ float warp_sums[WARP];
    float* h = (float*)memory;  // x, normalized; a thread uses its own columns only
    float *dw = h + n, *db = dw + n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) dw[i] = db[i] = 0.0f;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const REAL *x_row = x + row * n, *g_row = g + row * n;
        float sum = 0.0f;
        for (int i = threadIdx.x; i < n; i += blockDim.x) sum += h[i] = to_float(x_row[i]);
        const float mean = block_sum(sum, warp_sums) / n;
        float squares = 0.0f;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            h[i] -= mean;
            squares += h[i] * h[i];
        }
        const float factor = 1.0f / sqrtf(block_sum(squares, warp_sums) / n + epsilon);
        float of_dh = 0.0f, of_slope = 0.0f;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            const float gradient = to_float(g_row[i]), dh = gradient * to_float(weight[i]);
            h[i] *= factor;
            of_dh += dh;
            of_slope += dh * h[i];
            dw[i] += gradient * h[i];
            db[i] += gradient;
        }
        if (!dx) continue;
        const float mean_dh = block_sum(of_dh, warp_sums) / n;
        const float slope = block_sum(of_slope, warp_sums) / n;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            const float dh = to_float(g_row[i]) * to_float(weight[i]);
            dx[row * n + i] = from_float<REAL>(factor * (dh - mean_dh - h[i] * slope));
        }
    }
    if (!partial) return;
    partial += 2ll * n * blockIdx.x;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        partial[i] = dw[i];
        partial[n + i] = db[i];
    }
}

// Sum x [rows, n] over the rows of this block: gridDim.y blocks share them. out [gridDim.y, n].
template <class From, class To>
DEVICE void sum_rows_of_block(const From* x, To* out, long long rows, int n) {
    __shared__ float sums[WARP][WARP + 1];
    const int column = blockIdx.x * WARP + threadIdx.x;
    const long long each = (rows + gridDim.y - 1) / gridDim.y, first = each * blockIdx.y;
    const long long end = min(first + each, rows);
    float sum = 0.0f;
    if (column < n)
#pragma unroll 4
        for (long long row = first + threadIdx.y; row < end; row += blockDim.y)
            sum += to_float(x[row * n + column]);
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= n) return;
    for (int y = 1; y < (int)blockDim.y; y++) sum += sums[y][threadIdx.x];
    out[(long long)blockIdx.y * n + column] = from_float<To>(sum);
}

// Sums of parts of the rows of x [rows, n] -> partial [gridDim.y, n]. Grid (n / 32 rounded up,
// parts), block (32, up to 32).
extern "C" __global__ void sum_rows(const REAL* x, float* partial, long long rows, int n) {
    sum_rows_of_block(x, partial, rows, n);
}

// Sums of all rows of partial [rows, n] -> out [n]. Grid (n / 32 rounded up), block (32, up to 32).
extern "C" __global__ void sum_partials(const float* partial, REAL* out, long long rows, int n) {
    sum_rows_of_block(partial, out, rows, n);
}

// Loss of each row, weight · (logsumexp(logits) - logits[target]), from logits [rows, stride],
// which become their gradients unless `with_gradients` is 0. Columns from V on are padding:
// ignored, then 0. Grid (rows), block a multiple of 32.
extern "C" __global__ void cross_entropy(
    REAL* logits, const long long* targets, const float* weights, float* losses, int V, int stride,
    int with_gradients
) {
    constexpr int EACH = ELEMENTS_PER_LOAD<REAL>;
    constexpr float LOWEST = -3.4e38f;
    __shared__ float of_warps[WARP];
    const int row = blockIdx.x, target = (int)targets[row];
    const float weight = weights[row];
    REAL* x = logits + (long long)row * stride;
    const float of_target = to_float(x[target]);
    float top = LOWEST, sum = 0.0f;  // of this thread's logits
    for (int i = threadIdx.x * EACH; i < V; i += blockDim.x * EACH) {
        float some[EACH];
        load_floats(x + i, V - i, some);
        float largest = top;
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (i + j < V) largest = fmaxf(largest, some[j]);
        sum *= expf(top - largest);
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (i + j < V) sum += expf(some[j] - largest);
        top = largest;
    }
    const float best = block_max(top, of_warps);
    sum = block_sum(sum * expf(top - best), of_warps);
    if (threadIdx.x == 0) losses[row] = weight * (logf(sum) + best - of_target);
    if (!with_gradients) return;
    const float factor = weight / sum;
    for (int i = threadIdx.x * EACH; i < stride; i += blockDim.x * EACH) {
        float some[EACH];
        load_floats(x + i, V - i, some);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const float p = i + j < V ? factor * expf(some[j] - best) : 0.0f;
            some[j] = i + j == target ? p - weight : p;
        }
        store_floats(x + i, stride - i, some);
    }
}

// The attention pattern, softmax of scores [rows, n] -> p [rows, n]. A warp computes a row. Grid
// (rows / 8 rounded up), block 256.
extern "C" __global__ void pattern(const float* scores, REAL* p, long long rows, int n) {
    const long long row = (long long)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;
    const float* x = scores + row * n;
    float top = x[0], sum = 0.0f;
    for (int i = threadIdx.x % WARP; i < n; i += WARP) top = fmaxf(top, x[i]);
    top = warp_max(top);
    for (int i = threadIdx.x % WARP; i < n; i += WARP) sum += expf(x[i] - top);
    sum = warp_sum(sum);
    for (int i = threadIdx.x % WARP; i < n; i += WARP)
        p[row * n + i] = from_float<REAL>(expf(x[i] - top) / sum);
}

// Gradient of `pattern` by the scores, from g, the gradient of p: p (g - sum of g · p). Grid and
// block as above.
extern "C" __global__ void pattern_vjp(
    const REAL* g, const REAL* p, float* dscores, long long rows, int n
) {
    const long long row = (long long)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;
    float sum = 0.0f;
    for (int i = threadIdx.x % WARP; i < n; i += WARP)
        sum += to_float(g[row * n + i]) * to_float(p[row * n + i]);
    sum = warp_sum(sum);
    for (int i = threadIdx.x % WARP; i < n; i += WARP)
        dscores[row * n + i] = to_float(p[row * n + i]) * (to_float(g[row * n + i]) - sum);
}
