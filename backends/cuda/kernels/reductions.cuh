// Reductions over a block, and loads of consecutive numbers as floats.

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

// The largest x of a block, in every thread.
DEVICE float block_max(float x, float* of_warp) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    float largest = of_warp[0];
    for (int warp = 1; warp < (int)blockDim.x / WARP; warp++)
        largest = fmaxf(largest, of_warp[warp]);
    return largest;
}

template <class V> DEVICE bool is_aligned(const void* p) {
    return (unsigned long long)p % alignof(V) == 0;
}

// Load the first `count` of N numbers; the others become 0.
template <int N, class T> DEVICE void load_floats(const T* p, long long count, float (&x)[N]) {
    if (count >= N && is_aligned<Vec<T, N>>(p)) {
        const auto from = *(const Vec<T, N>*)p;
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = to_float(from.x[i]);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = i < count ? to_float(p[i]) : 0.0f;
}

// Store the first `count` of N numbers.
template <int N, class T> DEVICE void store_floats(T* p, long long count, const float (&x)[N]) {
    if (count >= N && is_aligned<Vec<T, N>>(p)) {
        Vec<T, N> to;
#pragma unroll
        for (int i = 0; i < N; i++) to.x[i] = from_float<T>(x[i]);
        *(Vec<T, N>*)p = to;
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        if (i < count) p[i] = from_float<T>(x[i]);
}
