// bfloat16 where an instruction multiplies pairs of them, for blocks of an even number of columns. Products are exact,
// sums float32. Part of tile.cpp.
#pragma once

#include <immintrin.h>

#include "words.h"

namespace blockprune {
namespace {

struct Pairs {
    using Stored = uint16_t;
    using Element = uint16_t;
    using Word = int32_t;
    using Sums = Vec;
    static constexpr int PER_WORD = 2;
    static constexpr bool QUANTISED = false;

    static Four four_words(const uint16_t* from) {
        Four words;
        std::memcpy(&words, from, sizeof words);
        return words;
    }

    static void pack(const uint16_t* from, int64_t count, int64_t cols, float* to, int64_t stride) {
        pack_row_words<Pairs>(from, count, cols, to, stride);
    }

    static void multiply_add(Vec& sums, Vec weights, int32_t x) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32(x);
        sums = (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)weights, both);
    }
};

template <int STRIDE>
void pack_input_pairs(const Input& input, int64_t first_token, int32_t tokens, float* panel) {
    const int64_t features = input.in_features;
    for (int32_t t = 0; t < tokens; ++t) {
        const uint16_t* row = static_cast<const uint16_t*>(input.x) + (first_token + t) * input.stride;
        for (int64_t k = 0; k < input.padded_features(); k += READ_AT_ONCE) {
            if (k + READ_AT_ONCE <= features) {
                put<Pairs, STRIDE>(row + k, READ_AT_ONCE, k, input.cols, t, panel);
                continue;
            }
            uint16_t last[READ_AT_ONCE] = {};
            if (k < features) std::memcpy(last, row + k, (features - k) * sizeof *row);
            const int64_t left = input.padded_features() - k;
            put<Pairs, STRIDE>(last, left < READ_AT_ONCE ? left : READ_AT_ONCE, k, input.cols, t, panel);
        }
    }
}

}  // namespace
}  // namespace blockprune
