// bfloat16 where an instruction multiplies pairs of them: tile.cpp's panels and strips with two neighbouring features of
// a block in each 32 bits, for blocks of an even number of columns. Products are exact, sums float32. Part of tile.cpp,
// after what it calls.
#pragma once

#include <immintrin.h>

namespace blockprune {
namespace {

// Features k and k + 1 of a row, those from `end` on as zero.
inline float pair(const uint16_t* row, int64_t k, int64_t end) {
    uint16_t two[2] = {k < end ? row[k] : uint16_t(0), k + 1 < end ? row[k + 1] : uint16_t(0)};
    float bits;
    std::memcpy(&bits, two, sizeof bits);
    return bits;
}

inline Four four_pairs(const uint16_t* from) {
    Four pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    return pairs;
}

// Eight features of four rows, pair-major: `stride` pairs from one to the next.
inline void transpose_pairs(const uint16_t* const (&rows)[4], int64_t k, float* to, int64_t stride) {
    transpose(four_pairs(rows[0] + k), four_pairs(rows[1] + k), four_pairs(rows[2] + k), four_pairs(rows[3] + k), to, stride);
}

void pack_input_pairs(const Input& input, int64_t first_token, int32_t tokens, float* panel) {
    const int64_t features = input.in_features, whole = features / 8 * 8;
    const uint16_t* rows[STRIDE];
    rows_of(input, first_token, tokens, rows);
    for (int64_t k = 0; k < whole; k += 8) {
        for (int32_t t = 0; t < tokens; t += 4) {
            const uint16_t* const four[] = {rows[t], rows[t + 1], rows[t + 2], rows[t + 3]};
            transpose_pairs(four, k, panel + k / 2 * STRIDE + t, STRIDE);
        }
    }
    for (int64_t k = whole; k < input.padded_features; k += 2) {
        for (int32_t t = 0; t < tokens; ++t) panel[k / 2 * STRIDE + t] = pair(rows[t], k, features);
    }
}

// Some rows [count, cols] of a block, turned pair-major.
inline void pack_row_pairs(const uint16_t* from, int64_t count, int64_t cols, float* to, int64_t stride) {
    const int64_t whole_rows = count / 4 * 4, whole_cols = cols / 8 * 8;
    for (int64_t k = 0; k < whole_cols; k += 8) {
        for (int64_t i = 0; i < whole_rows; i += 4) {
            const uint16_t* const four[] = {from + i * cols, from + (i + 1) * cols, from + (i + 2) * cols,
                                            from + (i + 3) * cols};
            transpose_pairs(four, k, to + k / 2 * stride + i, stride);
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = i < whole_rows ? whole_cols : 0; k < cols; k += 2) {
            to[k / 2 * stride + i] = pair(from + i * cols, k, cols);
        }
    }
}

// What is multiplied at once: two features in bfloat16.
struct Pairs {
    static int64_t steps(int64_t cols) { return cols / 2; }

    static void pack(const uint16_t* from, int64_t count, int64_t cols, float* to, int64_t stride) {
        pack_row_pairs(from, count, cols, to, stride);
    }

    template <int VECS>
    static void multiply_add(Vec (&sums)[VECS], const Vec (&weights)[VECS], float x) {
        const __m512bh both = (__m512bh)_mm512_set1_ps(x);  // moved, not computed with: its bits are no number
        for (int v = 0; v < VECS; ++v) sums[v] = (Vec)_mm512_dpbf16_ps((__m512)sums[v], (__m512bh)weights[v], both);
    }
};

}  // namespace
}  // namespace blockprune
