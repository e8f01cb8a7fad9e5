// The threads of a block as fibers. A fiber runs until it waits for other threads; then a fiber
// that is drawn from a seeded generator runs. Blocks run one after the other.
//
// Some errors hang or pass silently on a GPU: deadlocks, warp operations that lanes call at
// different sites, accesses outside of every array. Here they are faults that end the launch.
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "launch.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t STACK_BYTES = 33 << 12, MAX_SHARED_BYTES = 227 << 10, MARGIN_BYTES = 256;
enum Outcome { BLOCK_ENDED = 1, FAILED };

Fiber* current;
unsigned n_launches, n_blocks;
unsigned long long n_waits;
unsigned char* dynamic_shared;

static Fiber fibers[MAX_THREADS];
static Warp warps[MAX_THREADS / LANES];
static Copy copies[MAX_THREADS][MAX_COPIES];
static unsigned n_threads, n_ended, n_at_barrier, ready_warps, random_state;
static const Kernel* kernel;
static void** arguments;
static unsigned char* shared_end;
static size_t shared_bytes;
static void* launch_context[5];  // the stack of the launch
static Outcome outcome;
static char message[2048];

// The linker puts __shared__ variables between these two.
extern "C" unsigned char __start_static_shared[] __attribute__((weak, visibility("hidden")));
extern "C" unsigned char __stop_static_shared[] __attribute__((weak, visibility("hidden")));

[[noreturn, gnu::noinline]] static void leave_block(Outcome how) {
    outcome = how;
    __builtin_longjmp(launch_context, 1);
}

void fail(Site site, const char* format, ...) {
    char* at = message;
    char* end = message + sizeof message;
    at += snprintf(at, end - at, "kernel %s, block (%u, %u, %u)", kernel->name, blockIdx.x,
                   blockIdx.y, blockIdx.z);
    if (current)
        at += snprintf(at, end - at, ", thread (%u, %u, %u)", threadIdx.x, threadIdx.y,
                       threadIdx.z);
    if (site.file) at += snprintf(at, end - at, ", %s:%d", site.file, site.line);
    at += snprintf(at, end - at, ": ");
    va_list list;
    va_start(list, format);
    vsnprintf(at, end - at, format, list);
    va_end(list);
    for (Fiber& fiber : fibers) fiber.begun = false;  // their stacks are abandoned
    leave_block(FAILED);
}

static unsigned next_random() {  // xorshift
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    return random_state ^= random_state << 5;
}

// The number of a random bit among those that are set.
static unsigned random_bit(unsigned bits) {
    unsigned from = next_random() % 32;
    return (from + __builtin_ctz(bits >> from | bits << (-from & 31))) % 32;
}

static bool same(const char* a, const char* b) { return a == b || (a && b && !strcmp(a, b)); }

static bool same_wait(const Fiber& a, const Fiber& b) {
    return a.site.line == b.site.line && same(a.waits_for, b.waits_for) &&
           same(a.site.file, b.site.file);
}

[[noreturn]] static void report_deadlock() {
    char text[1024];
    size_t n = snprintf(text, sizeof text, "of %u threads %u ended", n_threads, n_ended);
    for (Fiber* first = fibers; first < fibers + n_threads && n < sizeof text / 2; first++) {
        if (!first->waits_for) continue;
        unsigned count = 1;
        for (Fiber* other = first + 1; other < fibers + n_threads; other++)
            if (same_wait(*first, *other)) {
                count++;
                other->waits_for = nullptr;  // already counted
            }
        n += snprintf(text + n, sizeof text - n, ", %u wait at %s:%d for %s", count,
                      first->site.file, first->site.line, first->waits_for);
    }
    current = nullptr;
    fail({}, "deadlock: %s", text);
}

static void run_thread();

