// The registers of the instruction set that a file is compiled for, as the compiler's vector types, and what goes in and
// out of them. Everything has internal linkage: each instruction set's object keeps its own.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>

namespace blockprune {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float LooseVec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef uint32_t BitVec __attribute__((vector_size(LANES * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(LANES * 2)));
typedef uint16_t LooseHalfVec __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef float Four __attribute__((vector_size(16)));
typedef float LooseFour __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t FourIndices __attribute__((vector_size(16)));

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }

inline Vec load(const uint16_t* p) {  // bfloat16 is the upper half of a float
    HalfVec half = *reinterpret_cast<const LooseHalfVec*>(p);
    return (Vec)(__builtin_convertvector(half, BitVec) << 16);
}

inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }

inline void store(uint16_t* p, Vec v) {  // to the nearest, ties to even
    BitVec bits = (BitVec)v;
    BitVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    BitVec nan = (bits >> 16) | 0x40;
    rounded = (BitVec)(v != v) ? nan : rounded;
    *reinterpret_cast<LooseHalfVec*>(p) = __builtin_convertvector(rounded, HalfVec);
}

// To the nearest whole numbers, ties to even; by an instruction, so that no compiler joins it with a product before it.
inline IntVec nearest(Vec v) {
#if defined(__AVX512F__)
    return (IntVec)_mm512_maskz_cvtps_epi32(__mmask16(-1), (__m512)v);  // the other form makes GCC 12 warn
#elif defined(__AVX2__)
    return (IntVec)_mm256_cvtps_epi32((__m256)v);
#elif defined(__x86_64__)
    return (IntVec)_mm_cvtps_epi32((__m128)v);
#else
    return (IntVec)vcvtnq_s32_f32((float32x4_t)v);
#endif
}

inline float to_float(float value) { return value; }

inline float to_float(uint16_t value) {
    uint32_t bits = uint32_t(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

template <typename T>
inline Four load_four(const T* p) {
    return Four{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}

template <>
inline Four load_four(const float* p) {
    return *reinterpret_cast<const LooseFour*>(p);
}

#if defined(__clang__)
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, FourIndices{i, j, k, l})
#endif

// Four rows of four values, turned: `stride` floats from one column of them to the next.
inline void transpose(Four a, Four b, Four c, Four d, float* to, int64_t stride) {
    Four ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
    Four ab2 = SHUFFLE(a, b, 2, 6, 3, 7), cd2 = SHUFFLE(c, d, 2, 6, 3, 7);
    *reinterpret_cast<LooseFour*>(to) = SHUFFLE(ab, cd, 0, 1, 4, 5);
    *reinterpret_cast<LooseFour*>(to + stride) = SHUFFLE(ab, cd, 2, 3, 6, 7);
    *reinterpret_cast<LooseFour*>(to + 2 * stride) = SHUFFLE(ab2, cd2, 0, 1, 4, 5);
    *reinterpret_cast<LooseFour*>(to + 3 * stride) = SHUFFLE(ab2, cd2, 2, 3, 6, 7);
}

// Four rows' values of four features, turned feature-major.
template <typename T>
inline void transpose_four(const T* const (&rows)[4], int64_t k, float* to, int64_t stride) {
    transpose(load_four(rows[0] + k), load_four(rows[1] + k), load_four(rows[2] + k), load_four(rows[3] + k), to, stride);
}

}  // namespace
}  // namespace blockprune
