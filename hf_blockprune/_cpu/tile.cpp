// Packing of x and of weights, and the register-tiled product of one strip with one panel. Compiled once for each
// instruction set: the compiler's vector types turn into its registers. BLOCKPRUNE_ISA names the object.
//
// A strip's outputs lie along the vector lanes; each kept feature costs one load of its weights and one broadcast of
// each token's value. x is feature-major in its panel, so which features are kept makes no difference to the speed,
// and blocks may be as narrow as one column.

#include <cstring>
#include <utility>

#include "kernels.h"
#include "vectors.h"

namespace blockprune {
namespace {

#if defined(__AVX512F__)
constexpr int MAX_TOKENS = 14, STRIDE = 16, WIDEST_STRIP = 32;
#elif defined(__AVX2__)
constexpr int MAX_TOKENS = 6, STRIDE = 8, WIDEST_STRIP = 16;
#elif defined(__aarch64__)
constexpr int MAX_TOKENS = 6, STRIDE = 8, WIDEST_STRIP = 16;
#else
constexpr int MAX_TOKENS = 3, STRIDE = 4, WIDEST_STRIP = 16;
#endif

constexpr int PREFETCH_FEATURES = 16;  // about what a core multiplies while its second cache answers
constexpr int PACKED_AT_ONCE = 16;      // features: a cache line of each token

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

inline Vec activate(Vec x, int64_t activation) {
    if (activation == GELU) return gelu(x);
    if (activation == GELU_TANH) return gelu_tanh(x);
    return x;
}

// Where tokens end before a multiple of four, the last one stands in for more.
template <typename T>
inline void rows_of(const Input& input, int64_t first_token, int32_t tokens, const T* (&rows)[STRIDE]) {
    for (int32_t t = 0; t < STRIDE; ++t) {
        const int64_t token = first_token + (t < tokens ? t : tokens - 1);
        rows[t] = static_cast<const T*>(input.x) + token * input.stride;
    }
}

template <typename T>
void pack_panel(const Input& input, int64_t first_token, int32_t tokens, float* panel) {
    const int64_t features = input.in_features, whole = features / 4 * 4;
    const T* rows[STRIDE];
    rows_of(input, first_token, tokens, rows);
    for (int64_t k = 0; k < whole; k += PACKED_AT_ONCE) {
        const int64_t end = k + PACKED_AT_ONCE < whole ? k + PACKED_AT_ONCE : whole;
        for (int32_t t = 0; t < tokens; t += 4) {
            const T* const four[] = {rows[t], rows[t + 1], rows[t + 2], rows[t + 3]};
            for (int64_t i = k; i < end; i += 4) transpose_four(four, i, panel + i * STRIDE + t, STRIDE);
        }
    }
    for (int64_t k = whole; k < features; ++k) {
        for (int32_t t = 0; t < tokens; ++t) panel[k * STRIDE + t] = to_float(rows[t][k]);
    }
    std::memset(panel + features * STRIDE, 0, (input.padded_features - features) * STRIDE * sizeof(float));
}

// Some rows [count, cols] of a block, turned feature-major.
template <typename T>
inline void pack_rows(const T* from, int64_t count, int64_t cols, float* to, int64_t stride) {
    const int64_t whole_rows = count / 4 * 4, whole_cols = cols / 4 * 4;
    if (cols == 1) {
        for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
        return;
    }
    for (int64_t k = 0; k < whole_cols; k += 4) {
        for (int64_t i = 0; i < whole_rows; i += 4) {
            const T* const four[] = {from + i * cols, from + (i + 1) * cols, from + (i + 2) * cols, from + (i + 3) * cols};
            transpose_four(four, k, to + k * stride + i, stride);
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = i < whole_rows ? whole_cols : 0; k < cols; ++k) to[k * stride + i] = to_float(from[i * cols + k]);
    }
}

// What is multiplied at once: one feature in float32.
struct Singles {
    static int64_t steps(int64_t cols) { return cols; }

    template <typename T>
    static void pack(const T* from, int64_t count, int64_t cols, float* to, int64_t stride) {
        pack_rows(from, count, cols, to, stride);
    }

    template <int VECS>
    static void multiply_add(Vec (&sums)[VECS], const Vec (&weights)[VECS], float x) {
        for (int v = 0; v < VECS; ++v) sums[v] += weights[v] * x;
    }
};

}  // namespace
}  // namespace blockprune

#ifdef __AVX512BF16__
#include "pairs.h"
#endif

