// The threads of the OpenMP runtime that torch runs.
#pragma once

#include <dlfcn.h>

namespace blockprune {

// libgomp's entry points, which LLVM's runtime has as well. They are looked up at run time, so that the threads are
// those that torch has started already, whatever its copy of the runtime is called.
struct Threads {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) =
        reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    void (*barrier)() = reinterpret_cast<void (*)()>(dlsym(RTLD_DEFAULT, "GOMP_barrier"));

    bool found() const { return parallel && barrier; }
};

inline const Threads& threads() {
    static const Threads found;
    return found;
}

}  // namespace blockprune
