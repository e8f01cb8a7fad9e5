// The threads of a block as fibers: each runs until it has to wait for others, then the next one
// does. Blocks run one after the other, warps and lanes in an order drawn from a seed.
//
// It is strict where a GPU is silent or hangs: threads that wait for what never comes, lanes that
// disagree, addresses outside of every array. A fault ends the launch with a line that says where.
#pragma once
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

struct dim3 { unsigned x = 1, y = 1, z = 1; };
static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr unsigned MAX_THREADS = 1024, LANES = 32, ALL = 0xffffffffu;
constexpr size_t STACK = 128 << 10, MAX_SHARED = 227 << 10, STRIP = 256;
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

struct Fiber {
    jmp_buf context;
    ucontext_t start;
    bool begun;
    dim3 index;
    unsigned warp, lane;
    const char* waits_for;  // null: it does not wait
    Site site;              // where it waits
    Copy copies[MAX_COPIES];  // on their way
    int n_copies, n_groups;
};

struct Slot { alignas(16) unsigned char bytes[64]; };

struct Warp {
    unsigned ready;    // lanes that can go on
    unsigned arrived;  // lanes that wait for an exchange
    unsigned turn;     // exchanges so far; their slots alternate, as some lanes read late
    Slot slot[2][LANES];
};

static Fiber fibers[MAX_THREADS];
static Warp warps[MAX_THREADS / LANES];
static Fiber* current;
static unsigned n_threads, n_ended, n_at_barrier, ready_warps, random_state;
static void (*body)(void**);  // the kernel
static void** arguments;
static const char* kernel;
static char message[2048];
static unsigned char *dynamic_shared, *shared_end;
static size_t shared_bytes;

// Where the linker gathers what is declared __shared__.
extern "C" unsigned char __start_static_shared[] __attribute__((weak, visibility("hidden")));
extern "C" unsigned char __stop_static_shared[] __attribute__((weak, visibility("hidden")));

static jmp_buf home;  // the stack of the launch
enum { BLOCK_ENDED = 1, FAILED };

[[noreturn]] static void fail(Site site, const char* format, ...) {
    char* at = message;
    char* end = message + sizeof message;
    at += snprintf(at, end - at, "kernel %s, block (%u, %u, %u)", kernel, blockIdx.x, blockIdx.y,
                   blockIdx.z);
    if (current)
        at += snprintf(at, end - at, ", thread (%u, %u, %u)", threadIdx.x, threadIdx.y,
                       threadIdx.z);
    if (site.file) at += snprintf(at, end - at, ", %s:%d", site.file, site.line);
    at += snprintf(at, end - at, ": ");
    va_list list;
    va_start(list, format);
    vsnprintf(at, end - at, format, list);
    va_end(list);
    for (Fiber& fiber : fibers) fiber.begun = false;  // what they were doing is given up
    _longjmp(home, FAILED);
}

static unsigned draw() {  // xorshift
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    return random_state ^= random_state << 5;
}

// One of the bits that are set, any of them.
static unsigned any_of(unsigned bits) {
    unsigned from = draw() % 32;
    unsigned turned = from ? bits >> from | bits << (32 - from) : bits;
    return (from + __builtin_ctz(turned)) % 32;
}

static bool same(const char* a, const char* b) { return a == b || (a && b && !strcmp(a, b)); }

static bool same_wait(const Fiber& a, const Fiber& b) {
    return same(a.waits_for, b.waits_for) && same(a.site.file, b.site.file) &&
           a.site.line == b.site.line;
}

[[noreturn]] static void tell_deadlock() {
    char text[1024];
    size_t n = snprintf(text, sizeof text, "of %u threads %u ended", n_threads, n_ended);
    for (Fiber* first = fibers; first < fibers + n_threads && n < sizeof text / 2; first++) {
        if (!first->waits_for) continue;
        unsigned count = 1;
        for (Fiber* other = first + 1; other < fibers + n_threads; other++)
            if (same_wait(*first, *other)) {
                count++;
                other->waits_for = nullptr;  // told
            }
        n += snprintf(text + n, sizeof text - n, ", %u wait at %s:%d for %s", count,
                      first->site.file, first->site.line, first->waits_for);
    }
    current = nullptr;
    fail({}, "deadlock: %s", text);
}

// Leave the stack of the current fiber for that of another; null: for that of the launch.
__attribute__((noinline)) static void switch_to(Fiber* next) {
    Fiber* from = current;
    if (from == next) return;
    if (from && _setjmp(from->context)) return;
    current = next;
    if (!next) _longjmp(home, BLOCK_ENDED);
    threadIdx = next->index;
    if (next->begun) _longjmp(next->context, 1);
    next->begun = true;
    setcontext(&next->start);
}

