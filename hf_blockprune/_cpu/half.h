// Half of a transformer's layer in one call: norm, attention and what comes after it, or norm and MLP, each added to what
// was read. See half.cpp.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace blockprune {

// LayerNorm of rows of `width` numbers.
struct Norm {
    const void *weight, *bias;  // [width]
    int64_t width;
    double epsilon;
};

// softmax(q k^T * scale + bias) v of each image and head, a token's heads side by side.
struct Attention {
    const void *q, *k, *v;  // [images, tokens, stride]
    void* y;                // the same
    int64_t images, tokens, heads, head_size, stride;
    int32_t dtype;  // of y
    bool halves;    // whether q, k and v are BFLOAT16 whatever `dtype` is
    float scale;
    const float* bias;  // [images, tokens] or null
};

// y = x + output_scale * second(f(first(norm(x)))), with f the attention where there are heads. Every field is 8 bytes wide.
struct Half {
    const void* x;  // [images, tokens, width]
    void* y;        // the same
    void* read;     // norm(x), where somebody wants it, or null
    int64_t images, tokens, width, dtype, weights;
    Norm norm;
    const Layer* layers;    // of first: q, k and v, or fc1; then second; with no y
    int64_t num_layers;
    int64_t heads, head_size;
    double scale;
    const float* bias;
};

struct HalfKernels {
    bool multiplies_pairs;  // of bfloat16, faster than floats
    void (*normalise)(const Norm&, int32_t dtype, const void* x, int64_t rows, void* y);
    int64_t (*attention_floats)(const Attention&);  // of memory that `attend` wants
    // Of some of the queries of a head of an image.
    void (*attend)(const Attention&, int64_t image, int64_t head, int64_t begin, int64_t end, float* memory);
};

int32_t run_half(const Isa& isa, const Half& half, int32_t num_threads);  // a Status

}  // namespace blockprune
