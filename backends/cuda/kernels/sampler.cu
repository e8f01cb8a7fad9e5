// Logits to token ids: the sampler of gptx/sampling.py in one kernel.
//
// Nothing here depends on the order in which threads add. A probability is a whole number, the
// exponential of x - best in units of 2^-40, so that sums are exact. And every filter keeps the
// tokens from some x on: what it has to find is one float, digit by digit of its key, without a
// sort.

typedef unsigned long long u64;

constexpr int MOST_THREADS = WARP * WARP;
constexpr int DIGIT = 11;  // binary places of a key that one pass over the tokens decides
constexpr int BUCKETS = 1 << DIGIT;
constexpr int AT_ONCE = 8;  // logits that a thread has asked memory for before it uses one
constexpr float UNITS = 0x1p40f;  // that make the probability of the best token
constexpr u64 NOT_FINITE = ~(u64)0;  // in place of the best token
constexpr float FAINT = 27.8f;  // exp(-FAINT) is less than a unit

struct Room {  // in shared memory
    unsigned low[BUCKETS], high[BUCKETS];  // halves of a sum for each bucket
    u64 of_warp[WARP];
    u64 better;  // what one thread has found for all
    int found;
    unsigned uniform;
};
constexpr int ROOM = 17 * 1024;  // bytes that it is given
static_assert(sizeof(Room) <= ROOM);

DEVICE bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// Integers in the order of the floats; 0 and -0 are equal.
DEVICE unsigned key_of(float x) {
    unsigned word = __float_as_uint(x + 0.0f);
    return word >> 31 ? ~word : word | 0x80000000u;
}

// The first 24 of the random bits that `gptx.generation.sampling.uniform` takes: Philox 4x64 with ten rounds
// (Salmon et al., SC 2011), whose counter NumPy advances before it is used.
DEVICE unsigned uniform(u64 seed, u64 stream, u64 step) {
    u64 a = step + 1, b = 0, c = 0, d = 0;
    for (int round = 0; round < 10; round++) {
        u64 left = 0xD2E7470EE14C6C93, right = 0xCA5A826395121157;
        u64 high = __umul64hi(right, c) ^ b ^ seed, other = __umul64hi(left, a) ^ d ^ stream;
        b = right * c;
        d = left * a;
        a = high;
        c = other;
        seed += 0x9E3779B97F4A7C15;
        stream += 0xBB67AE8584CAA73B;
    }
    return (unsigned)(a >> 40);
}

// What the warp with the number of this lane has put into the room.
DEVICE u64 of_lanes_warp(const Room& room) {
    unsigned lane = threadIdx.x % WARP;
    return lane < blockDim.x / WARP ? room.of_warp[lane] : 0;
}

// The largest x of all threads, in every thread. Nothing has been in the room before.
DEVICE u64 block_max(u64 x, Room& room) {
    for (int bit = WARP / 2; bit; bit /= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, bit));
    if (threadIdx.x % WARP == 0) room.of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    x = of_lanes_warp(room);
    for (int bit = WARP / 2; bit; bit /= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, bit));
    return x;
}

// The sum of x over the lanes up to this one.
DEVICE u64 sum_of_lanes(u64 x) {
    int lane = threadIdx.x % WARP;
    for (int by = 1; by < WARP; by *= 2) {
        u64 other = __shfl_sync(ALL_LANES, x, max(lane - by, 0));
        if (lane >= by) x += other;
    }
    return x;
}

// The sum of x over the threads before this one, and the `total` over all.
DEVICE u64 sum_before(u64 x, u64& total, Room& room) {
    int warp = threadIdx.x / WARP;
    u64 in_warp = sum_of_lanes(x);
    __syncthreads();  // the room may still be read from before
    if (threadIdx.x % WARP == WARP - 1) room.of_warp[warp] = in_warp;
    __syncthreads();
    u64 warps = sum_of_lanes(of_lanes_warp(room));
    u64 earlier = __shfl_sync(ALL_LANES, warps, max(warp - 1, 0));
    total = __shfl_sync(ALL_LANES, warps, WARP - 1);
    return (warp ? earlier : 0) + in_warp - x;
}

