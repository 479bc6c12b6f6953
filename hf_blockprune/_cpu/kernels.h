// What the driver and the tile kernels of every instruction set share. No torch headers: a plain C ABI serves every
// version of torch.
#pragma once

#include <cstdint>

namespace blockprune {

// Of internal linkage, so that each instruction set keeps its own.
static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };
enum Activation : int64_t { NONE = 0, GELU = 1, GELU_TANH = 2 };
enum Status : int32_t { DONE = 0, NO_MEMORY = 1, BAD_INDICES = 2 };

// What layers that read the same tensor have in common. Strides are in elements; x, biases and outputs have one dtype.
struct Input {
    const void* x;  // [tokens, in_features], features contiguous
    int64_t stride, tokens, in_features;
    int64_t cols;  // of a block
    int64_t block_cols;
    int32_t dtype, weights;    // dtypes, those of weights either the same or INT8
    int64_t column_words = 0;  // see `Isa`
    bool halves = false;       // whether y is BFLOAT16 whatever `dtype` is; for weights in INT8 alone

    int64_t padded_features() const { return block_cols * cols; }
};

// One product y = activation(x W^T + bias) * output_scale + residual. Every field is 8 bytes wide, so that callers can fill
// an array of numbers.
struct Layer {
    const void* weight;           // [nnz_blocks, rows, cols] contiguous
    const int32_t* crow_indices;  // [block_rows + 1]
    const int32_t* col_indices;   // [nnz_blocks]
    const void* bias;             // [out_features] or null
    void* y;                      // [tokens, out_features], features contiguous
    int64_t y_stride, out_features;
    int64_t nnz_blocks, rows, cols;  // of a block
    int64_t activation;
    const float* weight_scale;  // [out_features] of weights in INT8
    const void* output_scale;   // [out_features] or null
    const void* residual;       // as y, or null

    int64_t block_rows() const { return divide_up(out_features, rows); }
};

// `strip_rows(rows)` neighbouring outputs of a layer, with the block columns that any of their block rows keeps.
struct Strip {
    const Layer* layer;      // its indices are checked
    int64_t output;          // the first one
    int32_t width, valid;    // outputs, and those that lie inside the matrix
    const int32_t* columns;  // increasing
    int64_t count;           // of columns
    int32_t* positions;      // [block columns], room for where each of `columns` stands; null for strips of one block row
    float* weights;          // [count * column_words, width], zeros where a row does not keep a column; then [width] more

    int64_t work() const { return count * layer->cols * width; }  // multiplications for each token
};

struct MergeKernels;  // merge.h
struct HalfKernels;   // half.h

// A panel holds a few tokens, `panel_stride` words of 32 bits for each word of a token, all block columns filled up to
// whole words with zeros; then `panel_stride` more.
struct Isa {
    const char* name;
    int32_t panel_tokens;  // at most
    int32_t panel_stride;
    int32_t (*strip_rows)(int64_t rows);
    int64_t (*column_words)(const Input&);  // that a block column has, of one token or of one output
    void (*pack_inputs)(const Input&, int64_t first_token, int32_t tokens, float* panel);
    void (*pack_weights)(const Input&, const Strip&);
    void (*multiply)(const Input&, const Strip&, int64_t first_token, int32_t tokens, const float* panel);
    const MergeKernels* merging;
    const HalfKernels* halves;
};

extern const Isa isa_baseline;
#ifdef __x86_64__
extern const Isa isa_avx2;
extern const Isa isa_avx512;
// Null where the compiler does not know their instructions.
extern const Isa isa_avxvnni __attribute__((weak));
extern const Isa isa_avx512vnni __attribute__((weak));
extern const Isa isa_avx512bf16 __attribute__((weak));
#endif

}  // namespace blockprune
