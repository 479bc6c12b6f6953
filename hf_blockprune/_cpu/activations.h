// GELU in float32. Part of tile.cpp.
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace blockprune {
namespace {

// Cephes' expf: 2^n times a polynomial in what is left, about 2 ulp.
inline Vec exponential(Vec x) {
    const Vec low = Vec{} - 87.3f, high = Vec{} + 88.3f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves a whole number in the lowest bits
    Vec shifted = x * 1.44269504f + round;
    Vec n = shifted - round;
    Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = Vec{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    IntVec exponent = ((IntVec)shifted - 0x4b400000 + 127) << 23;
    return p * (Vec)exponent;  // a product, so that NaN stays NaN
}

// 2^x within 4e-6 of itself, for numbers of which products are rounded to bfloat16.
inline Vec rough_power_of_two(Vec x) {
    const Vec low = Vec{} - 126.0f;
    x = x < low ? low : x;
    const float round = 12582912.0f;
    const Vec shifted = x + round;
    const Vec r = x - (shifted - round);
    Vec p = r * 0.009570101276040077f + 0.05591786280274391f;
    p = p * r + 0.240247443318367f;
    p = p * r + 0.6931217908859253f;
    p = p * r + 0.9999992847442627f;
    return p * (Vec)(((IntVec)shifted - 0x4b400000 + 127) << 23);
}

// x Phi(x), the error function by Abramowitz and Stegun 7.1.26 (absolute error below 1.5e-7).
inline Vec gelu(Vec x) {
    Vec z = x * 0.70710678f;
    Vec size = z < 0.0f ? -z : z;
    Vec t = 1.0f / (size * 0.3275911f + 1.0f);
    Vec p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = (p * t + 0.254829592f) * t;
    Vec tail = p * exponential(-z * z) * 0.5f;  // of the normal distribution beyond |x|
    return x * (z < 0.0f ? tail : 1.0f - tail);
}

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u))
inline Vec gelu_tanh(Vec x) {
    Vec u = x * 0.79788456f * (x * x * 0.044715f + 1.0f);
    return x / (exponential(u * -2.0f) + 1.0f);
}

// For outputs that are rounded to 8 bits next: x (P(x) + 1/2) with an odd polynomial P on [-END, END], P(END) = 1/2, fitted
// for the least error of the product. That is below 1e-4, and 5e-6 of x beyond, without exp and division.
inline Vec rough_gelu(Vec x) {
    constexpr float END = 4.2f;
    Vec near = x < -END ? Vec{} - END : x;
    near = near > END ? Vec{} + END : near;
    const Vec square = near * near;
    Vec p = square * -9.017586677373401e-10f + 7.941375201880874e-08f;
    p = p * square - 3.037941041839076e-06f;
    p = p * square + 6.689082511002198e-05f;
    p = p * square - 0.0009506584028713405f;
    p = p * square + 0.00929823238402605f;
    p = p * square - 0.06552820652723312f;
    p = p * square + 0.3984658718109131f;
    return x * (p * near + 0.5f);
}

inline Vec activate(Vec x, int64_t activation, bool roughly) {
    if (activation == GELU) return roughly ? rough_gelu(x) : gelu(x);
    if (activation == GELU_TANH) return gelu_tanh(x);
    return x;
}

}  // namespace
}  // namespace blockprune