static void be_ready(unsigned warp, unsigned lanes) {
    for (unsigned lane = 0; lane < LANES; lane++)
        if (lanes >> lane & 1) fibers[warp * LANES + lane].waits_for = nullptr;
    warps[warp].ready |= lanes;
    ready_warps |= 1u << warp;
}

static void all_ready() {
    for (unsigned i = 0; i < n_threads; i += LANES)
        be_ready(i / LANES, n_threads - i < LANES ? (1u << (n_threads - i)) - 1 : ALL);
}

// Go on with whoever can: a lane of this warp, of another, everybody past a barrier.
static void give_way() {
    if (!ready_warps) {
        if (n_ended == n_threads) return switch_to(nullptr);
        if (n_at_barrier < n_threads) tell_deadlock();
        for (unsigned i = 1; i < n_threads; i++)
            if (!same_wait(fibers[0], fibers[i])) tell_deadlock();
        n_at_barrier = 0;
        all_ready();
    }
    unsigned warp = current ? current->warp : 0;
    if (!warps[warp].ready) warp = any_of(ready_warps);
    switch_to(&fibers[warp * LANES + any_of(warps[warp].ready)]);
}

static void stop(const char* waits_for, Site site) {
    current->waits_for = waits_for;
    current->site = site;
    Warp& warp = warps[current->warp];
    warp.ready &= ~(1u << current->lane);
    if (!warp.ready) ready_warps &= ~(1u << current->warp);
}

static void block_barrier(Site site) {
    stop("__syncthreads", site);
    n_at_barrier++;
    give_way();
}

// Give a value to the other lanes of the warp: the values of all 32, once all have come.
template <class T> static const Slot* exchange(const char* what, Site site, const T& mine) {
    static_assert(sizeof(T) <= sizeof(Slot));
    Warp& warp = warps[current->warp];
    Slot* slots = warp.slot[warp.turn % 2];
    memcpy(slots[current->lane].bytes, &mine, sizeof mine);
    stop(what, site);
    if (warp.arrived) {
        Fiber& other = fibers[current->warp * LANES + __builtin_ctz(warp.arrived)];
        if (!same_wait(*current, other))
            fail(site, "%s, but lane %u of the warp waits at %s:%d for %s", what, other.lane,
                 other.site.file, other.site.line, other.waits_for);
    }
    warp.arrived |= 1u << current->lane;
    if (warp.arrived == ALL) {
        warp.arrived = 0;
        warp.turn++;
        be_ready(current->warp, ALL);
    }
    give_way();
    return slots;
}

template <class T> static T value_of(const Slot* slots, unsigned lane) {
    T x;
    memcpy(&x, slots[lane % LANES].bytes, sizeof x);
    return x;
}

static void run_thread() {
    for (;;) {  // in the next block again
        body(arguments);
        stop(nullptr, {});
        n_ended++;
        give_way();
    }
}

// Shared memory ends where no memory is; nobody may change the strip in front of it.
static void make_shared() {
    if (!shared_end) {
        size_t page = sysconf(_SC_PAGESIZE), room = (MAX_SHARED + STRIP + page) / page * page;
        void* p = mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                       -1, 0);
        shared_end = (unsigned char*)p + room;
        mprotect(shared_end, page, PROT_NONE);
    }
    dynamic_shared = shared_end - (shared_bytes + 15) / 16 * 16;
}

static bool is_shared(const void* p) {
    const unsigned char* q = (const unsigned char*)p;
    return (q >= dynamic_shared && q < shared_end) ||
           (q >= __start_static_shared && q < __stop_static_shared);
}

static void make_fibers() {
    static unsigned char* stacks = (unsigned char*)mmap(
        nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (unsigned i = 0; i < n_threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        fiber.warp = i / LANES;
        fiber.lane = i % LANES;
        if (fiber.begun) continue;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks + i * STACK;
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, run_thread, 0);
    }
}

static void check_strips() {
    for (unsigned char* p = dynamic_shared - STRIP; p < shared_end; p++) {
        if (p == dynamic_shared) p += shared_bytes;
        if (p < shared_end && *p != GARBAGE)
            fail({}, "written at byte %td of the %zu of dynamic shared memory", p - dynamic_shared,
                 shared_bytes);
    }
}

// True if every thread came to its end; else there is a message.
static bool run_block() {
    memset(dynamic_shared - STRIP, GARBAGE, shared_end - dynamic_shared + STRIP);
    if (__start_static_shared)
        memset(__start_static_shared, GARBAGE, __stop_static_shared - __start_static_shared);
    n_ended = n_at_barrier = ready_warps = 0;
    for (Warp& warp : warps) warp.ready = warp.arrived = 0;
    for (Fiber& fiber : fibers) fiber.n_copies = fiber.n_groups = 0;
    all_ready();
    current = nullptr;
    switch (_setjmp(home)) {
        case 0: give_way();
        case BLOCK_ENDED: check_strips(); return true;
        default: return false;
    }
}

}  // namespace emulator
