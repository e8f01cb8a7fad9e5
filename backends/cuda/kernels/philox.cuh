// Philox 4x64 with ten rounds (Salmon et al., SC 2011): four random words of a counter and a key.

typedef unsigned long long u64;

struct PhiloxWords { u64 word[4]; };

// NumPy increments the counter before its use: its first block has counter[0] = 1.
DEVICE PhiloxWords philox(PhiloxWords counter, u64 key_0, u64 key_1) {
    u64 a = counter.word[0], b = counter.word[1], c = counter.word[2], d = counter.word[3];
    for (int round = 0; round < 10; round++) {
        const u64 left = 0xD2E7470EE14C6C93, right = 0xCA5A826395121157;
        const u64 high = __umul64hi(right, c) ^ b ^ key_0, other = __umul64hi(left, a) ^ d ^ key_1;
        b = right * c;
        d = left * a;
        a = high;
        c = other;
        key_0 += 0x9E3779B97F4A7C15;
        key_1 += 0xBB67AE8584CAA73B;
    }
    return {{a, b, c, d}};
}
