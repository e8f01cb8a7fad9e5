// Launch of a kernel.
#pragma once
#include "fibers.h"

#pragma GCC visibility push(hidden)

namespace emulator {

struct Kernel {
    const char* name;
    void (*call)(void** arguments);
    unsigned max_threads;
    void (*put_types)();
};

// Run a kernel; return null, or the description of a fault.
const char* run(const Kernel& kernel, const unsigned* grid, const unsigned* block,
                size_t shared_bytes, void** arguments, unsigned seed);

}  // namespace emulator

#pragma GCC visibility pop