namespace blockprune {
namespace {

// A strip of one block row has its blocks one after the other. Where it has several rows, or ends beyond the matrix, each
// block goes to its column's position, into its row's lanes.
template <class Step, typename T>
void pack_strip(const Strip& s) {
    const Layer& layer = *s.layer;
    const T* weight = static_cast<const T*>(layer.weight);
    const int64_t rows = layer.rows, cols = layer.cols, end = s.output + s.width;
    if (s.positions) {
        for (int64_t c = 0; c < s.count; ++c) s.positions[s.columns[c]] = int32_t(c);
        std::memset(s.weights, 0, s.work() * sizeof(float));
    }
    int64_t lane = 0;
    for (int64_t r = s.output / rows; r < layer.block_rows() && r * rows < end; ++r) {
        const int64_t first = s.output + lane - r * rows;  // row of the block
        const int64_t count = (end < (r + 1) * rows ? end : (r + 1) * rows) - s.output - lane;
        const int64_t begin = layer.crow_indices[r];
        for (int64_t block = begin; block < layer.crow_indices[r + 1]; ++block) {
            const int64_t position = s.positions ? s.positions[layer.col_indices[block]] : block - begin;
            float* to = s.weights + position * Step::steps(cols) * s.width + lane;
            Step::pack(weight + (block * rows + first) * cols, count, cols, to, s.width);
        }
        lane += count;
    }
}

// All sums stay in registers: every index is a constant, so the compiler can take the array apart.
template <class Step, int VECS, size_t... TOKEN>
inline void accumulate(const Strip& s, const float* panel, float* out, std::index_sequence<TOKEN...>) {
    Vec sums[sizeof...(TOKEN)][VECS] = {};
    const int32_t steps = int32_t(Step::steps(s.layer->cols));
    const int64_t ahead = 1 + PREFETCH_FEATURES / steps;
    const float* weight = s.weights;
    for (int64_t c = 0; c < s.count; ++c) {
        const float* x = panel + int64_t(s.columns[c]) * steps * STRIDE;
        __builtin_prefetch(panel + int64_t(s.columns[c + ahead < s.count ? c + ahead : c]) * steps * STRIDE);
        for (int32_t k = 0; k < steps; ++k, x += STRIDE, weight += VECS * LANES) {
            Vec weights[VECS];
            for (int v = 0; v < VECS; ++v) weights[v] = load(weight + v * LANES);
            (Step::template multiply_add<VECS>(sums[TOKEN], weights, x[TOKEN]), ...);
        }
    }
    const auto keep = [&](size_t token) {
        for (int v = 0; v < VECS; ++v) store(out + (token * VECS + v) * LANES, sums[token][v]);
    };
    (keep(TOKEN), ...);
}

// Bias, activation and the store of tokens x width sums.
template <typename T>
void finish(const Strip& s, int64_t first_token, int32_t tokens, const float* sums) {
    const Layer& layer = *s.layer;
    T* y = static_cast<T*>(layer.y) + first_token * layer.y_stride + s.output;
    T bias[WIDEST_STRIP] = {}, last[WIDEST_STRIP];
    if (layer.bias) std::memcpy(bias, static_cast<const T*>(layer.bias) + s.output, s.valid * sizeof(T));
    for (int32_t t = 0; t < tokens; ++t, y += layer.y_stride) {
        T* to = s.valid == s.width ? y : last;
        for (int32_t v = 0; v < s.width; v += LANES) {
            store(to + v, activate(load(sums + t * s.width + v) + load(bias + v), layer.activation));
        }
        if (to == last) std::memcpy(y, last, s.valid * sizeof(T));
    }
}

using Accumulate = void (*)(const Strip&, const float* panel, float* out);

template <class Step, int VECS, int TOKENS>
void accumulate_tile(const Strip& s, const float* panel, float* out) {
    accumulate<Step, VECS>(s, panel, out, std::make_index_sequence<TOKENS>());
}

template <class Step, int VECS, size_t... TOKENS>
Accumulate tile_for(int32_t tokens, std::index_sequence<TOKENS...>) {
    static const Accumulate tiles[] = {accumulate_tile<Step, VECS, TOKENS + 1>...};
    return tiles[tokens - 1];
}

int32_t strip_rows(int64_t rows) { return rows % WIDEST_STRIP ? 16 : WIDEST_STRIP; }

template <class Step, typename T>
void multiply_strip(const Strip& s, int64_t first_token, int32_t tokens, const float* panel) {
    constexpr auto counts = std::make_index_sequence<MAX_TOKENS>();
    alignas(64) float sums[MAX_TOKENS * WIDEST_STRIP];
    const Accumulate run = s.width == WIDEST_STRIP ? tile_for<Step, WIDEST_STRIP / LANES>(tokens, counts)
                                                   : tile_for<Step, 16 / LANES>(tokens, counts);
    run(s, panel, sums);
    finish<T>(s, first_token, tokens, sums);
}

#ifdef __AVX512BF16__
bool in_pairs(int32_t dtype, int64_t cols) { return dtype == BFLOAT16 && cols % 2 == 0; }
#else
using Pairs = Singles;
constexpr auto pack_input_pairs = pack_panel<uint16_t>;
bool in_pairs(int32_t, int64_t) { return false; }
#endif

void pack_inputs(const Input& input, int64_t first_token, int32_t tokens, float* panel) {
    const auto halves = in_pairs(input.dtype, input.cols) ? pack_input_pairs : pack_panel<uint16_t>;
    (input.dtype == BFLOAT16 ? halves : pack_panel<float>)(input, first_token, tokens, panel);
}

void pack_weights(const Strip& s, int32_t dtype) {
    const auto halves = in_pairs(dtype, s.layer->cols) ? pack_strip<Pairs, uint16_t> : pack_strip<Singles, uint16_t>;
    (dtype == BFLOAT16 ? halves : pack_strip<Singles, float>)(s);
}

void multiply(const Strip& s, int32_t dtype, int64_t first_token, int32_t tokens, const float* panel) {
    const auto halves = in_pairs(dtype, s.layer->cols) ? multiply_strip<Pairs, uint16_t> : multiply_strip<Singles, uint16_t>;
    (dtype == BFLOAT16 ? halves : multiply_strip<Singles, float>)(s, first_token, tokens, panel);
}

}  // namespace

#define STRING(name) #name
#define NAME_OF(name) STRING(name)
#define OBJECT(name) isa_##name
#define OBJECT_OF(name) OBJECT(name)
#define MERGING(name) merging_##name
#define MERGING_OF(name) MERGING(name)

extern const MergeKernels MERGING_OF(BLOCKPRUNE_ISA);
const Isa OBJECT_OF(BLOCKPRUNE_ISA) = {
    NAME_OF(BLOCKPRUNE_ISA), MAX_TOKENS, STRIDE, strip_rows, pack_inputs, pack_weights, multiply,
    &MERGING_OF(BLOCKPRUNE_ISA)};

}  // namespace blockprune
