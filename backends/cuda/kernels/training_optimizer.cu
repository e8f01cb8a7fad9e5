// AdamW and the norm of gradients, each in one launch over all tensors.
//
// A block has CHUNK elements of one tensor. `tensors` describes them, and one more row is the end.

constexpr int CHUNK = 16384;  // as in optimizer.py
constexpr int EACH = 4;       // elements that a thread loads at once

struct Tensor {
    long long first_block, size;
    float* weight;
    const void* gradient;
    float *m, *v;
};

// The tensor of this block: the last one whose first block is not later.
DEVICE Tensor tensor_of_block(const long long* tensors, int n_tensors, int& number) {
    int low = 0, high = n_tensors;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (tensors[6 * middle] <= blockIdx.x) low = middle;
        else high = middle;
    }
    number = low;
    const long long* row = tensors + 6 * low;
    return {row[0], row[1], (float*)row[2], (const void*)row[3], (float*)row[4], (float*)row[5]};
}

DEVICE void load_gradients(const Tensor& t, long long at, int is_float32, float (&g)[EACH]) {
    const long long count = t.size - at;
    if (is_float32) load_floats((const float*)t.gradient + at, count, g);
    else load_floats((const REAL*)t.gradient + at, count, g);
}

// tensors: int64 [n_tensors, 6], see `Tensor`; decays [n_tensors]. rest_1 is 1 - beta_1, without
// the error of float32. m and v are divided by `correction_1` and `correction_2`. Weights, m and v
// change in place. Grid (blocks), block any.
extern "C" __global__ void adamw(
    const long long* tensors, const float* decays, int n_tensors, int float32_gradients, float lr,
    float beta_1, float rest_1, float beta_2, float rest_2, float epsilon, float correction_1,
    float correction_2, float gradient_scale
) {
    int number;
    const Tensor t = tensor_of_block(tensors, n_tensors, number);
    const float kept = 1.0f - lr * decays[number];
    const long long first = (blockIdx.x - t.first_block) * CHUNK;
    const long long end = min(first + CHUNK, t.size);
    for (long long at = first + EACH * threadIdx.x; at < end; at += EACH * blockDim.x) {
        const long long count = end - at;
        float w[EACH], g[EACH], m[EACH], v[EACH];
        load_floats(t.weight + at, count, w);
        load_gradients(t, at, float32_gradients, g);
        load_floats(t.m + at, count, m);
        load_floats(t.v + at, count, v);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            g[i] *= gradient_scale;
            m[i] = beta_1 * m[i] + rest_1 * g[i];
            v[i] = beta_2 * v[i] + rest_2 * g[i] * g[i];
            const float size = sqrtf(v[i] / correction_2) + epsilon;
            w[i] = w[i] * kept - lr * (m[i] / correction_1) / size;
        }
        store_floats(t.weight + at, count, w);
        store_floats(t.m + at, count, m);
        store_floats(t.v + at, count, v);
    }
}

// The sum of squares of each block's gradients -> partial [blocks]. Grid (blocks), block a multiple
// of 32.
extern "C" __global__ void sum_squares(
    const long long* tensors, int n_tensors, int float32_gradients, float* partial
) {
    __shared__ float warp_sums[WARP];
    int number;
    const Tensor t = tensor_of_block(tensors, n_tensors, number);
    const long long first = (blockIdx.x - t.first_block) * CHUNK;
    const long long end = min(first + CHUNK, t.size);
    float sum = 0.0f;
    for (long long at = first + EACH * threadIdx.x; at < end; at += EACH * blockDim.x) {
        float g[EACH];
        load_gradients(t, at, float32_gradients, g);
#pragma unroll
        for (int i = 0; i < EACH; i++) sum += g[i] * g[i];
    }
    sum = block_sum(sum, warp_sums);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// The sum of partial [n] -> out [1]. Grid (1), block a multiple of 32.
extern "C" __global__ void sum_all(const float* partial, float* out, int n) {
    __shared__ float warp_sums[WARP];
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += partial[i];
    sum = block_sum(sum, warp_sums);
    if (threadIdx.x == 0) *out = sum;
}
