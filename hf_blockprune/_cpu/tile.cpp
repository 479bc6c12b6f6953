// Packing of x and of weights, and the register-tiled product of one strip with one panel. Compiled once for each
// instruction set: the compiler's vector types turn into its registers. BLOCKPRUNE_ISA names the object.
//
// A strip's outputs lie along the vector lanes; each kept feature costs one load of its weights and one broadcast of
// each token's value. x is feature-major in its panel, so which features are kept makes no difference to the speed,
// and blocks may be as narrow as one column.

#include <cstring>
#include <type_traits>
#include <utility>

#include "activations.h"
#include "bytes.h"
#include "half.h"
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
    std::memset(panel + features * STRIDE, 0, (input.padded_features() - features) * STRIDE * sizeof(float));
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

// One feature at once in float32; see words.h for the others.
template <typename T>
struct Singles {
    using Stored = T;
    using Word = float;
    using Sums = Vec;
    static constexpr int PER_WORD = 1;
    static constexpr bool QUANTISED = false;

    static void pack(const T* from, int64_t count, int64_t cols, float* to, int64_t stride) {
        pack_rows(from, count, cols, to, stride);
    }

    static void multiply_add(Vec& sums, Vec weights, float x) { sums += weights * x; }
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
template <class Words>
void pack_strip(const Input& input, const Strip& s) {
    const Layer& layer = *s.layer;
    const auto* weight = static_cast<const typename Words::Stored*>(layer.weight);
    const int64_t rows = layer.rows, cols = layer.cols, end = s.output + s.width;
    if (s.positions) {
        for (int64_t c = 0; c < s.count; ++c) s.positions[s.columns[c]] = int32_t(c);
        std::memset(s.weights, 0, s.count * input.column_words * s.width * sizeof(float));
    }
    int64_t lane = 0;
    for (int64_t r = s.output / rows; r < layer.block_rows() && r * rows < end; ++r) {
        const int64_t first = s.output + lane - r * rows;  // row of the block
        const int64_t count = (end < (r + 1) * rows ? end : (r + 1) * rows) - s.output - lane;
        const int64_t begin = layer.crow_indices[r];
        for (int64_t block = begin; block < layer.crow_indices[r + 1]; ++block) {
            const int64_t position = s.positions ? s.positions[layer.col_indices[block]] : block - begin;
            float* to = s.weights + position * input.column_words * s.width + lane;
            Words::pack(weight + (block * rows + first) * cols, count, cols, to, s.width);
        }
        lane += count;
    }
    if constexpr (Words::QUANTISED) {
        const int64_t words = s.count * input.column_words;
        pack_offsets(s.weights, words, s.width, reinterpret_cast<int32_t*>(s.weights + words * s.width));
    }
}

template <class Words, int VECS>
inline void multiply_add(typename Words::Sums (&sums)[VECS], const Vec (&weights)[VECS], const float* x) {
    typename Words::Word word;
    std::memcpy(&word, x, sizeof word);
    for (int v = 0; v < VECS; ++v) Words::multiply_add(sums[v], weights[v], word);
}

// All sums stay in registers: every index is a constant, so the compiler can take the array apart. `SIDE` words of a token
// lie side by side in the panel.
template <class Words, int SIDE, int VECS, size_t... TOKEN>
inline void accumulate(const Input& input, const Strip& s, const float* panel, float* out, std::index_sequence<TOKEN...>) {
    typename Words::Sums sums[sizeof...(TOKEN)][VECS] = {};
    const int32_t words = int32_t(input.column_words);
    const int64_t ahead = 1 + PREFETCH_FEATURES / words;
    const float* weight = s.weights;
    for (int64_t c = 0; c < s.count; ++c) {
        const float* x = panel + int64_t(s.columns[c]) * words * STRIDE;
        __builtin_prefetch(panel + int64_t(s.columns[c + ahead < s.count ? c + ahead : c]) * words * STRIDE);
        for (int32_t k = 0; k < words; k += SIDE, x += SIDE * STRIDE) {
#pragma GCC unroll 4
            for (int side = 0; side < SIDE; ++side, weight += VECS * LANES) {
                Vec weights[VECS];
                for (int v = 0; v < VECS; ++v) weights[v] = load(weight + v * LANES);
                (multiply_add<Words, VECS>(sums[TOKEN], weights, x + TOKEN * SIDE + side), ...);
            }
        }
    }
    const auto keep = [&](size_t token) {
        for (int v = 0; v < VECS; ++v) store(out + (token * VECS + v) * LANES, (Vec)sums[token][v]);
    };
    (keep(TOKEN), ...);
}

// The scales of a layer's weights, and what is too much in their sums.
struct Scales {
    float weight[WIDEST_STRIP] = {};
    const int32_t* offsets;

