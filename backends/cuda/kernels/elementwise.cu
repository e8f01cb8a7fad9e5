// Elementwise kernels: activation, epilogue of a cuBLAS product, and the gather of last rows.

// The last row of each sequence: x [B, T, n] -> [B, n]. Grid (B).
extern "C" __global__ void gather_last(const float* x, float* out, int T, int n) {
    trigger_dependent_launch();
    grid_dependency_sync();
    const float* last = x + ((blockIdx.x + 1ll) * T - 1) * n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[(long long)blockIdx.x * n + i] = last[i];
}

// Activation (`Backend.gelu_new`, `gelu`, `relu`): x [n] -> out [n]. Any grid.
extern "C" __global__ void activate(const REAL* x, REAL* out, long long n, int activation) {
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step)
        out[i] = from_float<REAL>(apply_activation(to_float(x[i]), activation));
}

// Epilogue of a cuBLAS product y [rows, n]: activation(y + bias) + residual -> out, in float32 if
// `float32_out`, else REAL; then out may be y. bias and residual may be null. Grid (rows).
extern "C" __global__ void linear_epilogue(
    const REAL* y, const REAL* bias, const float* residual, void* out, int n, int activation,
    int float32_out
) {
    long long row = (long long)blockIdx.x * n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float x = to_float(y[row + i]);
        if (bias) x += to_float(bias[i]);
        x = apply_activation(x, activation);
        if (residual) x += residual[row + i];
        if (float32_out) ((float*)out)[row + i] = x;
        else ((REAL*)out)[row + i] = from_float<REAL>(x);
    }
}
