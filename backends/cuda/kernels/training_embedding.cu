// Gradient of an embedding table, without atomics.

// `keys` [n_rows], sorted: id · 2^32 + row of g, for each token. The rows of g [n_rows, C] with the
// same id are added to row id of dtable [N, C]; the block of the first of them adds them all, in
// order. Grid (n_rows, C / 128 rounded up), block (32, 8).
extern "C" __global__ void embed_vjp(
    const REAL* g, const long long* keys, REAL* dtable, long long n_rows, int C
) {
    constexpr int TEAMS = 8, EACH = 4;  // teams of a warp; columns of a thread
    __shared__ float sums[TEAMS][EACH * WARP];
    const long long first = blockIdx.x, id = keys[first] >> 32;
    if (first > 0 && keys[first - 1] >> 32 == id) return;
    const int column = blockIdx.y * EACH * WARP + threadIdx.x;
    float sum[EACH] = {};
    for (long long i = first + threadIdx.y; i < n_rows && keys[i] >> 32 == id; i += TEAMS) {
        const REAL* row = g + (keys[i] & 0xffffffffll) * C;
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (column + j * WARP < C) sum[j] += to_float(row[column + j * WARP]);
    }
#pragma unroll
    for (int j = 0; j < EACH; j++) sums[threadIdx.y][j * WARP + threadIdx.x] = sum[j];
    __syncthreads();
    if (threadIdx.y) return;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        if (column + j * WARP >= C) continue;
        float total = 0.0f;
        for (int team = 0; team < TEAMS; team++) total += sums[team][j * WARP + threadIdx.x];
        REAL* to = dtable + id * C + column + j * WARP;
        *to = from_float<REAL>(to_float(*to) + total);
    }
}