    Scales(const Input& input, const Strip& s)
        : offsets(reinterpret_cast<const int32_t*>(s.weights + s.count * input.column_words * s.width)) {
        std::memcpy(weight, s.layer->weight_scale + s.output, s.valid * sizeof(float));
    }

    Vec numbers(const float* sums, int32_t v, float x_scale) const {
        IntVec whole;
        std::memcpy(&whole, sums, sizeof whole);
        if (OFFSET) {
            IntVec offset;
            std::memcpy(&offset, offsets + v, sizeof offset);
            whole = (IntVec)((BitVec)whole - (BitVec)offset);
        }
        return __builtin_convertvector(whole, Vec) * x_scale * load(weight + v);
    }
};

// A strip's part of a vector [out_features], zeros where there is none.
template <typename T>
struct Part {
    T values[WIDEST_STRIP] = {};

    Part(const void* all, const Strip& s) {
        if (all) std::memcpy(values, static_cast<const T*>(all) + s.output, s.valid * sizeof(T));
    }
};

// Bias, activation, scale, residual and the store of tokens x width sums, in Y.
template <typename T, typename Y, bool ROUGHLY, class Value>
void finish(const Strip& s, int64_t first_token, int32_t tokens, Value value) {
    const Layer& layer = *s.layer;
    const int64_t first = first_token * layer.y_stride + s.output;
    Y* y = static_cast<Y*>(layer.y) + first;
    const T* residual = layer.residual ? static_cast<const T*>(layer.residual) + first : nullptr;
    const Part<T> bias(layer.bias, s), scale(layer.output_scale, s);
    Y last[WIDEST_STRIP];
    T rest[WIDEST_STRIP] = {};
    for (int32_t t = 0; t < tokens; ++t, y += layer.y_stride) {
        Y* to = s.valid == s.width ? y : last;
        const T* add = residual ? residual + t * layer.y_stride : rest;
        if (residual && to == last) {
            std::memcpy(rest, add, s.valid * sizeof(T));
            add = rest;
        }
        for (int32_t v = 0; v < s.width; v += LANES) {
            Vec out = activate(value(t, v) + load(bias.values + v), layer.activation, ROUGHLY);
            if (layer.output_scale) out *= load(scale.values + v);
            if (residual) out += load(add + v);
            store(to + v, out);
        }
        if (to == last) std::memcpy(y, last, s.valid * sizeof(Y));
    }
}

using Accumulate = void (*)(const Input&, const Strip&, const float* panel, float* out);

template <class Words, int SIDE, int VECS, int TOKENS>
void accumulate_tile(const Input& input, const Strip& s, const float* panel, float* out) {
    accumulate<Words, SIDE, VECS>(input, s, panel, out, std::make_index_sequence<TOKENS>());
}

template <class Words, int SIDE, int VECS, size_t... TOKENS>
Accumulate tile_for(int32_t tokens, std::index_sequence<TOKENS...>) {
    static const Accumulate tiles[] = {accumulate_tile<Words, SIDE, VECS, TOKENS + 1>...};
    return tiles[tokens - 1];
}

template <class Words, int SIDE>
void sum_up(const Input& input, const Strip& s, int32_t tokens, const float* panel, float* sums) {
    constexpr auto counts = std::make_index_sequence<MAX_TOKENS>();
    const Accumulate run = s.width == WIDEST_STRIP ? tile_for<Words, SIDE, WIDEST_STRIP / LANES>(tokens, counts)
                                                   : tile_for<Words, SIDE, 16 / LANES>(tokens, counts);
    run(input, s, panel, sums);
}

int32_t strip_rows(int64_t rows) { return rows % WIDEST_STRIP ? 16 : WIDEST_STRIP; }

// T is the dtype of x, Y that of y.
template <class Words, typename T, typename Y = T>
void multiply_strip(const Input& input, const Strip& s, int64_t first_token, int32_t tokens, const float* panel) {
    alignas(64) float sums[MAX_TOKENS * WIDEST_STRIP];
    if constexpr (Words::PER_WORD > 1) {
        (is_grouped<Words>(input.cols) ? sum_up<Words, GROUP> : sum_up<Words, 1>)(input, s, tokens, panel, sums);
    } else {
        sum_up<Words, 1>(input, s, tokens, panel, sums);
    }
    if constexpr (Words::QUANTISED) {
        const Scales scales(input, s);
        const float* of_tokens = panel + input.block_cols * input.column_words * STRIDE;
        finish<T, Y, true>(s, first_token, tokens,
                           [&](int32_t t, int32_t v) { return scales.numbers(sums + t * s.width + v, v, of_tokens[t]); });
    } else {
        finish<T, Y, false>(s, first_token, tokens, [&](int32_t t, int32_t v) { return load(sums + t * s.width + v); });
    }
}

// What is done with x and weights of some dtypes.
struct Kernels {
    int64_t features_a_word;
    void (*pack_inputs)(const Input&, int64_t first_token, int32_t tokens, float* panel);
    void (*pack_weights)(const Input&, const Strip&);
    void (*multiply)(const Input&, const Strip&, int64_t first_token, int32_t tokens, const float* panel);
};

template <class Words, typename T, typename Y = T>
constexpr Kernels kernels(void (*pack_inputs)(const Input&, int64_t, int32_t, float*)) {
    return {Words::PER_WORD, pack_inputs, pack_strip<Words>, multiply_strip<Words, T, Y>};
}

const Kernels& kernels_for(const Input& input) {
    static const Kernels floats = kernels<Singles<float>, float>(pack_panel<float>);
    static const Kernels halves = kernels<Singles<uint16_t>, uint16_t>(pack_panel<uint16_t>);
    static const Kernels numbers = kernels<Numbers, float>(pack_input_numbers<float, STRIDE>);
    static const Kernels of_halves = kernels<Numbers, uint16_t>(pack_input_numbers<uint16_t, STRIDE>);
    static const Kernels to_halves = kernels<Numbers, float, uint16_t>(pack_input_numbers<float, STRIDE>);
    if (input.weights == INT8) return input.dtype == BFLOAT16 ? of_halves : input.halves ? to_halves : numbers;
#ifdef __AVX512BF16__
    static const Kernels pairs = kernels<Pairs, uint16_t>(pack_input_pairs<STRIDE>);
    if (input.dtype == BFLOAT16 && input.cols % 2 == 0) return pairs;
#endif
    return input.dtype == BFLOAT16 ? halves : floats;
}

int64_t column_words(const Input& input) { return divide_up(input.cols, kernels_for(input).features_a_word); }

void pack_inputs(const Input& input, int64_t first_token, int32_t tokens, float* panel) {
    kernels_for(input).pack_inputs(input, first_token, tokens, panel);
}

void pack_weights(const Input& input, const Strip& s) { kernels_for(input).pack_weights(input, s); }

void multiply(const Input& input, const Strip& s, int64_t first_token, int32_t tokens, const float* panel) {
    kernels_for(input).multiply(input, s, first_token, tokens, panel);
}

}  // namespace
}  // namespace blockprune

#include "half_kernels.h"  // which calls much of the above

namespace blockprune {

#define STRING(name) #name
#define NAME_OF(name) STRING(name)
#define OBJECT(name) isa_##name
#define OBJECT_OF(name) OBJECT(name)
#define MERGING(name) merging_##name
#define MERGING_OF(name) MERGING(name)

const HalfKernels halves = {MULTIPLIES_PAIRS, normalise_rows, attention_floats, attend};

extern const MergeKernels MERGING_OF(BLOCKPRUNE_ISA);
const Isa OBJECT_OF(BLOCKPRUNE_ISA) = {
    NAME_OF(BLOCKPRUNE_ISA), MAX_TOKENS, STRIDE, strip_rows, column_words, pack_inputs, pack_weights, multiply,
    &MERGING_OF(BLOCKPRUNE_ISA), &halves};

}  // namespace blockprune
