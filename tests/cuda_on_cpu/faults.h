// What the processor and the compiler's checks report, as faults of the kernel.
#pragma once
#include "fibers.h"

namespace emulator {

static void on_signal(int number, siginfo_t* info, void*) {
    const unsigned char* where = (const unsigned char*)info->si_addr;
    if (number == SIGFPE) fail({}, "a division by zero");
    if (where >= shared_end && where < shared_end + MAX_SHARED)
        fail({}, "byte %td of the %zu of dynamic shared memory", where - dynamic_shared,
             shared_bytes);
    fail({}, "no array is at address %#zx", (size_t)where);
}

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

// What -fsanitize calls, each with a place in the source first.
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
