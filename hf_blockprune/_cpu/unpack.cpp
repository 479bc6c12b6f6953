#include "unpack.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "threads.h"

namespace blockprune {
namespace {

constexpr int64_t BYTES_A_THREAD = 64 << 10;  // below that, starting another thread takes longer

struct Work {
    const Layer& layer;
    int64_t in_features, element;
    std::atomic<int64_t> next_row{0};
};

// One row of one block: the compiler copies narrow ones without a call.
template <typename T>
void fill_row(const Work& work, int64_t output) {
    const Layer& layer = work.layer;
    const int64_t row = output / layer.rows, cols = layer.cols, features = work.in_features;
    T* to = static_cast<T*>(layer.y) + output * features;
    int64_t done = 0;
    for (int64_t block = layer.crow_indices[row]; block < layer.crow_indices[row + 1]; ++block) {
        const T* from = static_cast<const T*>(layer.weight) + (block * layer.rows + output % layer.rows) * cols;
        const int64_t begin = layer.col_indices[block] * cols, end = std::min(begin + cols, features);
        std::fill(to + done, to + begin, T(0));
        if (cols < 8) {
            for (int64_t k = begin; k < end; ++k) to[k] = from[k - begin];
        } else {
            std::memcpy(to + begin, from, (end - begin) * sizeof(T));
        }
        done = end;
    }
    std::fill(to + done, to + features, T(0));
}

void fill(void* argument) {
    Work& work = *static_cast<Work*>(argument);
    const auto row = work.element == 2 ? fill_row<uint16_t> : work.element == 4 ? fill_row<uint32_t> : fill_row<uint64_t>;
    const int64_t outputs = work.layer.out_features, rows = work.layer.rows;
    for (int64_t r; (r = work.next_row.fetch_add(1)) < work.layer.block_rows();) {
        for (int64_t output = r * rows; output < std::min(outputs, (r + 1) * rows); ++output) row(work, output);
    }
}

}  // namespace

void unpack(const Layer& layer, int64_t in_features, int64_t element, int32_t num_threads) {
    Work work{layer, in_features, element};
    const int64_t useful = layer.out_features * in_features * element / BYTES_A_THREAD;
    if (threads().found() && num_threads > 1 && useful > 1) {
        threads().parallel(fill, &work, unsigned(std::min<int64_t>(useful, num_threads)), 0);
    } else {
        fill(&work);
    }
}

}  // namespace blockprune
