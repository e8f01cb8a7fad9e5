// Gradients of activations, and dropout.

// Slope of an activation (`activation.cuh`).
DEVICE float activation_slope(float x, int activation) {
    switch (activation) {
        case GELU_NEW: {
            const float t = tanhf(0.7978845608f * (x + 0.044715f * x * x * x));
            const float inner = 0.7978845608f * (1.0f + 0.134145f * x * x);
            return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner;
        }
        case GELU: {
            const float density = 0.3989422804f * expf(-0.5f * x * x);
            return 0.5f * (1.0f + erff(0.7071067812f * x)) + x * density;
        }
        case RELU: return x > 0.0f ? 1.0f : 0.0f;
        default: return 1.0f;
    }
}

// Gradient of an activation by x [n], from the gradient g [n] of its result. A thread has 16 bytes of
// each.
extern "C" __global__ void activation_vjp(
    const REAL* g, const REAL* x, REAL* dx, long long n, int activation
) {
    constexpr int EACH = ELEMENTS_PER_LOAD<REAL>;
    const long long first = EACH * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    if (first >= n) return;
    float gradient[EACH], y[EACH];
    load_floats(g + first, n - first, gradient);
    load_floats(x + first, n - first, y);
#pragma unroll
    for (int i = 0; i < EACH; i++) gradient[i] *= activation_slope(y[i], activation);
    store_floats(dx + first, n - first, gradient);
}

// Dropout of rows [rows, n] (`gptx.backends.gradients.dropout`): an element stays, times `factor`,
// if its 16 random bits are at least `threshold`. A thread has the 16 elements of one Philox block.
extern "C" __global__ void dropout(
    const REAL* x, REAL* out, long long rows, int n, u64 seed, u64 step, u64 site, u64 first_row,
    unsigned threshold, float factor
) {
    const int blocks = (n + 15) / 16;  // of a row
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long row = thread / blocks;
    if (row >= rows) return;
    const int block = (int)(thread - row * blocks), count = n - 16 * block;
    const long long first = row * n + 16 * block;
    const PhiloxWords random = philox({{block + 1ull, step, site, first_row + row}}, seed, 0);
    float y[16];
    load_floats(x + first, count, y);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const unsigned bits = (unsigned)(random.word[i / 4] >> 16 * (i % 4)) & 0xffff;
        y[i] = bits >= threshold ? y[i] * factor : 0.0f;
    }
    store_floats(out + first, count, y);
}
