// The race detector: it checks that each access to memory is ordered after earlier ones by the
// rules of CUDA, independent of the order in which the fibers happen to run.
#pragma once
#include <initializer_list>
#include "fibers.h"

#pragma GCC visibility push(hidden)

namespace races {

enum Kind { READ, WRITE, ATOMIC };

using Pointers = std::initializer_list<const void*>;

// Each thread calls these: at the start of a kernel, after a barrier of its block or warp, and
// after grid_dependency_sync. `kernel_waits`: the kernel calls that. `fixed`: arguments whose
// memory no kernel writes.
void begin(bool kernel_waits, Pointers fixed, Pointers others);
void pass_block_barrier();
void pass_warp_barrier();
void pass_wait();

// Check an access; report a fault if it races with an earlier one.
void check_shared_access(
    unsigned address, unsigned n_bytes, Kind kind, const void* p, emulator::Site site
);
void check_global_access(const void* p, unsigned n_bytes, Kind kind, emulator::Site site);

}  // namespace races

#pragma GCC visibility pop
