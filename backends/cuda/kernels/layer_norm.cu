// Layer norm; a block normalizes one row.

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
