// Logits to token ids: the sampler of gptx/generation/sampling.py in one kernel.
//
// The result is independent of the order of the threads' additions. A probability is an integer,
// exp(x - best) in units of 2^-40, so sums are exact. Each filter keeps the tokens with x at or
// above a threshold. A radix select finds the threshold, digit by digit of its key, without a sort.

constexpr int MAX_THREADS = WARP * WARP;
constexpr int DIGIT_BITS = 11;  // of a key in one pass over the tokens
constexpr int BUCKETS = 1 << DIGIT_BITS;
constexpr int IN_FLIGHT = 8;  // logits that a thread loads before it uses the first
constexpr float UNITS = 0x1p40f;  // of probability in the best token
constexpr u64 NOT_FINITE = ~(u64)0;  // in place of the best token
constexpr float MAX_DISTANCE = 27.8f;  // exp(-MAX_DISTANCE) is less than a unit

struct Workspace {  // in shared memory
    unsigned low[BUCKETS], high[BUCKETS];  // halves of the sum of each bucket
    u64 of_warp[WARP];
    u64 better;  // results of one thread for all threads
    int found;
    unsigned uniform;
};
constexpr int WORKSPACE_BYTES = 17 * 1024;  // as in sampler.py
static_assert(sizeof(Workspace) <= WORKSPACE_BYTES);

DEVICE bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// Map floats to integers in the same order; 0 and -0 are equal.
DEVICE unsigned key_of(float x) {
    unsigned word = __float_as_uint(x + 0.0f);
    return word >> 31 ? ~word : word | 0x80000000u;
}

// The first 24 random bits of `gptx.generation.sampling.uniform`.
DEVICE unsigned uniform(u64 seed, u64 stream, u64 step) {
    return (unsigned)(philox({{step + 1}}, seed, stream).word[0] >> 40);
}

// The value that the warp with the number of this lane has stored.
DEVICE u64 of_lanes_warp(const Workspace& workspace) {
    unsigned lane = threadIdx.x % WARP;
    return lane < blockDim.x / WARP ? workspace.of_warp[lane] : 0;
}

// The largest x of all threads, in every thread. The workspace must be unused before.
DEVICE u64 block_max(u64 x, Workspace& workspace) {
    for (int bit = WARP / 2; bit; bit /= 2) x = max(x, __shfl_xor_sync(FULL_MASK, x, bit));
    if (threadIdx.x % WARP == 0) workspace.of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    x = of_lanes_warp(workspace);
    for (int bit = WARP / 2; bit; bit /= 2) x = max(x, __shfl_xor_sync(FULL_MASK, x, bit));
    return x;
}

// The sum of x over the lanes up to this one.
DEVICE u64 sum_of_lanes(u64 x) {
    int lane = threadIdx.x % WARP;
    for (int by = 1; by < WARP; by *= 2) {
        u64 other = __shfl_sync(FULL_MASK, x, max(lane - by, 0));
        if (lane >= by) x += other;
    }
    return x;
}

// The sum of x over the threads before this one, and the `total` over all.
DEVICE u64 sum_before(u64 x, u64& total, Workspace& workspace) {
    int warp = threadIdx.x / WARP;
    u64 in_warp = sum_of_lanes(x);
    __syncthreads();  // the previous content may still be read
    if (threadIdx.x % WARP == WARP - 1) workspace.of_warp[warp] = in_warp;
    __syncthreads();
    u64 warps = sum_of_lanes(of_lanes_warp(workspace));
    u64 earlier = __shfl_sync(FULL_MASK, warps, max(warp - 1, 0));
    total = __shfl_sync(FULL_MASK, warps, WARP - 1);
    return (warp ? earlier : 0) + in_warp - x;
}

// Add 64-bit numbers with 32-bit atomics, which shared memory supports natively. Exactly one thread
// observes each overflow of a lower half.
DEVICE void add(Workspace& workspace, unsigned bucket, u64 x) {
    unsigned before = atomicAdd(&workspace.low[bucket], (unsigned)x);
    unsigned rest = (unsigned)(x >> 32) + (before + (unsigned)x < before);
    if (rest) atomicAdd(&workspace.high[bucket], rest);
}

