// Memory that a thread keeps for its next call: fresh memory costs page faults that small layers would notice.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace blockprune {

constexpr int64_t WORKSPACE_BYTES = 3 << 20;  // of panels
constexpr size_t HUGE_PAGE = 2 << 20;

struct Free {
    void operator()(float* p) const { std::free(p); }
};

// Room for so many numbers, of the calling thread; null where there is no memory.
inline float* workspace(int64_t floats) {
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

}  // namespace blockprune
