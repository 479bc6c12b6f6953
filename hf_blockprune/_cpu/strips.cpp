#include "strips.h"

#include <algorithm>
#include <cstring>

namespace blockprune {
namespace {

bool keeps_the_rules(const Layer& layer, int64_t block_cols) {
    const int32_t *crow = layer.crow_indices, *col = layer.col_indices;
    const int64_t block_rows = layer.block_rows();
    if (crow[0] != 0 || crow[block_rows] != layer.nnz_blocks || !std::is_sorted(crow, crow + block_rows + 1)) return false;
    for (int64_t r = 0; r < block_rows; ++r) {
        const int32_t begin = crow[r], end = crow[r + 1];
        if (begin == end) continue;
        bool increase = col[begin] >= 0 && col[end - 1] < block_cols;
        for (int32_t i = begin + 1; i < end; ++i) increase &= col[i - 1] < col[i];
        if (!increase) return false;
    }
    return true;
}

// A set of block columns.
class Columns {
public:
    explicit Columns(int64_t block_cols) : words_((block_cols + 63) / 64) {}

    void add(int32_t column) { words_[column / 64] |= uint64_t(1) << column % 64; }

    // Append all to a list, in order, and forget them.
    void move_to(std::vector<int32_t>& list) {
        for (size_t w = 0; w < words_.size(); ++w) {
            for (uint64_t rest = words_[w]; rest; rest &= rest - 1) list.push_back(int32_t(64 * w + __builtin_ctzll(rest)));
            words_[w] = 0;
        }
    }

private:
    std::vector<uint64_t> words_;
};

}  // namespace

bool Indices::check(Layer& layer, int64_t block_cols) {
    const size_t crow = layer.block_rows() + 1, col = layer.nnz_blocks;
    values_.resize(crow + col);
    std::memcpy(values_.data(), layer.crow_indices, crow * sizeof(int32_t));
    if (col) std::memcpy(values_.data() + crow, layer.col_indices, col * sizeof(int32_t));
    layer.crow_indices = values_.data();
    layer.col_indices = values_.data() + crow;
    return keeps_the_rules(layer, block_cols);
}

bool Strips::cut(const Layer* layers, int64_t count, int64_t block_cols, int32_t (*strip_rows)(int64_t rows)) {
    layers_.assign(layers, layers + count);
    indices_.resize(count);
    strips_.clear();
    unions_.clear();
    block_cols_ = block_cols;
    for (int64_t i = 0; i < count; ++i) {
        if (!indices_[i].check(layers_[i], block_cols)) return false;
        // Neighbouring block rows of a layer that keeps all blocks have the same columns, so that wide strips waste nothing.
        const bool whole = layers_[i].nnz_blocks == layers_[i].block_rows() * block_cols;
        cut(layers_[i], std::max(strip_rows(layers_[i].rows), whole ? strip_rows(layers_[i].out_features) : 0));
    }
    const int32_t* columns = unions_.data();  // which grows no more
    for (Strip& s : strips_) {
        if (s.columns) continue;
        s.columns = columns;
        columns += s.count;
    }
    // So that threads end together.
    std::stable_sort(strips_.begin(), strips_.end(), [](const Strip& a, const Strip& b) { return a.work() > b.work(); });
    return true;
}

void Strips::cut(const Layer& layer, int32_t width) {
    const int32_t *crow = layer.crow_indices, *col = layer.col_indices;
    const bool several = layer.rows % width != 0;  // block rows in a strip
    Columns kept(several ? block_cols_ : 0);
    for (int64_t output = 0; output < layer.out_features; output += width) {
        const int32_t valid = int32_t(std::min<int64_t>(width, layer.out_features - output));
        const int64_t row = output / layer.rows;
        Strip s{&layer, output, width, valid, several ? nullptr : col + crow[row], crow[row + 1] - crow[row], nullptr, nullptr};
        if (several) {
            const size_t before = unions_.size();
            const int64_t last = (output + valid - 1) / layer.rows;
            for (int32_t i = crow[row]; i < crow[last + 1]; ++i) kept.add(col[i]);
            kept.move_to(unions_);
            s.count = int64_t(unions_.size() - before);
        }
        strips_.push_back(s);
    }
}

int64_t Strips::work() const {
    int64_t sum = 0;
    for (const Strip& s : strips_) sum += s.work();
    return sum;
}

namespace {

int64_t floats_of(const Strip& s, int64_t column_words) { return (s.count * column_words + 1) * s.width; }

}  // namespace

int64_t Strips::floats(int64_t column_words) const {
    int64_t sum = 0;
    for (const Strip& s : strips_) sum += floats_of(s, column_words) + (s.layer->rows % s.width ? block_cols_ : 0);
    return sum;
}

void Strips::place(float* memory, int64_t column_words) {
    for (Strip& s : strips_) {
        s.weights = memory;
        memory += floats_of(s, column_words);
    }
    for (Strip& s : strips_) {  // behind the weights, which stay aligned that way
        if (s.layer->rows % s.width == 0) continue;
        s.positions = reinterpret_cast<int32_t*>(memory);
        memory += block_cols_;
    }
}

}  // namespace blockprune
