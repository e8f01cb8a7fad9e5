// Functions that Python calls: list the kernels of a library, launch one of them.
// KERNELS has to be defined before, as a KERNEL(name, launch bounds) for each kernel.
#include <cstdio>
#include <type_traits>
#include <utility>

#include "launch.h"

namespace emulator {

// NumPy's names of the types of parameters.
template <class T> struct Name;
template <> struct Name<void> { static constexpr const char* is = "void"; };
template <> struct Name<bool> { static constexpr const char* is = "bool"; };
template <> struct Name<float> { static constexpr const char* is = "float32"; };
template <> struct Name<double> { static constexpr const char* is = "float64"; };
template <> struct Name<half_t> { static constexpr const char* is = "float16"; };
template <> struct Name<bf16_t> { static constexpr const char* is = "bfloat16"; };
template <> struct Name<unsigned char> { static constexpr const char* is = "uint8"; };
template <> struct Name<int> { static constexpr const char* is = "int32"; };
template <> struct Name<unsigned> { static constexpr const char* is = "uint32"; };
template <> struct Name<long long> { static constexpr const char* is = "int64"; };
template <> struct Name<unsigned long long> { static constexpr const char* is = "uint64"; };

static char kernel_list[1 << 15];
static size_t length;

static void put(const char* text) {
    length += snprintf(kernel_list + length, sizeof kernel_list - length, "%s", text);
}

// "*" is in front of a pointer's type, "!*" in front of a pointer to const.
template <class T> void put_type() {
    if constexpr (std::is_pointer_v<T>) {
        using To = std::remove_pointer_t<T>;
        put(std::is_const_v<To> ? "!*" : "*");
        put_type<std::remove_const_t<To>>();
    } else {
        put(Name<T>::is);
    }
}

template <auto KERNEL> struct Caller;
template <class... T, void (*KERNEL)(T...)> struct Caller<KERNEL> {
    static void put_types() { ((put(" "), put_type<T>()), ...); }
    static void call(void** arguments) { call(arguments, std::index_sequence_for<T...>()); }
    template <size_t... I> static void call(void** arguments, std::index_sequence<I...>) {
        KERNEL(*(T*)arguments[I]...);
    }
};

constexpr unsigned first_of(unsigned n = MAX_THREADS, unsigned = 0) { return n; }
#define KERNEL(name, ...) \
    {#name, Caller<&name>::call, first_of(__VA_ARGS__), Caller<&name>::put_types},
static const Kernel table[] = {KERNELS};

}  // namespace emulator

#pragma GCC visibility push(default)

// One line for each kernel: its name and the types of its parameters.
extern "C" const char* describe_kernels() {
    using namespace emulator;
    length = 0;
    for (const Kernel& kernel : table) {
        put(kernel.name);
        kernel.put_types();
        put("\n");
    }
    return kernel_list;
}

extern "C" unsigned long long count_waits() { return emulator::n_waits; }

extern "C" const char* launch(int number, const unsigned* grid, const unsigned* block,
                              size_t shared_bytes, void** arguments, unsigned seed) {
    return emulator::run(emulator::table[number], grid, block, shared_bytes, arguments, seed);
}

#pragma GCC visibility pop