// Switch from the stack of the current fiber to that of another.
[[gnu::noinline]] static void switch_to(Fiber* next) {
    Fiber* from = current;
    if (from == next) return;
    if (from && __builtin_setjmp(from->context)) return;
    current = next;
    threadIdx = next->index;
    if (next->begun) __builtin_longjmp(next->context, 1);  // keeps return prediction intact
    static unsigned char* stacks = (unsigned char*)mmap(
        nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    const size_t i = next - fibers;
    static ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks + i * STACK_BYTES;
    // Different offsets of the tops, and an odd number of pages, spread the stacks over the sets of
    // the cache and of the TLB.
    start.uc_stack.ss_size = STACK_BYTES - i % LANES * 448;
    makecontext(&start, run_thread, 0);
    next->begun = true;
    setcontext(&start);
}

static void make_ready(Warp& warp, unsigned lanes) {
    warp.ready |= lanes;
    ready_warps |= 1u << (&warp - warps);
}

static void make_all_ready() {
    for (unsigned i = 0; i < n_threads; i += LANES)
        make_ready(warps[i / LANES], n_threads - i < LANES ? (1u << (n_threads - i)) - 1 : ALL);
    for (unsigned i = 0; i < n_threads; i++) fibers[i].waits_for = nullptr;
}

// Continue with a fiber that can run: of this warp, else of another. If none can, release the
// barrier that all threads wait at; if they do not, report a deadlock.
static void yield_fiber() {
    if (!ready_warps) {
        if (n_ended == n_threads) {
            current->begun = false;  // this point is not resumed
            leave_block(BLOCK_ENDED);
        }
        if (n_at_barrier < n_threads) report_deadlock();
        for (unsigned i = 1; i < n_threads; i++)
            if (!same_wait(fibers[0], fibers[i])) report_deadlock();
        n_at_barrier = 0;
        make_all_ready();
    }
    Warp* warp = current ? current->warp : warps;
    if (!warp->ready) warp = &warps[random_bit(ready_warps)];
    switch_to(&fibers[(warp - warps) * LANES + random_bit(warp->ready)]);
}

static void suspend(const char* waits_for, Site site) {
    current->waits_for = waits_for;
    current->site = site;
    Warp& warp = *current->warp;
    warp.ready &= ~(1u << current->lane);
    if (!warp.ready) ready_warps &= ~(1u << (&warp - warps));
}

static void run_thread() {
    for (;;) {  // one turn for each block
        kernel->call(arguments);
        suspend(nullptr, {});
        n_ended++;
        yield_fiber();
    }
}

void wait_for_block(Site site) {
    suspend("__syncthreads", site);
    n_at_barrier++;
    yield_fiber();
}

void wait_for_warp(const char* operation, Site site) {
    suspend(operation, site);
    Warp& warp = *current->warp;
    Fiber* lanes = current - current->lane;
    if (warp.arrived) {
        const Fiber& other = lanes[__builtin_ctz(warp.arrived)];
        if (!same_wait(*current, other))
            fail(site, "%s, but lane %u of the warp waits at %s:%d for %s", operation, other.lane,
                 other.site.file, other.site.line, other.waits_for);
    }
    warp.arrived |= 1u << current->lane;
    if (warp.arrived == ALL) {
        warp.arrived = 0;
        warp.turn++;
        for (unsigned i = 0; i < LANES; i++) lanes[i].waits_for = nullptr;
        make_ready(warp, ALL);
    }
    yield_fiber();
}

void multiply(const float (&a)[16][16], const float (&b)[16][8], float* product) {
    for (int row = 0; row < 16; row++) {
        float sum[8] = {};
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) sum[column] += a[row][k] * b[k][column];
        memcpy(product + row * 8, sum, sizeof sum);
    }
}

// Dynamic shared memory ends at an inaccessible page; a margin in front of it must not change.
static void allocate_shared() {
    if (!shared_end) {
        size_t page = sysconf(_SC_PAGESIZE);
        size_t size = (MAX_SHARED_BYTES + MARGIN_BYTES + page) / page * page;
        void* p = mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                       -1, 0);
        shared_end = (unsigned char*)p + size;
        mprotect(shared_end, page, PROT_NONE);
    }
    dynamic_shared = shared_end - (shared_bytes + 15) / 16 * 16;
}

bool is_shared(const void* p) {
    const unsigned char* q = (const unsigned char*)p;
    return (q >= dynamic_shared && q < shared_end) ||
           (q >= __start_static_shared && q < __stop_static_shared);
}

static void check_margins() {
    for (unsigned char* p = dynamic_shared - MARGIN_BYTES; p < shared_end; p++) {
        if (p == dynamic_shared) p += shared_bytes;
        if (p < shared_end && *p != GARBAGE)
            fail({}, "written at byte %td of the %zu of dynamic shared memory", p - dynamic_shared,
                 shared_bytes);
    }
}