// Sums of 64 places, by additions of 32 places, which shared memory does by itself: of the lower
// halves exactly one thread sees each overflow.
DEVICE void add(Room& room, unsigned bucket, u64 x) {
    unsigned before = atomicAdd(&room.low[bucket], (unsigned)x);
    unsigned rest = (unsigned)(x >> 32) + (before + (unsigned)x < before);
    if (rest) atomicAdd(&room.high[bucket], rest);
}

DEVICE u64 sum_of(const Room& room, int bucket) {
    return (u64)room.high[bucket] << 32 | room.low[bucket];
}

// Of the tokens with keys from `lowest` to `highest`, the key of the worst one to keep: those
// better than it weigh less than `goal(weight of all)`, and together with its equals they do not.
template <class Weight, class Goal>
DEVICE unsigned worst_kept(
    const float* x, int V, unsigned lowest, unsigned highest, Weight weight, Goal goal_of,
    Room& room
) {
    u64 better = 0, goal = 0;  // `better`: what the keys above `high` weigh
    unsigned low = lowest, high = highest;
    int shift;
    do {
        shift = max(32 - __clz((int)(high - low)) - DIGIT, 0);
        for (int i = threadIdx.x; i < BUCKETS; i += blockDim.x) room.low[i] = room.high[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < V; i += blockDim.x) {
            unsigned key = key_of(x[i]);
            if (low <= key && key <= high) add(room, (high - key) >> shift, weight(x[i]));
        }
        __syncthreads();
        int each = (BUCKETS + blockDim.x - 1) / blockDim.x;
        int bucket = min((int)threadIdx.x * each, BUCKETS), end = min(bucket + each, BUCKETS);
        u64 sum = 0, total;
        for (int i = bucket; i < end; i++) sum += sum_of(room, i);
        u64 before = better + sum_before(sum, total, room);
        if (goal == 0) goal = goal_of(total);
        if (better + total < goal) return lowest;  // there are too few
        if (before < goal && goal <= before + sum) {  // in one thread
            while (before + sum_of(room, bucket) < goal) before += sum_of(room, bucket++);
            room.better = before;
            room.found = bucket;
        }
        __syncthreads();
        better = room.better;
        high -= (unsigned)room.found << shift;
        low = max(low, high - min(high, (1u << shift) - 1));
    } while (shift > 0);
    return high;
}

// A token drawn from x [V], of which `best` is the largest; `room.uniform` decides.
DEVICE int draw(
    const float* x, int V, float best, int top_k, float top_p, float log_min_p, Room& room
) {
    auto mass = [=](float y) { return (u64)(expf(y < best ? y - best : 0.0f) * UNITS); };
    unsigned highest = key_of(best), lowest = key_of(best - FAINT);  // the others weigh nothing
    if (top_k > 0) {
        auto one = [](float) { return (u64)1; };
        auto k = [=](u64) { return (u64)top_k; };
        lowest = worst_kept(x, V, lowest, highest, one, k, room);
    }
    if (top_p < 1) {
        auto part = [=](u64 total) { return max((u64)ceil((double)total * top_p), (u64)1); };
        lowest = worst_kept(x, V, lowest, highest, mass, part, room);
    }
    lowest = max(lowest, key_of(best + log_min_p));
    auto kept = [=](float y) { return key_of(y) >= lowest ? mass(y) : 0; };

    int each = (V + blockDim.x - 1) / blockDim.x | 1;  // odd: 32 lanes meet all 32 banks
    int token = min((int)threadIdx.x * each, V), end = min(token + each, V);
    u64 sum = 0, total;
    for (int i = token; i < end; i++) sum += kept(x[i]);
    u64 before = sum_before(sum, total, room);
    // The first token up to which the sum exceeds uniform / 2^24 of the total.
    u64 u = room.uniform, goal = (total >> 24) * u + ((total & 0xffffff) * u >> 24) + 1;
    if (before < goal && goal <= before + sum) {  // in one thread
        while ((before += kept(x[token])) < goal) token++;
        room.found = token;
    }
    __syncthreads();
    return room.found;
}

