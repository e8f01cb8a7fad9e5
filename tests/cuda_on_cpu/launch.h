// What the tests call: a list of a module's kernels, and a launch of one of them.
// Before it: KERNELS, a KERNEL(name, launch bounds) for each.
#include <utility>
#include "faults.h"

#define EXPORTED __attribute__((visibility("default")))

namespace emulator {

// NumPy's names of the parameters' types.
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

static char list[1 << 15];
static size_t length;

static void put(const char* text) {
    length += snprintf(list + length, sizeof list - length, "%s", text);
}

// A pointer has * in front, and !* if it is to what is only read.
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

struct Row {
    const char* name;
    void (*call)(void**);
    void (*put_types)();
    unsigned max_threads;
};

constexpr unsigned first_of(unsigned n = MAX_THREADS, unsigned = 0) { return n; }
#define KERNEL(name, ...) \
    {#name, Caller<&name>::call, Caller<&name>::put_types, first_of(__VA_ARGS__)},
static const Row table[] = {KERNELS};

static void check_launch(const Row& row, const unsigned* grid, const unsigned* block) {
    unsigned long long threads = 1ull * block[0] * block[1] * block[2];
    if (threads == 0 || threads > MAX_THREADS || block[2] > 64)
        fail({}, "a block of (%u, %u, %u) threads", block[0], block[1], block[2]);
    if (threads > row.max_threads)
        fail({}, "%llu threads, its launch bounds are %u", threads, row.max_threads);
    if (!grid[0] || !grid[1] || !grid[2] || grid[0] > INT32_MAX || grid[1] > UINT16_MAX ||
        grid[2] > UINT16_MAX)
        fail({}, "a grid of (%u, %u, %u) blocks", grid[0], grid[1], grid[2]);
    if (shared_bytes > MAX_SHARED) fail({}, "%zu bytes of dynamic shared memory", shared_bytes);
}

}  // namespace emulator

// One line for each kernel: its name and its parameters' types.
extern "C" EXPORTED const char* describe_kernels() {
    using namespace emulator;
    length = 0;
    for (const Row& row : table) {
        put(row.name);
        row.put_types();
        put("\n");
    }
    return list;
}

// Null if all went well, else what did not.
extern "C" EXPORTED const char* launch(int number, const unsigned* grid, const unsigned* block,
                                       size_t shared_bytes, void** arguments, unsigned seed) {
    using namespace emulator;
    const Row& row = table[number];
    kernel = row.name;
    body = row.call;
    emulator::arguments = arguments;
    emulator::shared_bytes = shared_bytes;
    current = nullptr;
    blockIdx = {0, 0, 0};
    if (_setjmp(home)) return message;
    check_launch(row, grid, block);
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    n_threads = block[0] * block[1] * block[2];
    random_state = seed * 2654435761u | 1;
    make_shared();
    make_fibers();
    Signals signals;
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                if (!run_block()) return message;
            }
    return nullptr;
}
