// Token and position embeddings, and dequantization of a table; a block computes one row.

#if BITS
// Weight i of a row: scale · value + offset; each quantization group has one scale and offset.
DEVICE float dequantized(
    const unsigned* packed, const float* scales, const float* offsets, long long row, int i, int n
) {
    constexpr int PER_WORD = 32 / BITS;
    unsigned word = packed[row * (n / PER_WORD) + i / PER_WORD];
    float value = (float)(word >> (i % PER_WORD * BITS) & ((1u << BITS) - 1));
    long long group = row * (n / GROUP) + i / GROUP;
    return scales[group] * value + offsets[group];
}

// Quantized values -> weights [rows, n]. Grid (rows).
extern "C" __global__ void dequantize(
    const unsigned* packed, const float* scales, const float* offsets, REAL* out, int n
) {
    long long row = blockIdx.x;
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        out[row * n + i] = from_float<REAL>(dequantized(packed, scales, offsets, row, i, n));
}
#endif

// Token embedding + position embedding -> row blockIdx.x of `out`.
DEVICE void embed_row(
    long long id, long long position, const void* table, const float* scales, const float* offsets,
    const REAL* positions, float* out, int n
) {
    id = max(id, 0ll);  // -1: the sampler found logits that are not finite; the result is unused
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
#if BITS
        float token = dequantized((const unsigned*)table, scales, offsets, id, i, n);
#else
        float token = to_float(((const REAL*)table)[id * n + i]);
#endif
        out[(long long)blockIdx.x * n + i] = token + to_float(positions[position * n + i]);
    }
}

// Prompts: ids and positions `index` [rows] -> residual stream [rows, n]. Grid (rows).
extern "C" __global__ void embed_prefill(
    const long long* ids, const long long* index, const void* table, const float* scales,
    const float* offsets, const REAL* positions, float* out, int n
) {
    trigger_dependent_launch();
    grid_dependency_sync();
    const long long row = blockIdx.x;
    embed_row(ids[row], index[row], table, scales, offsets, positions, out, n);
}

// Decode steps: the next token of each sequence. `ids` holds the address of the ids [rows]. `index`
// [rows] holds the positions of the tokens before, and is incremented. Grid (rows).
extern "C" __global__ void embed_decode(
    const long long* ids, long long* index, const void* table, const float* scales,
    const float* offsets, const REAL* positions, float* out, int n
) {
    __shared__ long long position;
    trigger_dependent_launch();
    grid_dependency_sync();
    const long long row = blockIdx.x, id = ((const long long*)*ids)[row];
    if (threadIdx.x == 0) position = ++index[row];
    __syncthreads();
    embed_row(id, position, table, scales, offsets, positions, out, n);
}