// The largest x of all blocks of a row in its last one, and 0 in the others. Called by one thread
// of each block; `meeting` holds two zeros, and does so again.
DEVICE u64 last_of_blocks(u64 x, u64* meeting) {
    atomicMax(&meeting[0], x);
    __threadfence();
    if (atomicAdd(&meeting[1], (u64)1) < gridDim.x - 1) return 0;
    __threadfence();
    x = atomicMax(&meeting[0], (u64)0);
    meeting[0] = meeting[1] = 0;
    return x;
}

// Logits [B, V] -> ids [B], -1 where a logit is not finite. Grid (n, B), block any multiple of 32
// up to 1024; n is 1 unless temperature is 0. Shared memory: 17 KB, and the logits as below.
//
// Null where unused: `bias` [V], `seen` [B, V] (which tokens are in prompt or output) and `counts`
// [B, V] (how often in the output); the latter two are brought up to date, and so are `steps` [B].
// With temperature 0 the best token is taken. What is off: top_k 0, top_p 1, log_min_p -infinity.
// For other temperatures `scratch` [B, V] holds the logits after penalties, or, where it is null,
// shared memory. `meetings` [B, 2] are zeros, and are so afterwards. `told` [B], memory of the host
// or null, gets the ids too.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1) sample(
    const float* __restrict__ logits, int V, const float* __restrict__ bias, unsigned char* seen,
    int* counts, float repetition, float presence, float frequency, float temperature, int top_k,
    float top_p, float log_min_p, u64 seed, const long long* streams, long long* steps,
    float* scratch, u64* meetings, long long* ids, long long* told
) {
    DYNAMIC_SHARED(shared);
    Room& room = *(Room*)shared;
    int row = blockIdx.y;
    long long first = (long long)row * V;
    float* x = scratch ? scratch + first : (float*)(shared + ROOM);
    bool drawn = temperature > 0;
    if (drawn && threadIdx.x == 0) room.uniform = uniform(seed, streams[row], steps[row]);

    auto adjusted = [=](float y, int i) {
        if (bias) y += bias[i];
        if (seen && seen[first + i]) y = y > 0 ? y / repetition : y * repetition;
        if (counts && counts[first + i])
            y = y - presence - product(frequency, (float)counts[first + i]);
        return drawn ? y / temperature : y;
    };
    u64 best = 0;  // key and complement of the token: of equals the lower token
    int stride = gridDim.x * blockDim.x;
    for (int start = blockIdx.x * blockDim.x + threadIdx.x; start < V; start += AT_ONCE * stride) {
        float some[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) some[j] = logits[first + min(start + j * stride, V - 1)];
#pragma unroll
        for (int j = 0, i = start; j < AT_ONCE && i < V; j++, i += stride) {
            float y = adjusted(some[j], i);
            if (drawn) x[i] = y;
            best = max(best, is_finite(some[j]) ? (u64)key_of(y) << 32 | ~(unsigned)i : NOT_FINITE);
        }
    }
    best = block_max(best, room);
    int token = (int)~(unsigned)best;
    if (drawn && best != NOT_FINITE)
        token = draw(x, V, x[token], top_k, top_p, log_min_p, room);
    if (threadIdx.x > 0) return;
    if (gridDim.x > 1) {
        best = last_of_blocks(best, meetings + 2 * row);
        token = (int)~(unsigned)best;
        if (best == 0) return;
    }
    steps[row]++;
    if (best == NOT_FINITE) token = -1;
    ids[row] = token;
    if (told) told[row] = token;
    if (token < 0) return;
    if (seen) seen[first + token] = 1;
    if (counts) counts[first + token]++;
}
