// Two accesses to a byte, at least one of which writes (and not both atomic), are a race unless one
// comes before the other: both of one thread; a barrier of the block between them; one of the warp
// between two lanes; of two blocks, an atomic operation of the first after its access, and one of
// the second before its own. And a kernel that may begin early touches nothing that others write
// before it has waited for the kernel ahead.
#include <map>
#include <unordered_map>
#include <vector>

#include "races.h"

namespace races {

struct Thread { unsigned block_epoch, warp_epoch; bool has_waited; };
static Thread threads[emulator::MAX_THREADS];
static bool waits;  // whether the kernel waits at all
static std::map<const void*, bool> is_fixed;  // of its arguments

// Of the blocks of this launch: how many atomic operations they have done on global memory.
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
    Access write, read;  // the latest ones; block 0: none
    Readers readers;     // whose reads, besides the latest, no barrier has been after
};

static unsigned number_of_thread() {
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
    threads[number_of_thread()] = {0, 0, false};
}

void pass_block_barrier() {
    Thread& thread = threads[number_of_thread()];
    thread.block_epoch++;
    thread.warp_epoch++;
}
void pass_warp_barrier() { threads[number_of_thread()].warp_epoch++; }
void pass_wait() { threads[number_of_thread()].has_waited = true; }

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

[[noreturn]] static void tell(const Access& a, const Access& b, const void* p, emulator::Site site) {
    static const char* const does[] = {"reads", "writes", "changes"};
    emulator::fail(site, "a race: it %s %p, which thread %d of block %d %s at line %d",
                   does[b.kind], p, a.thread, (int)(a.block - first_block), does[a.kind], a.line);
}

static void note(Cell& cell, const Access& mine, const void* p, emulator::Site site) {
    if (cell.launch != launch) cell = {launch, {}, {}, ONE_WARP};
    const bool both_atomic = cell.write.kind == ATOMIC && mine.kind == ATOMIC;
    if (!both_atomic && !in_order(cell.write, mine)) tell(cell.write, mine, p, site);
    const bool after_reads = reads_in_order(cell, mine);
    if (mine.kind > READ) {
        if (!after_reads) tell(cell.read, mine, p, site);
        cell.write = mine;
        return;
    }
    if (after_reads) cell.readers = ONE_WARP;
    else if (cell.read.block != mine.block) cell.readers = BLOCKS;
    else if (cell.readers == ONE_WARP && cell.read.thread / 32 != mine.thread / 32)
        cell.readers = WARPS;
    cell.read = mine;
}

// What Python is told, if it has made room for it: each access, in the order of the emulator.
struct Traced {
    unsigned long long address;
    unsigned block, thread, line, n_bytes, is_shared, kind;
};
static_assert(sizeof(Traced) == 32);
extern "C" __attribute__((visibility("default"))) Traced* trace_room;
extern "C" __attribute__((visibility("default"))) size_t trace_size, n_traced;
Traced* trace_room;
size_t trace_size, n_traced;

static void trace(const Access& mine, unsigned long long address, unsigned n_bytes, bool shared) {
    if (n_traced < trace_size)
        trace_room[n_traced] = {address, mine.block - first_block, (unsigned)mine.thread,
                                (unsigned)mine.line, n_bytes, shared, mine.kind};
    n_traced++;
}

static Access access(Kind kind, emulator::Site site) {
    const unsigned number = number_of_thread();
    const Thread& thread = threads[number];
    return {emulator::n_blocks, thread.block_epoch, thread.warp_epoch,
            n_atomics.back(), (short)number, kind, site.line};
}

// Shared memory, by its address there; of every block its own.
void note_shared(unsigned address, unsigned n_bytes, Kind kind, const void* p,
                 emulator::Site site) {
    static std::unordered_map<unsigned, Cell> cells;
    const Access mine = access(kind, site);
    if (trace_room) trace(mine, address, n_bytes, true);
    for (unsigned i = 0; i < n_bytes; i++) {
        Cell& cell = cells[address + i];
        if (cell.write.block != mine.block && cell.read.block != mine.block) cell.launch = 0;
        note(cell, mine, p, site);
    }
}

// Whether an address lies in an array that no kernel writes: behind the argument before it.
static bool is_in_fixed(const void* p) {
    auto after = is_fixed.upper_bound(p);
    return after != is_fixed.begin() && std::prev(after)->second;
}

// Global memory, in pages.
void note_global(const void* p, unsigned n_bytes, Kind kind, emulator::Site site) {
    constexpr unsigned PAGE = 4096;
    static std::unordered_map<unsigned long long, Cell*> pages;
    const bool early = waits && !threads[number_of_thread()].has_waited;
    if (early && (kind != READ || !is_in_fixed(p)))
        emulator::fail(site, "%p is touched before the wait for the kernel ahead", p);
    const Access mine = access(kind, site);
    if (kind == ATOMIC) n_atomics.back()++;
    const auto address = (unsigned long long)p;
    if (trace_room) trace(mine, address, n_bytes, false);
    Cell*& page = pages[address / PAGE];
    if (!page) page = new Cell[PAGE]();
    for (unsigned i = 0; i < n_bytes; i++)
        note(page[address % PAGE + i], mine, p, site);
}

}  // namespace races
