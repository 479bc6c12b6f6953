// Several features in each 32 bits, where an instruction multiplies and adds them up at once: what is common to bfloat16
// in pairs and to whole numbers. Part of tile.cpp.
//
// A kind of words says what they hold (`Element`, `PER_WORD`) and multiplies them. Weights lie word by word, each with
// the outputs of the strip side by side. A panel has four words of a token side by side, where a block column is made of
// such groups, so that x need not be turned; else single ones, and a block column is filled up with zeros to whole words.
#pragma once

#include <cstring>

#include "kernels.h"
#include "vectors.h"

namespace blockprune {
namespace {

constexpr int GROUP = 4;             // words of a token side by side
constexpr int64_t READ_AT_ONCE = 16;  // features of x

template <class Words>
bool is_grouped(int64_t cols) {
    return cols % (GROUP * Words::PER_WORD) == 0;
}

// Where a word of a token stands in its panel.
template <int STRIDE>
int64_t place(int64_t word, int32_t token, bool grouped) {
    return grouped ? (word / GROUP * STRIDE + token) * GROUP + word % GROUP : word * STRIDE + token;
}

// Puts features k, k + 1, ... of a token, `count` of them, into its panel; there are READ_AT_ONCE, zeros behind the last.
template <class Words, int STRIDE>
inline void put(const typename Words::Element* features, int64_t count, int64_t k, int64_t cols, int32_t token, float* panel) {
    constexpr int64_t per = Words::PER_WORD;
    const int64_t words = divide_up(count, per), first = k / per;
    if (is_grouped<Words>(cols)) {
        for (int64_t w = 0; w < words; w += GROUP) {
            std::memcpy(panel + place<STRIDE>(first + w, token, true), features + w * per, GROUP * sizeof(float));
        }
    } else if (cols % per == 0) {
        for (int64_t w = 0; w < words; ++w) {
            std::memcpy(panel + place<STRIDE>(first + w, token, false), features + w * per, sizeof(float));
        }
    } else {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t column = (k + i) / cols, inside = (k + i) % cols;
            float* word = panel + place<STRIDE>(column * divide_up(cols, per) + inside / per, token, false);
            std::memcpy(reinterpret_cast<typename Words::Element*>(word) + inside % per, features + i, sizeof *features);
        }
    }
}

// Some rows [count, cols] of a block, turned word-major: `stride` words from one to the next.
template <class Words>
inline void pack_row_words(const typename Words::Stored* from, int64_t count, int64_t cols, float* to, int64_t stride) {
    constexpr int64_t per = Words::PER_WORD, four = 4 * per;
    const int64_t whole_rows = count / 4 * 4, whole_cols = cols / four * four;
    for (int64_t k = 0; k < whole_cols; k += four) {
        for (int64_t i = 0; i < whole_rows; i += 4) {
            const auto* row = from + i * cols + k;
            transpose(Words::four_words(row), Words::four_words(row + cols), Words::four_words(row + 2 * cols),
                      Words::four_words(row + 3 * cols), to + k / per * stride + i, stride);
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = i < whole_rows ? whole_cols : 0; k < cols; k += per) {
            typename Words::Element word[per] = {};
            for (int64_t j = 0; j < per && k + j < cols; ++j) word[j] = typename Words::Element(from[i * cols + k + j]);
            std::memcpy(to + k / per * stride + i, word, sizeof word);
        }
    }
}

}  // namespace
}  // namespace blockprune
