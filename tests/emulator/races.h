// Whether accesses to memory are in order, whatever order the threads run in.
#pragma once
#include <initializer_list>
#include "fibers.h"

#pragma GCC visibility push(hidden)

namespace races {

enum Kind { READ, WRITE, ATOMIC };

using Pointers = std::initializer_list<const void*>;

// Called by each thread: at the start of a kernel, which waits for the kernel ahead or does not,
// with its arguments; past a barrier of its block, of its warp, and that wait. `fixed` is what no
// kernel writes.
void begin(bool kernel_waits, Pointers fixed, Pointers others);
void pass_block_barrier();
void pass_warp_barrier();
void pass_wait();

// An access to memory; a fault, if it is not in order with those before.
void note_shared(unsigned address, unsigned n_bytes, Kind kind, const void* p, emulator::Site site);
void note_global(const void* p, unsigned n_bytes, Kind kind, emulator::Site site);

}  // namespace races

#pragma GCC visibility pop
