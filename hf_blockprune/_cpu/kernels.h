// What the driver and the tile kernels of every instruction set share. No torch headers: a plain C ABI serves every
// version of torch.
#pragma once

#include <cstdint>

namespace blockprune {

enum DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };
enum Activation : int64_t { NONE = 0, GELU = 1, GELU_TANH = 2 };

// What layers that read the same tensor have in common. Strides are in elements; x, weights, biases and outputs have
// one dtype.
struct Input {
    const void* x;  // [tokens, in_features], features contiguous
    int64_t stride, tokens, in_features;
    int64_t padded_features;  // whole block columns
    int32_t dtype;
};

// One product y = activation(x W^T + bias). Every field is 8 bytes wide, so that callers can fill an array of numbers.
struct Layer {
    const void* weight;           // [nnz_blocks, cols, rows] contiguous: each block feature-major
    const int32_t* crow_indices;  // [block_rows + 1]
    const int32_t* col_indices;   // [nnz_blocks]
    const int32_t* strip_order;   // every strip's number once, longest first
    const void* bias;             // [out_features] or null
    void* y;                      // [tokens, out_features], features contiguous
    int64_t y_stride, out_features;
    int64_t rows, cols;  // of a block; rows is a multiple of 16
    int64_t activation;
};

// A panel holds a few tokens feature-major, `panel_stride` floats a feature, all block columns with zeros at the end.
// A strip is `strip_rows(rows)` neighbouring outputs of one block row.
struct Isa {
    const char* name;
    int32_t panel_tokens;  // at most
    int32_t panel_stride;  // floats
    int32_t (*strip_rows)(int64_t rows);
    void (*pack)(const Input&, int64_t first_token, int32_t tokens, float* panel);
    void (*multiply)(const Layer&, int32_t dtype, int64_t strip, int64_t first_token, int32_t tokens, const float* panel);
};

extern const Isa isa_baseline;
#ifdef __x86_64__
extern const Isa isa_avx2;
extern const Isa isa_avx512;
#endif

}  // namespace blockprune