DEVICE u64 sum_of(const Workspace& workspace, int bucket) {
    return (u64)workspace.high[bucket] << 32 | workspace.low[bucket];
}

// Select, among the tokens with keys from `lowest` to `highest`, the lowest key to keep: the tokens
// above it weigh less than the goal, goal_of(total weight); with the tokens equal to it they do
// not.
template <class Weight, class Goal>
DEVICE unsigned worst_kept(
    const float* x, int V, unsigned lowest, unsigned highest, Weight weight, Goal goal_of,
    Workspace& workspace
) {
    u64 better = 0, goal = 0;  // `better`: weight of the keys above `high`
    unsigned low = lowest, high = highest;
    int shift;
    do {
        shift = max(32 - __clz((int)(high - low)) - DIGIT_BITS, 0);
        for (int i = threadIdx.x; i < BUCKETS; i += blockDim.x)
            workspace.low[i] = workspace.high[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < V; i += blockDim.x) {
            unsigned key = key_of(x[i]);
            if (low <= key && key <= high) add(workspace, (high - key) >> shift, weight(x[i]));
        }
        __syncthreads();
        int each = (BUCKETS + blockDim.x - 1) / blockDim.x;
        int bucket = min((int)threadIdx.x * each, BUCKETS), end = min(bucket + each, BUCKETS);
        u64 sum = 0, total;
        for (int i = bucket; i < end; i++) sum += sum_of(workspace, i);
        u64 before = better + sum_before(sum, total, workspace);
        if (goal == 0) goal = goal_of(total);
        if (better + total < goal) return lowest;  // all tokens weigh less
        if (before < goal && goal <= before + sum) {  // in one thread
            while (before + sum_of(workspace, bucket) < goal) before += sum_of(workspace, bucket++);
            workspace.better = before;
            workspace.found = bucket;
        }
        __syncthreads();
        better = workspace.better;
        high -= (unsigned)workspace.found << shift;
        low = max(low, high - min(high, (1u << shift) - 1));
    } while (shift > 0);
    return high;
}

// Draw a token from x [V], of which `best` is the largest, with the random number
// workspace.uniform.
DEVICE int draw(
    const float* x, int V, float best, int top_k, float top_p, float log_min_p, Workspace& workspace
) {
    auto mass = [=](float y) { return (u64)(expf(y < best ? y - best : 0.0f) * UNITS); };
    unsigned highest = key_of(best), lowest = key_of(best - MAX_DISTANCE);  // others weigh 0
    if (top_k > 0) {
        auto one = [](float) { return (u64)1; };
        auto k = [=](u64) { return (u64)top_k; };
        lowest = worst_kept(x, V, lowest, highest, one, k, workspace);
    }
    if (top_p < 1) {
        auto part = [=](u64 total) { return max((u64)ceil((double)total * top_p), (u64)1); };
        lowest = worst_kept(x, V, lowest, highest, mass, part, workspace);
    }
    lowest = max(lowest, key_of(best + log_min_p));
    auto kept = [=](float y) { return key_of(y) >= lowest ? mass(y) : 0; };

    int each = (V + blockDim.x - 1) / blockDim.x | 1;  // odd: no bank conflicts
    int token = min((int)threadIdx.x * each, V), end = min(token + each, V);
    u64 sum = 0, total;
    for (int i = token; i < end; i++) sum += kept(x[i]);
    u64 before = sum_before(sum, total, workspace);
    // The first token up to which the sum exceeds uniform / 2^24 of the total.
    u64 u = workspace.uniform, goal = (total >> 24) * u + ((total & 0xffffff) * u >> 24) + 1;
    if (before < goal && goal <= before + sum) {  // in one thread
        while ((before += kept(x[token])) < goal) token++;
        workspace.found = token;
    }
    __syncthreads();
    return workspace.found;
}

