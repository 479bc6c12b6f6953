// What follows from a layer's indices: whether they may be followed, and the strips that its outputs are cut into.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace blockprune {

// Copies of a layer's indices: what was checked is what is read, whoever writes into the originals meanwhile.
class Indices {
public:
    // Whether they keep the format's rules; `layer` gets the copies.
    bool check(Layer& layer, int64_t block_cols);

private:
    std::vector<int32_t> values_;
};

// The strips of layers with one block width that read the same x.
class Strips {
public:
    // Whether all indices keep the format's rules.
    bool cut(const Layer* layers, int64_t count, int64_t block_cols, int32_t (*strip_rows)(int64_t rows));

    const std::vector<Strip>& longest_first() const { return strips_; }
    int64_t work() const;  // multiplications for each token
    int64_t floats(int64_t column_words) const;      // of memory that the strips want
    void place(float* memory, int64_t column_words);  // gives it to them

    // Where a layer's outputs go.
    void write_to(size_t layer, void* y, int64_t y_stride) { layers_[layer].y = y, layers_[layer].y_stride = y_stride; }

private:
    void cut(const Layer& layer, int32_t width);

    std::vector<Indices> indices_;
    std::vector<Layer> layers_;
    std::vector<Strip> strips_;
    std::vector<int32_t> unions_;  // columns of strips of several block rows
    int64_t block_cols_ = 0;
};

}  // namespace blockprune
