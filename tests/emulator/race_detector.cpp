// Two accesses to a byte, at least one of them a write and not both atomic, are a race unless they
// are ordered. Accesses are ordered if
// - one thread makes both;
// - a barrier of the block is between them;
// - they are of one warp, and a barrier of the warp is between them;
// - they are of two blocks, the first block executes an atomic operation on global memory after its
//   access, and the second block executes one before its access.
// Under programmatic dependent launch, a kernel must call grid_dependency_sync before it accesses
// memory that other kernels write.
#include <map>
#include <unordered_map>
#include <vector>

#include "race_detector.h"

namespace races {

struct Thread { unsigned block_epoch, warp_epoch; bool has_waited; };
static Thread threads[emulator::MAX_THREADS];
static bool waits;  // true if the kernel calls grid_dependency_sync
static std::map<const void*, bool> is_fixed;  // by the address of an argument

// By block of this launch: the number of its atomic operations on global memory so far.
static std::vector<unsigned> n_atomics;
static unsigned launch, first_block;

struct Access {
    unsigned block, block_epoch, warp_epoch, n_atomics;
    short thread;
    Kind kind;
    int line;
};
enum Readers : char { ONE_WARP, WARPS, BLOCKS };
struct Cell {
    unsigned launch;
    Access write, read;  // the latest ones; none if block is 0
    Readers readers;     // the threads with reads that no barrier has followed
};

static unsigned thread_number() {
    return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

void begin(bool kernel_waits, Pointers fixed, Pointers others) {
    if (launch != emulator::n_launches) {
        is_fixed.clear();
        for (const void* p : fixed) is_fixed[p] = true;
        for (const void* p : others) is_fixed[p] = false;
        launch = emulator::n_launches;
        first_block = emulator::n_blocks;
        n_atomics.clear();
    }
    n_atomics.resize(emulator::n_blocks - first_block + 1);
    waits = kernel_waits;
    threads[thread_number()] = {0, 0, false};
}

void pass_block_barrier() {
    Thread& thread = threads[thread_number()];
    thread.block_epoch++;
    thread.warp_epoch++;
}
void pass_warp_barrier() { threads[thread_number()].warp_epoch++; }
void pass_wait() { threads[thread_number()].has_waited = true; }

static bool in_order(const Access& a, const Access& b) {
    if (!a.block) return true;
    if (a.block != b.block) return n_atomics[a.block - first_block] > a.n_atomics && b.n_atomics;
    if (a.thread == b.thread) return true;
    return a.thread / 32 == b.thread / 32 ? a.warp_epoch != b.warp_epoch
                                          : a.block_epoch != b.block_epoch;
}

static bool reads_in_order(const Cell& cell, const Access& mine) {
    const Access& read = cell.read;
    if (cell.readers == ONE_WARP) return in_order(read, mine);
    return cell.readers == WARPS && read.block == mine.block &&
           read.block_epoch != mine.block_epoch;
}

[[noreturn]] static void report_race(const Access& a, const Access& b, const void* p,
                                     emulator::Site site) {
    static const char* const does[] = {"reads", "writes", "changes"};
    emulator::fail(site, "a race: it %s %p, which thread %d of block %d %s at line %d",
                   does[b.kind], p, a.thread, (int)(a.block - first_block), does[a.kind], a.line);
}

static void check_access(Cell& cell, const Access& mine, const void* p, emulator::Site site) {
    if (cell.launch != launch) cell = {launch, {}, {}, ONE_WARP};
    const bool both_atomic = cell.write.kind == ATOMIC && mine.kind == ATOMIC;
    if (!both_atomic && !in_order(cell.write, mine)) report_race(cell.write, mine, p, site);
    const bool after_reads = reads_in_order(cell, mine);
    if (mine.kind > READ) {
        if (!after_reads) report_race(cell.read, mine, p, site);
        cell.write = mine;
        return;
    }
    if (after_reads) cell.readers = ONE_WARP;
    else if (cell.read.block != mine.block) cell.readers = BLOCKS;
    else if (cell.readers == ONE_WARP && cell.read.thread / 32 != mine.thread / 32)
        cell.readers = WARPS;
    cell.read = mine;
}

// The trace of accesses for access_counter.py, if it has provided a buffer.
struct Traced {
    unsigned long long address;
    unsigned block, thread, line, n_bytes, is_shared, kind;
};
static_assert(sizeof(Traced) == 32);
extern "C" __attribute__((visibility("default"))) Traced* trace_buffer;
extern "C" __attribute__((visibility("default"))) size_t trace_capacity, n_traced;
Traced* trace_buffer;
size_t trace_capacity, n_traced;

static void trace(const Access& mine, unsigned long long address, unsigned n_bytes, bool shared) {
    if (n_traced < trace_capacity)
        trace_buffer[n_traced] = {address, mine.block - first_block, (unsigned)mine.thread,
                                (unsigned)mine.line, n_bytes, shared, mine.kind};
    n_traced++;
}

static Access access(Kind kind, emulator::Site site) {
    const unsigned number = thread_number();
    const Thread& thread = threads[number];
    return {emulator::n_blocks, thread.block_epoch, thread.warp_epoch,
            n_atomics.back(), (short)number, kind, site.line};
}

// Cells by shared address; a cell of another block is reset.
void check_shared_access(unsigned address, unsigned n_bytes, Kind kind, const void* p,
                         emulator::Site site) {
    static std::unordered_map<unsigned, Cell> cells;
    const Access mine = access(kind, site);
    if (trace_buffer) trace(mine, address, n_bytes, true);
    for (unsigned i = 0; i < n_bytes; i++) {
        Cell& cell = cells[address + i];
        if (cell.write.block != mine.block && cell.read.block != mine.block) cell.launch = 0;
        check_access(cell, mine, p, site);
    }
}

// True if the address is behind an argument whose memory no kernel writes.
static bool is_in_fixed(const void* p) {
    auto after = is_fixed.upper_bound(p);
    return after != is_fixed.begin() && std::prev(after)->second;
}

// Cells by page of global memory.
void check_global_access(const void* p, unsigned n_bytes, Kind kind, emulator::Site site) {
    constexpr unsigned PAGE_BYTES = 4096;
    static std::unordered_map<unsigned long long, Cell*> pages;
    const bool before_sync = waits && !threads[thread_number()].has_waited;
    if (before_sync && (kind != READ || !is_in_fixed(p)))
        emulator::fail(site, "%p is accessed before grid_dependency_sync", p);
    const Access mine = access(kind, site);
    if (kind == ATOMIC) n_atomics.back()++;
    const auto address = (unsigned long long)p;
    if (trace_buffer) trace(mine, address, n_bytes, false);
    Cell*& page = pages[address / PAGE_BYTES];
    if (!page) page = new Cell[PAGE_BYTES]();
    for (unsigned i = 0; i < n_bytes; i++)
        check_access(page[address % PAGE_BYTES + i], mine, p, site);
}

}  // namespace races
