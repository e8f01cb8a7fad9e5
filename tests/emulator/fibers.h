// The threads of a block as fibers: what kernels need of `fibers.cpp`.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#pragma GCC visibility push(hidden)

struct dim3 { unsigned x = 1, y = 1, z = 1; };
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr unsigned MAX_THREADS = 1024, LANES = 32, ALL = 0xffffffffu;
constexpr int MAX_COPIES = 256, GARBAGE = 0xff;  // as bytes: a NaN in each of the float types

struct Site {
    const char* file;
    int line;
    // As a default argument: where the function is called.
    static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};
#define HERE emulator::Site::here()

struct Copy { void* to; const void* from; int n_bytes, group; };  // from null: zeros

struct Slot { alignas(16) unsigned char bytes[64]; };

struct Warp {
    unsigned ready;    // lanes that can go on
    unsigned arrived;  // lanes that wait for an exchange
    unsigned turn;     // exchanges so far; their slots alternate, as some lanes read late
    Slot slot[2][LANES];
    unsigned reduced;  // the exchange whose values were reduced to the result
    float result[128];
};

struct alignas(64) Fiber {
    void* context[5];  // where it goes on
    bool begun;
    dim3 index;
    unsigned lane;
    Warp* warp;
    const char* waits_for;  // null: it does not wait
    Site site;              // where it waits
    int n_copies, n_groups;
    Copy* copies;  // on their way
};

extern Fiber* current;
extern unsigned n_launches, n_blocks;  // so far, with this one
extern unsigned long long n_waits;     // of threads that would have waited for the kernel ahead
extern unsigned char* dynamic_shared;

// End the launch with a message.
[[noreturn]] void fail(Site site, const char* format, ...);

void wait_for_block(Site site);

// Until all lanes of the warp are here; each has to say the same.
void wait_for_warp(const char* what, Site site);

bool is_shared(const void* p);

// a · b -> product [16, 8]
void multiply(const float (&a)[16][16], const float (&b)[16][8], float* product);

// Give a value to the other lanes of the warp: the values of all 32.
template <class T>
[[gnu::always_inline]] inline const Slot* exchange(const char* what, Site site, const T& mine) {
    static_assert(sizeof(T) <= sizeof(Slot));
    Slot* slots = current->warp->slot[current->warp->turn % 2];
    memcpy(slots[current->lane].bytes, &mine, sizeof mine);
    wait_for_warp(what, site);
    return slots;
}

template <class T> T value_of(const Slot* slots, unsigned lane) {
    T x;
    memcpy(&x, slots[lane % LANES].bytes, sizeof x);
    return x;
}

// Give a value to the warp, one lane of which makes the result for all.
template <class T, class F>
const float* reduce(const char* what, Site site, const T& mine, F make) {
    Warp& warp = *current->warp;
    const unsigned turn = warp.turn + 1;
    const Slot* slots = exchange(what, site, mine);
    if (warp.reduced != turn) make(slots, warp.result);
    warp.reduced = turn;
    return warp.result;
}

}  // namespace emulator

#pragma GCC visibility pop
