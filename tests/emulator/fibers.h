// The threads of a block as fibers: declarations for kernels; see `fibers.cpp`.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#pragma GCC visibility push(hidden)

struct dim3 { unsigned x = 1, y = 1, z = 1; };
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr unsigned MAX_THREADS = 1024, LANES = 32, ALL = 0xffffffffu;
constexpr int MAX_COPIES = 256, GARBAGE = 0xff;  // a byte; they are a NaN in each float type

struct Site {
    const char* file;
    int line;
    // As a default argument, the site of the call.
    static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};
#define CALL_SITE emulator::Site::here()

struct Copy { void* to; const void* from; int n_bytes, group; };  // from null: zeros

struct Slot { alignas(16) unsigned char bytes[64]; };

struct Warp {
    unsigned ready;    // bits of the lanes that can run
    unsigned arrived;  // bits of the lanes that wait for an exchange
    unsigned turn;     // number of exchanges; two slots alternate, because some lanes read late
    Slot slot[2][LANES];
    unsigned reduced;  // turn of the exchange that `result` is made of
    float result[128];
};

struct alignas(64) Fiber {
    void* context[5];  // where it continues
    bool begun;
    dim3 index;
    unsigned lane;
    Warp* warp;
    const char* waits_for;  // null while it can run
    Site site;              // of the wait
    int n_copies, n_groups;
    Copy* copies;  // asynchronous copies that are pending
};

extern Fiber* current;
extern unsigned n_launches, n_blocks;  // including the current one
extern unsigned long long n_waits;     // calls of grid_dependency_sync
extern unsigned char* dynamic_shared;

// End the launch; report a fault.
[[noreturn]] void fail(Site site, const char* format, ...);

void wait_for_block(Site site);

// Wait until all lanes of the warp have called it with the same `operation` and site.
void wait_for_warp(const char* operation, Site site);

bool is_shared(const void* p);

// a · b -> product [16, 8]
void multiply(const float (&a)[16][16], const float (&b)[16][8], float* product);

// Exchange values in a warp: return the values of all 32 lanes.
template <class T>
[[gnu::always_inline]] inline const Slot* exchange(const char* operation, Site site,
                                                   const T& mine) {
    static_assert(sizeof(T) <= sizeof(Slot));
    Slot* slots = current->warp->slot[current->warp->turn % 2];
    memcpy(slots[current->lane].bytes, &mine, sizeof mine);
    wait_for_warp(operation, site);
    return slots;
}

template <class T> T value_of(const Slot* slots, unsigned lane) {
    T x;
    memcpy(&x, slots[lane % LANES].bytes, sizeof x);
    return x;
}

// Exchange values in a warp; the first lane that runs computes the result for all lanes.
template <class T, class F>
const float* reduce(const char* operation, Site site, const T& mine, F compute) {
    Warp& warp = *current->warp;
    const unsigned turn = warp.turn + 1;
    const Slot* slots = exchange(operation, site, mine);
    if (warp.reduced != turn) compute(slots, warp.result);
    warp.reduced = turn;
    return warp.result;
}

}  // namespace emulator

#pragma GCC visibility pop
