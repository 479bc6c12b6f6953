// Weights in int8, a scale for each output; x as int8 with a scale for each token, found while it is packed:
// y = sum * x_scale * weight_scale. Sums are whole numbers in int32, the same with every instruction set. Part of tile.cpp.
#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "words.h"

namespace blockprune {
namespace {

constexpr float LARGEST = 127.0f;
constexpr float NOTHING = 1e-30f;  // a token whose values are all smaller counts as zeros

#if defined(__AVX512VNNI__)
inline IntVec dot(IntVec sums, IntVec x, IntVec weights) {
    return (IntVec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)x, (__m512i)weights);
}
#elif defined(__AVXVNNI__)
inline IntVec dot(IntVec sums, IntVec x, IntVec weights) {
    return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)x, (__m256i)weights);
}
#elif defined(__AVX512BW__)
inline IntVec dot(IntVec sums, IntVec x, IntVec weights) {
    return sums + (IntVec)_mm512_madd_epi16((__m512i)x, (__m512i)weights);
}
#elif defined(__AVX2__)
inline IntVec dot(IntVec sums, IntVec x, IntVec weights) {
    return sums + (IntVec)_mm256_madd_epi16((__m256i)x, (__m256i)weights);
}
#elif defined(__x86_64__)
inline IntVec dot(IntVec sums, IntVec x, IntVec weights) {
    return sums + (IntVec)_mm_madd_epi16((__m128i)x, (__m128i)weights);
}
#elif defined(__ARM_FEATURE_DOTPROD)
inline IntVec dot(IntVec sums, IntVec x, IntVec weights) {
    return (IntVec)vdotq_s32((int32x4_t)sums, (int8x16_t)x, (int8x16_t)weights);
}
#else
inline IntVec dot(IntVec sums, IntVec x, IntVec weights) {
    return sums + (x << 16 >> 16) * (weights << 16 >> 16) + (x >> 16) * (weights >> 16);
}
#endif

// What one call of `dot` multiplies and adds up for each output.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
using Element = uint8_t;  // x has no sign there: it is taken as 128 more, and 128 times the output's weights go off the sum
constexpr int32_t OFFSET = 128;
#elif defined(__ARM_FEATURE_DOTPROD)
using Element = int8_t;
constexpr int32_t OFFSET = 0;
#else
using Element = int16_t;  // products of bytes do not fit the instruction's sums
constexpr int32_t OFFSET = 0;
#endif

struct Numbers {
    using Stored = int8_t;
    using Element = blockprune::Element;
    using Word = int32_t;
    using Sums = IntVec;
    static constexpr int PER_WORD = 4 / sizeof(Element);
    static constexpr bool QUANTISED = true;

    static Four four_words(const int8_t* from) {
        Element elements[4 * PER_WORD];
        for (int i = 0; i < 4 * PER_WORD; ++i) elements[i] = Element(from[i]);
        Four words;
        std::memcpy(&words, elements, sizeof words);
        return words;
    }

    static void pack(const int8_t* from, int64_t count, int64_t cols, float* to, int64_t stride) {
        pack_row_words<Numbers>(from, count, cols, to, stride);
    }

    static void multiply_add(IntVec& sums, Vec weights, int32_t x) { sums = dot(sums, IntVec{} + x, (IntVec)weights); }
};

// What x is too much by in each output's sum: OFFSET times its weights, [width].
inline void pack_offsets(const float* weights, int64_t words, int32_t width, int32_t* offsets) {
    if (!OFFSET) return;
    for (int32_t v = 0; v < width; v += LANES) {
        IntVec sums = {};
        for (int64_t w = 0; w < words; ++w) sums = dot(sums, IntVec{} + 0x01010101, (IntVec)load(weights + w * width + v));
        sums *= OFFSET;
        std::memcpy(offsets + v, &sums, sizeof sums);
    }
}

// The largest size among a token's values, as bits: NaN counts as more than all numbers.
template <typename T>
inline int32_t largest_bits(const T* row, int64_t features) {
    IntVec most = {};
    int64_t k = 0;
    for (; k + LANES <= features; k += LANES) {
        const IntVec bits = (IntVec)load(row + k) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    int32_t largest = 0;
    for (int i = 0; i < LANES; ++i) largest = most[i] > largest ? most[i] : largest;
    for (; k < features; ++k) {
        const float value = to_float(row[k]);
        int32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

struct TokenScale {
    float scale, inverse;  // what a whole number stands for; both say nothing of a token that is not finite: y is NaN
};

inline TokenScale scale_of(int32_t bits) {
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    if (bits >= 0x7f800000) return {__builtin_nanf(""), 0.0f};
    if (largest < NOTHING) return {0.0f, 0.0f};
    return {largest / LARGEST, LARGEST / largest};
}

template <typename T>
inline void quantise(const T* row, float inverse, Element* to) {
    for (int64_t k = 0; k < READ_AT_ONCE; k += LANES) {
        typedef Element Narrow __attribute__((vector_size(LANES * sizeof(Element))));
        const Narrow narrow = __builtin_convertvector(nearest(load(row + k) * inverse) + OFFSET, Narrow);
        std::memcpy(to + k, &narrow, sizeof narrow);
    }
}

template <typename T, int STRIDE>
void pack_input_numbers(const Input& input, int64_t first_token, int32_t tokens, float* panel) {
    const int64_t features = input.in_features, padded = input.padded_features();
    float* scales = panel + input.block_cols * input.column_words * STRIDE;
    Element numbers[READ_AT_ONCE];
    for (int32_t t = 0; t < tokens; ++t) {
        const T* row = static_cast<const T*>(input.x) + (first_token + t) * input.stride;
        const TokenScale token = scale_of(largest_bits(row, features));
        scales[t] = token.scale;
        for (int64_t k = 0; k < padded; k += READ_AT_ONCE) {
            T last[READ_AT_ONCE] = {};
            const T* from = row + k;
            if (k + READ_AT_ONCE > features) {
                if (k < features) std::memcpy(last, row + k, (features - k) * sizeof(T));
                from = last;
            }
            quantise(from, token.inverse, numbers);
            put<Numbers, STRIDE>(numbers, padded - k < READ_AT_ONCE ? padded - k : READ_AT_ONCE, k, input.cols, t, panel);
        }
    }
}

}  // namespace
}  // namespace blockprune
