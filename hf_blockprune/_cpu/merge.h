// Merging of alike tokens, as hub/blockprune_merging.py says it.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace blockprune {

// The tokens of some images and where the merged ones go. Every field is 8 bytes wide, so that callers can fill an array
// of numbers; all arrays are contiguous.
struct Merge {
    const void* states;     // [images, tokens, width]
    const void* alike;      // [images, tokens, features], what is compared
    const float* sizes;     // [images, tokens]
    const int64_t* places;  // [images, all_tokens]
    void* out_states;       // [images, tokens - leave, width]
    float* out_sizes;       // [images, tokens - leave]
    int64_t* out_places;    // [images, all_tokens]
    int64_t images, tokens, width, features, all_tokens;
    int64_t prefix, leave;
    int64_t step;   // every so many-th patch stays, from the first on
    int64_t dtype;  // of states and alike

    int64_t patches() const { return tokens - prefix; }
    int64_t targets() const { return divide_up(patches(), step); }
    int64_t candidates() const { return patches() - targets(); }
    int64_t kept() const { return tokens - leave; }
    int64_t target(int64_t number) const { return prefix + number * step; }  // its token
    int64_t candidate(int64_t number) const { return prefix + number + number / (step - 1) + 1; }
};

// A token as a part of another.
struct Part {
    int64_t token;
    float share;
};

// Targets stand feature-major in panels of `panel_targets`, each [features + 1, panel_targets]; the last row are their
// lengths, inverted.
struct MergeKernels {
    int32_t panel_targets, tile_candidates;
    void (*pack_targets)(const Merge&, int64_t image, int64_t panel, float* to);
    // The target that each of up to `tile_candidates` is most alike, the first one of several, and how much.
    void (*find_nearest)(const Merge&, int64_t image, int64_t first, const float* panels, float* best, int32_t* target);
    void (*add_parts)(const Merge&, int64_t image, const Part* parts, int64_t count, int64_t row);
};

// Raises std::bad_alloc.
Status merge(const MergeKernels&, const Merge&, int32_t num_threads);

}  // namespace blockprune