static void run_block() {
    n_blocks++;
    memset(dynamic_shared - MARGIN_BYTES, GARBAGE, shared_end - dynamic_shared + MARGIN_BYTES);
    if (__start_static_shared)
        memset(__start_static_shared, GARBAGE, __stop_static_shared - __start_static_shared);
    n_ended = n_at_barrier = ready_warps = 0;
    for (Warp& warp : warps) warp.ready = warp.arrived = 0;
    for (unsigned i = 0; i < n_threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        fiber.lane = i % LANES;
        fiber.warp = &warps[i / LANES];
        fiber.copies = copies[i];
        fiber.n_copies = fiber.n_groups = 0;
    }
    make_all_ready();
    current = nullptr;
    yield_fiber();
}

static void check_launch(const unsigned* grid, const unsigned* block) {
    unsigned long long threads = 1ull * block[0] * block[1] * block[2];
    if (threads == 0 || threads > MAX_THREADS || block[2] > 64)
        fail({}, "a block of (%u, %u, %u) threads", block[0], block[1], block[2]);
    if (threads > kernel->max_threads)
        fail({}, "%llu threads exceed the launch bounds of %u", threads, kernel->max_threads);
    if (!grid[0] || !grid[1] || !grid[2] || grid[0] > INT32_MAX || grid[1] > UINT16_MAX ||
        grid[2] > UINT16_MAX)
        fail({}, "a grid of (%u, %u, %u) blocks", grid[0], grid[1], grid[2]);
    if (shared_bytes > MAX_SHARED_BYTES)
        fail({}, "%zu bytes of dynamic shared memory", shared_bytes);
}

static void on_signal(int number, siginfo_t* info, void*) {
    const unsigned char* where = (const unsigned char*)info->si_addr;
    if (number == SIGFPE) fail({}, "a division by zero");
    if (where >= shared_end && where < shared_end + MAX_SHARED_BYTES)
        fail({}, "byte %td of the %zu of dynamic shared memory", where - dynamic_shared,
             shared_bytes);
    fail({}, "no array is at address %#zx", (size_t)where);
}

// In its scope, a signal of the processor is a fault of the kernel.
struct Signals {
    static constexpr int NUMBERS[] = {SIGSEGV, SIGBUS, SIGFPE};
    struct sigaction before[3];
    Signals() {
        struct sigaction ours = {};
        ours.sa_sigaction = on_signal;
        ours.sa_flags = SA_SIGINFO | SA_NODEFER;
        for (int i = 0; i < 3; i++) sigaction(NUMBERS[i], &ours, &before[i]);
    }
    ~Signals() {
        for (int i = 0; i < 3; i++) sigaction(NUMBERS[i], &before[i], nullptr);
    }
};

// Run the blocks one after the other; return false after a fault, which `message` describes.
[[gnu::noinline]] static bool run_blocks(const unsigned* grid, const unsigned* block) {
    if (__builtin_setjmp(launch_context)) {
        if (outcome == FAILED) return false;
        check_margins();
        if (++blockIdx.x == grid[0]) blockIdx = {0, blockIdx.y + 1, blockIdx.z};
        if (blockIdx.y == grid[1]) blockIdx = {0, 0, blockIdx.z + 1};
        if (blockIdx.z == grid[2]) return true;
    } else {
        check_launch(grid, block);
        allocate_shared();
    }
    run_block();
    __builtin_unreachable();
}

const char* run(const Kernel& launched, const unsigned* grid, const unsigned* block, size_t n_bytes,
                void** values, unsigned seed) {
    n_launches++;
    kernel = &launched;
    arguments = values;
    shared_bytes = n_bytes;
    current = nullptr;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    blockIdx = {0, 0, 0};
    n_threads = block[0] * block[1] * block[2];
    random_state = seed * 2654435761u | 1;
    Signals signals;
    return run_blocks(grid, block) ? nullptr : message;
}

// The handlers that -fsanitize calls; the first argument contains the place in the source.
struct Place { const char* file; unsigned line, column; };
struct TypeMismatch { Place place; const void* type; unsigned char log_alignment; };

extern "C" {
void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, size_t address) {
    fail({data->place.file, (int)data->place.line}, "%#zx is no multiple of %d", address,
         1 << data->log_alignment);
}
void __ubsan_handle_out_of_bounds(Place* place, size_t index) {
    fail({place->file, (int)place->line}, "index %td is out of bounds", index);
}
void __ubsan_handle_shift_out_of_bounds(Place* place, size_t, size_t by) {
    fail({place->file, (int)place->line}, "a shift by %td, or of a negative number", by);
}
void __ubsan_handle_divrem_overflow(Place* place, size_t, size_t by) {
    fail({place->file, (int)place->line}, "a division by %td", by);
}
}

}  // namespace emulator
