// The C ABI: chooses the instruction set, shares out a product over the threads of the OpenMP runtime that torch runs.

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "kernels.h"

namespace blockprune {
namespace {

constexpr int64_t GROUP_BYTES = 512 << 10;  // of panels that stay in a core's cache while all strips pass by
constexpr int64_t WORKSPACE_BYTES = 3 << 20;
constexpr size_t HUGE_PAGE = 2 << 20;
constexpr int64_t ITEMS_A_THREAD = 8;  // enough for the threads to end at about the same time

// libgomp's entry points, which LLVM's runtime has as well. They are looked up at run time, so that the threads are
// those that torch has started already, whatever its copy of the runtime is called.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Barrier = void (*)();

struct Threads {
    Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    Barrier barrier = reinterpret_cast<Barrier>(dlsym(RTLD_DEFAULT, "GOMP_barrier"));
    bool found() const { return parallel && barrier; }
};

const Threads& threads() {
    static const Threads found;
    return found;
}

const Isa* const all[] = {
#ifdef __x86_64__
    &isa_avx512,
    &isa_avx2,
#endif
    &isa_baseline,
};

bool runs_here(const Isa& isa) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (&isa == &isa_avx512) return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (&isa == &isa_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return true;
}

const Isa* find(const char* name) {
    for (const Isa* isa : all) {
        if (runs_here(*isa) && (!name || !std::strcmp(name, isa->name))) return isa;
    }
    return nullptr;
}

struct Free {
    void operator()(float* p) const { std::free(p); }
};

// Kept for the next call: fresh memory costs page faults that small layers would notice.
float* workspace(int64_t floats) {
    thread_local std::unique_ptr<float, Free> memory;
    thread_local int64_t size = 0;
    if (floats > size) {
        memory.reset();
        size = 0;
        const size_t bytes = (floats * sizeof(float) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        memory.reset(static_cast<float*>(std::aligned_alloc(HUGE_PAGE, bytes)));
        if (!memory) return nullptr;
        madvise(memory.get(), bytes, MADV_HUGEPAGE);  // a wish: without it panels lie about the cache by chance
        size = floats;
    }
    return memory.get();
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Layers {
    const Layer* first;
    int64_t count;

    int64_t strips(const Isa& isa, int64_t i) const {
        return divide_up(first[i].out_features, first[i].rows) * (first[i].rows / isa.strip_rows(first[i].rows));
    }
};

// Some tokens of all products: cut into panels of nearly equal size, panels into groups.
struct Chunk {
    const Isa& isa;
    const Input& input;
    const Layers layers;
    int64_t first_token, tokens, panels, groups, strips, panel_floats;
    float* memory;
    std::atomic<int64_t> next_panel{0}, next_item{0};

    int64_t start(int64_t panel) const { return first_token + tokens * panel / panels; }
    int32_t count(int64_t panel) const { return int32_t(start(panel + 1) - start(panel)); }
    float* at(int64_t panel) const { return memory + panel * panel_floats; }

    void pack() {
        for (int64_t p; (p = next_panel.fetch_add(1)) < panels;) isa.pack(input, start(p), count(p), at(p));
    }

    void multiply() {
        for (int64_t item; (item = next_item.fetch_add(1)) < groups * strips;) {
            const int64_t group = item / strips;
            int64_t strip = item % strips, i = 0;
            for (int64_t more; strip >= (more = layers.strips(isa, i)); ++i) strip -= more;
            const Layer& layer = layers.first[i];
            for (int64_t p = panels * group / groups; p < panels * (group + 1) / groups; ++p) {
                isa.multiply(layer, input.dtype, layer.strip_order[strip], start(p), count(p), at(p));
            }
        }
    }
};

void work(void* argument) {
    Chunk& chunk = *static_cast<Chunk*>(argument);
    chunk.pack();
    threads().barrier();
    chunk.multiply();
}

bool run(const Isa& isa, const Input& input, const Layers& layers, int32_t num_threads) {
    int64_t strips = 0;
    for (int64_t i = 0; i < layers.count; ++i) strips += layers.strips(isa, i);
    const int64_t panel_floats = input.padded_features * isa.panel_stride;
    const int64_t panel_bytes = std::max<int64_t>(1, panel_floats * int64_t(sizeof(float)));
    const int64_t most_panels = std::max<int64_t>(1, WORKSPACE_BYTES / panel_bytes);
    const int64_t chunks = divide_up(divide_up(input.tokens, isa.panel_tokens), most_panels);
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t first = input.tokens * c / chunks, tokens = input.tokens * (c + 1) / chunks - first;
        const int64_t panels = divide_up(tokens, isa.panel_tokens);
        const int64_t cached = divide_up(panels, std::max<int64_t>(1, GROUP_BYTES / panel_bytes));
        const int64_t shared = num_threads > 1 ? divide_up(ITEMS_A_THREAD * num_threads, std::max<int64_t>(1, strips)) : 1;
        float* memory = workspace(panels * panel_floats);
        if (!memory) return false;
        Chunk chunk{isa, input, layers, first, tokens, panels, std::min(panels, std::max(cached, shared)), strips,
                    panel_floats, memory};
        if (threads().found() && num_threads > 1) threads().parallel(work, &chunk, unsigned(num_threads), 0);
        else {
            chunk.pack();
            chunk.multiply();
        }
    }
    return true;
}

}  // namespace
}  // namespace blockprune

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Name of the best instruction set here, or of the named one; null where it is unknown or does not run here.
EXPORT const char* blockprune_cpu_isa(const char* name) {
    const blockprune::Isa* isa = blockprune::find(name);
    return isa ? isa->name : nullptr;
}

// Outputs in a strip, for blocks of so many rows.
EXPORT int32_t blockprune_cpu_strip_rows(const char* isa, int64_t rows) { return blockprune::find(isa)->strip_rows(rows); }

// Whether the OpenMP runtime was found; without it one thread does all.
EXPORT int32_t blockprune_cpu_has_threads() { return blockprune::threads().found(); }

// Products of layers with one block width that read the same x. 0, or 1 where memory ran out.
EXPORT int32_t blockprune_cpu_linear(
    const char* isa, const void* x, int64_t x_stride, int64_t tokens, int64_t in_features, int32_t dtype,
    const void* layers, int64_t num_layers, int32_t num_threads) {
    const auto* first = static_cast<const blockprune::Layer*>(layers);
    const int64_t padded = blockprune::divide_up(in_features, first->cols) * first->cols;
    const blockprune::Input input{x, x_stride, tokens, in_features, padded, dtype};
    return !blockprune::run(*blockprune::find(isa), input, {first, num_layers}, num_threads);
}
}