// The largest x of all blocks of a row, in its last block to arrive; 0 in the others. One thread of
// each block calls it. `maximum_and_count` holds two zeros before and after.
DEVICE u64 max_of_blocks(u64 x, u64* maximum_and_count) {
    atomicMax(&maximum_and_count[0], x);
    __threadfence();
    if (atomicAdd(&maximum_and_count[1], (u64)1) < gridDim.x - 1) return 0;
    __threadfence();
    x = atomicMax(&maximum_and_count[0], (u64)0);
    maximum_and_count[0] = maximum_and_count[1] = 0;
    return x;
}

// Logits [B, V] -> ids [B], -1 if a logit is not finite. Grid (n, B), block a multiple of 32 up to
// 1024; n is 1 unless temperature is 0. Shared memory: WORKSPACE_BYTES, and the logits as below.
//
// Null if unused: `bias` [V], `seen` [B, V] (tokens in prompt or output) and `counts` [B, V] (of
// tokens in the output). The kernel updates `seen`, `counts` and `steps` [B]. Temperature 0 selects
// the best token. Disabled filters: top_k 0, top_p 1, log_min_p -infinity. For other temperatures
// `scratch` [B, V] holds the logits after penalties; if it is null, shared memory does.
// `block_maxima` [B, 2]: zeros before and after. `host_ids` [B], page-locked host memory or null,
// receives the ids, too.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1) sample(
    const float* __restrict__ logits, int V, const float* __restrict__ bias, unsigned char* seen,
    int* counts, float repetition, float presence, float frequency, float temperature, int top_k,
    float top_p, float log_min_p, u64 seed, const long long* streams, long long* steps,
    float* scratch, u64* block_maxima, long long* ids, long long* host_ids
) {
    DYNAMIC_SHARED(shared);
    Workspace& workspace = *(Workspace*)shared;
    int row = blockIdx.y;
    long long first = (long long)row * V;
    float* x = scratch ? scratch + first : (float*)(shared + WORKSPACE_BYTES);
    bool drawn = temperature > 0;
    if (drawn && threadIdx.x == 0) workspace.uniform = uniform(seed, streams[row], steps[row]);

    auto adjusted = [=](float y, int i) {
        if (bias) y += bias[i];
        if (seen && seen[first + i]) y = y > 0 ? y / repetition : y * repetition;
        if (counts && counts[first + i])
            y = y - presence - rounded_product(frequency, (float)counts[first + i]);
        return drawn ? y / temperature : y;
    };
    u64 best = 0;  // key and complement of the token: the lower of equal tokens wins
    int stride = gridDim.x * blockDim.x;
    const int first_token = blockIdx.x * blockDim.x + threadIdx.x;
    for (int start = first_token; start < V; start += IN_FLIGHT * stride) {
        float some[IN_FLIGHT];
#pragma unroll
        for (int j = 0; j < IN_FLIGHT; j++)
            some[j] = logits[first + min(start + j * stride, V - 1)];
#pragma unroll
        for (int j = 0, i = start; j < IN_FLIGHT && i < V; j++, i += stride) {
            float y = adjusted(some[j], i);
            if (drawn) x[i] = y;
            best = max(best, is_finite(some[j]) ? (u64)key_of(y) << 32 | ~(unsigned)i : NOT_FINITE);
        }
    }
    best = block_max(best, workspace);
    int token = (int)~(unsigned)best;
    if (drawn && best != NOT_FINITE)
        token = draw(x, V, x[token], top_k, top_p, log_min_p, workspace);
    if (threadIdx.x > 0) return;
    if (gridDim.x > 1) {
        best = max_of_blocks(best, block_maxima + 2 * row);
        token = (int)~(unsigned)best;
        if (best == 0) return;
    }
    steps[row]++;
    if (best == NOT_FINITE) token = -1;
    ids[row] = token;
    if (host_ids) host_ids[row] = token;
    if (token < 0) return;
    if (seen) seen[first + token] = 1;
    if (counts) counts[first + token]++;
}
