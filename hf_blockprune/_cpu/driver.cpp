// The C ABI: chooses the instruction set, shares out a product over the threads of the OpenMP runtime that torch runs.

#ifdef __x86_64__
#include <cpuid.h>
#endif
#include <algorithm>
#include <cstring>
#include <new>

#include "half.h"
#include "kernels.h"
#include "merge.h"
#include "product.h"
#include "strips.h"
#include "threads.h"
#include "unpack.h"
#include "workspace.h"

namespace blockprune {
namespace {

const Isa* const all[] = {
#ifdef __x86_64__
    &isa_avx512bf16,
    &isa_avx512vnni,
    &isa_avx512,
    &isa_avxvnni,
    &isa_avx2,
#endif
    &isa_baseline,
};

#ifdef __x86_64__
bool has_avxvnni() {  // compilers that know the instructions may not know to ask for them
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1 << 4);
}
#endif

bool runs_here(const Isa& isa) {
#ifdef __x86_64__
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (&isa == &isa_avx512bf16) return vnni && __builtin_cpu_supports("avx512bf16");
    if (&isa == &isa_avx512vnni) return vnni;
    if (&isa == &isa_avx512) return avx512;
    if (&isa == &isa_avxvnni) return avx2 && has_avxvnni();
    if (&isa == &isa_avx2) return avx2;
#endif
    return true;
}

const Isa* find(const char* name) {
    for (const Isa* isa : all) {
        if (isa && runs_here(*isa) && (!name || !std::strcmp(name, isa->name))) return isa;
    }
    return nullptr;
}

// Some of a product's tokens, packed and multiplied by several threads.
struct Chunk {
    Product product;
    bool packs_weights;  // the first tokens' turn; later ones find them packed

    void pack() {
        if (packs_weights) product.pack_weights();
        product.pack_inputs();
    }
};

void work(void* argument) {
    Chunk& chunk = *static_cast<Chunk*>(argument);
    chunk.pack();
    threads().barrier();
    chunk.product.multiply();
}

Status run(const Isa& isa, const Input& input, Strips& cut, int32_t num_threads) {
    const std::vector<Strip>& strips = cut.longest_first();
    const int64_t panel_bytes = Product::panel_floats(isa, input) * int64_t(sizeof(float));
    const int64_t most_panels = std::max<int64_t>(1, WORKSPACE_BYTES / panel_bytes);
    const int64_t chunks = divide_up(divide_up(input.tokens, isa.panel_tokens), most_panels);
    if (!chunks) return DONE;
    const int64_t floats = Product::floats(isa, input, divide_up(input.tokens, chunks));
    float* memory = workspace(floats + cut.floats(input.column_words));
    if (!memory) return NO_MEMORY;
    cut.place(memory + floats, input.column_words);
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t first = input.tokens * c / chunks, tokens = input.tokens * (c + 1) / chunks - first;
        Chunk chunk;
        chunk.packs_weights = c == 0;
        chunk.product.begin(isa, input, strips, first, first, tokens, memory, num_threads);
        if (threads().found() && num_threads > 1) threads().parallel(work, &chunk, unsigned(num_threads), 0);
        else {
            chunk.pack();
            chunk.product.multiply();
        }
    }
    return DONE;
}

int64_t block_columns(int64_t in_features, const Layer& layer) { return divide_up(in_features, layer.cols); }

}  // namespace
}  // namespace blockprune

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Name of the best instruction set here, or of the named one; null where it is unknown or does not run here.
EXPORT const char* blockprune_cpu_isa(const char* name) {
    const blockprune::Isa* isa = blockprune::find(name);
    return isa ? isa->name : nullptr;
}

// Whether the OpenMP runtime was found; without it one thread does all.
EXPORT int32_t blockprune_cpu_has_threads() { return blockprune::threads().found(); }

// Multiplications for each token that a layer takes, padding included; -1 where its indices break the format's rules
// or memory ran out.
EXPORT int64_t blockprune_cpu_work(const char* isa, int64_t in_features, const void* layer) try {
    const auto* one = static_cast<const blockprune::Layer*>(layer);
    blockprune::Strips strips;
    const int64_t block_cols = blockprune::block_columns(in_features, *one);
    return strips.cut(one, 1, block_cols, blockprune::find(isa)->strip_rows) ? strips.work() : -1;
} catch (const std::bad_alloc&) {
    return -1;
}

// Products of layers with one block width that read the same x; a Status.
EXPORT int32_t blockprune_cpu_linear(
    const char* isa, const void* x, int64_t x_stride, int64_t tokens, int64_t in_features, int32_t dtype, int32_t weights,
    const void* layers, int64_t num_layers, int32_t num_threads) try {
    thread_local blockprune::Strips strips;
    const auto* first = static_cast<const blockprune::Layer*>(layers);
    const auto* best = blockprune::find(isa);
    const int64_t block_cols = blockprune::block_columns(in_features, *first);
    blockprune::Input input{x, x_stride, tokens, in_features, first->cols, block_cols, dtype, weights};
    input.column_words = best->column_words(input);
    if (!strips.cut(first, num_layers, block_cols, best->strip_rows)) return blockprune::BAD_INDICES;
    return blockprune::run(*best, input, strips, num_threads);
} catch (const std::bad_alloc&) {
    return blockprune::NO_MEMORY;
}

// A layer's matrix [out_features, in_features], elements of 2, 4 or 8 bytes, into its y; a Status.
EXPORT int32_t blockprune_cpu_unpack(int64_t in_features, int64_t element, const void* layer, int32_t num_threads) try {
    thread_local blockprune::Indices indices;
    blockprune::Layer checked = *static_cast<const blockprune::Layer*>(layer);
    if (!indices.check(checked, blockprune::block_columns(in_features, checked))) return blockprune::BAD_INDICES;
    blockprune::unpack(checked, in_features, element, num_threads);
    return blockprune::DONE;
} catch (const std::bad_alloc&) {
    return blockprune::NO_MEMORY;
}

// Lets patches of some images go into others, from a merge.h Merge; a Status, of places as of indices.
EXPORT int32_t blockprune_cpu_merge(const char* isa, const void* merge, int32_t num_threads) try {
    return blockprune::merge(*blockprune::find(isa)->merging, *static_cast<const blockprune::Merge*>(merge), num_threads);
} catch (const std::bad_alloc&) {
    return blockprune::NO_MEMORY;
}

// Half of a layer, from a half.h Half; a Status.
EXPORT int32_t blockprune_cpu_half(const char* isa, const void* half, int32_t num_threads) try {
    return blockprune::run_half(*blockprune::find(isa), *static_cast<const blockprune::Half*>(half), num_threads);
} catch (const std::bad_alloc&) {
    return blockprune::NO_MEMORY;
}
}
