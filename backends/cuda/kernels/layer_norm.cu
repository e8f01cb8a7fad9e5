// Layer norm; a block normalizes one row.

// The sum of x over a block, in every thread; `warp_sums` has an element for each warp.
DEVICE float block_sum(float x, float* warp_sums) {
    x = warp_sum(x);
    __syncthreads();  // the previous sums may still be read
    if (threadIdx.x % WARP == 0) warp_sums[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < (int)blockDim.x / WARP; warp++) sum += warp_sums[warp];
    return sum;
}

// x [n] -> (x - mean) / sqrt(variance + epsilon) * weight + bias.
template <class T>
DEVICE void layer_norm_row(
    const T* x, const REAL* weight, const REAL* bias, float epsilon, REAL* out, int n
) {
    __shared__ float warp_sums[WARP];
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += to_float(x[i]);
    float mean = block_sum(sum, warp_sums) / n;
    float squares = 0.0f;  // two passes: the mean may be large
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float d = to_float(x[i]) - mean;
        squares += d * d;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, warp_sums) / n + epsilon);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float y = (to_float(x[i]) - mean) * scale;
        out[i] = from_float<REAL>(y * to_float(weight[i]) + to_float(bias[i]));
    }
}

// Layer norm of the float32 residual stream. Grid (rows), block a multiple of 32.
extern "C" __global__ void layer_norm_stream(
    const float* x, const REAL* weight, const REAL* bias, float epsilon, REAL* out, int n
) {
    trigger_dependent_launch();
    grid_dependency_sync();
    long long row = (long long)blockIdx.x * n;
    layer_norm_row(x + row, weight, bias, epsilon, out + row, n);
}

// Layer norm of activations (`Backend.layer_norm`). Grid (rows), block a multiple of 32.
extern "C" __global__ void layer_norm(
    const REAL* x, const REAL* weight, const REAL* bias, float epsilon, REAL* out, int n
) {
    long long row = (long long)blockIdx.x * n;
    layer_norm_row(x + row, weight, bias, epsilon, out + row, n);
}
